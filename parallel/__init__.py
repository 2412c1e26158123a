"""How do many processes train one network as one? The layout that they should take, layers laid out so, the trainer, and the
curvature of distributed models."""

from parallel import adversarial, curvature
from parallel.architectures import alexnet, gpt, resnet50
from parallel.communication import AlphaBeta, Collective
from parallel.layer_cost import Grid
from parallel.layer_shape import LayerShape, describe
from parallel.layouts.network import LaidOut
from parallel.noise_scale import NoiseScale, noise_scale
from parallel.planner import LayerPlan, Plan, Plans, best_plans, plot_by_ranks

__all__ = [
    "AlphaBeta",
    "Collective",
    "Grid",
    "LaidOut",
    "LayerPlan",
    "LayerShape",
    "NoiseScale",
    "Plan",
    "Plans",
    "adversarial",
    "alexnet",
    "best_plans",
    "curvature",
    "describe",
    "gpt",
    "noise_scale",
    "plot_by_ranks",
    "resnet50",
]
