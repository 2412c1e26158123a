"""What is the curvature of this loss? Tasks, objectives, Hessian products and per-layer traces."""

from hessian.estimators.layers import layer_report
from hessian.objective import Objective
from hessian.operators.base import LinearOperator
from hessian.operators.hessian import Hessian
from hessian.results import LayerReport, LayerRow
from hessian.task import Task, load_task, load_weights

__all__ = [
    "Hessian",
    "LayerReport",
    "LayerRow",
    "LinearOperator",
    "Objective",
    "Task",
    "layer_report",
    "load_task",
    "load_weights",
]
