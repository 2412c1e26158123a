"""What is the curvature of this loss? Tasks, objectives, curvature operators, and what one asks of them."""

from hessian.estimators.eigenpairs import Eigenpairs, top_eigenpairs
from hessian.estimators.layers import layer_report
from hessian.objective import Objective
from hessian.operators.base import Dense, LinearOperator
from hessian.operators.blocks import BlockDiagonal, Submatrix, block_diagonal, submatrix
from hessian.operators.fisher import Fisher
from hessian.operators.gauss_newton import GaussNewton
from hessian.operators.hessian import Hessian
from hessian.operators.inverse import LowRankPlusShift, inverse
from hessian.operators.kfac import EKFAC, KFAC
from hessian.operators.preconditioned import adam_preconditioner, preconditioned
from hessian.results import LayerReport, LayerRow
from hessian.task import Task, load_task, load_weights

__all__ = [
    "EKFAC",
    "KFAC",
    "BlockDiagonal",
    "Dense",
    "Eigenpairs",
    "Fisher",
    "GaussNewton",
    "Hessian",
    "LayerReport",
    "LayerRow",
    "LinearOperator",
    "LowRankPlusShift",
    "Objective",
    "Submatrix",
    "Task",
    "adam_preconditioner",
    "block_diagonal",
    "inverse",
    "layer_report",
    "load_task",
    "load_weights",
    "preconditioned",
    "submatrix",
    "top_eigenpairs",
]
