"""How do many processes train one network as one? So far: which layout they should take, domain-parallel layers, and the
curvature of data-parallel models."""

from parallel import curvature
from parallel.architectures import alexnet, gpt, resnet50
from parallel.communication import AlphaBeta, Collective
from parallel.layer_cost import Grid
from parallel.layer_shape import LayerShape, describe
from parallel.planner import LayerPlan, Plan, Plans, plan

__all__ = [
    "AlphaBeta",
    "Collective",
    "Grid",
    "LayerPlan",
    "LayerShape",
    "Plan",
    "Plans",
    "alexnet",
    "curvature",
    "describe",
    "gpt",
    "plan",
    "resnet50",
]
