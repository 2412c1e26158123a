"""What is the curvature of this loss? Tasks, objectives, curvature operators, and what one asks of them."""

from hessian import landscape
from hessian.estimators.activations import activation_report
from hessian.estimators.density import SpectralDensity, spectral_density
from hessian.estimators.diagonal import Diagonal, diagonal
from hessian.estimators.eigenpairs import Eigenpairs, top_eigenpairs
from hessian.estimators.layers import layer_report
from hessian.estimators.spectrum import Spectrum, spectrum
from hessian.estimators.trace import Trace, trace
from hessian.loss_model import PredictedIncrease, predict_increase
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
from hessian.sharpness import Sharpness, SharpnessTracker
from hessian.task import Task, load_task, load_weights
from hessian.verification import Check, Verification, verify

__all__ = [
    "EKFAC",
    "KFAC",
    "BlockDiagonal",
    "Check",
    "Dense",
    "Diagonal",
    "Eigenpairs",
    "Fisher",
    "GaussNewton",
    "Hessian",
    "LayerReport",
    "LayerRow",
    "LinearOperator",
    "LowRankPlusShift",
    "Objective",
    "PredictedIncrease",
    "Sharpness",
    "SharpnessTracker",
    "SpectralDensity",
    "Spectrum",
    "Submatrix",
    "Task",
    "Trace",
    "Verification",
    "activation_report",
    "adam_preconditioner",
    "block_diagonal",
    "diagonal",
    "inverse",
    "landscape",
    "layer_report",
    "load_task",
    "load_weights",
    "preconditioned",
    "predict_increase",
    "spectral_density",
    "spectrum",
    "submatrix",
    "top_eigenpairs",
    "trace",
    "verify",
]
