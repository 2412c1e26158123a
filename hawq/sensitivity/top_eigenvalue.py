r"""HAWQ-V1: the largest eigenvalue of a layer's Hessian block (Dong et al. 2019, section 3.3).

.. math:: S_i = \lambda_i / n_i, \qquad \Omega_i(b) = S_i \, \|Q_b(W_i) - W_i\|_2^2

S orders the layers by the precision that they need. The paper turns that order into widths by hand; Omega makes it a table.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from hawq.graph import Layer
from hawq.sensitivity.table import Errors, SensitivityTable
from hessian.estimators.eigenpairs import top_eigenpairs
from hessian.objective import Objective
from hessian.operators.hessian import Hessian


@dataclass(frozen=True)
class TopEigenvalue:
    """The largest eigenvalue of a Hessian block, one of which lies within `residual` of `value`."""

    value: float
    residual: float


def top_eigenvalues(
    objective: Objective,
    layers: Mapping[str, Layer],
    *,
    tol: float = 0.01,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> dict[str, TopEigenvalue]:
    """The largest eigenvalue of the Hessian in each layer's weight, to a residual of `tol` times it.

    The eigenvalue's own error is of the order of the residual's square: a hundredth is enough to compare layers by.
    """
    operator = Hessian(objective, params=[layer.weight for layer in layers.values()])
    values = {}
    for name, layer in tqdm(layers.items(), desc="top eigenvalues", unit="layer", disable=not progress):
        block = operator.block(layer.weight)
        start = block.space.random(1, "normal", generator).T  # one start: copies of the largest do not matter here
        pairs = top_eigenpairs(block, tol=tol, start=start)
        values[name] = TopEigenvalue(float(pairs.values[0]), float(pairs.residuals[0]))
    return values


def top_eigenvalue(layers: Mapping[str, Layer], errors: Errors, eigenvalues: Mapping[str, TopEigenvalue]) -> SensitivityTable:
    """The table; `stderr` is the eigenvalue's residual in the same units, a bound. An eigenvalue below that counts as it."""
    omega, stderr = {}, {}
    for name, layer in layers.items():
        top = eigenvalues[name]
        mean = max(top.value, top.residual) / layer.num_params
        omega[name] = {bits: mean * error for bits, error in errors[name].items()}
        stderr[name] = {bits: top.residual / layer.num_params * error for bits, error in errors[name].items()}
    return SensitivityTable(omega, stderr, "top-eigenvalue")


def precision_order(layers: Mapping[str, Layer], eigenvalues: Mapping[str, TopEigenvalue]) -> list[str]:
    """Layers by S_i, descending: the first need the most bits."""
    return sorted(layers, key=lambda name: -eigenvalues[name].value / layers[name].num_params)


def finetuning_order(errors: Errors, eigenvalues: Mapping[str, TopEigenvalue], bits: Mapping[str, int]) -> list[str]:
    """Layers by lambda_i |Q(W_i) - W_i|^2 at their widths `bits`, descending: the order in which HAWQ-V1 fine-tunes them."""
    return sorted(bits, key=lambda name: -eigenvalues[name].value * errors[name][bits[name]])
