r"""The rounding error weighed by the diagonal of the empirical Fisher matrix, weight by weight.

.. math:: \Omega_i(b) = \sum_{j \in i} F_{jj} \, (Q_b(W_i) - W_i)_j^2, \qquad
          F_{jj} = \sum_n s_n \Big( \frac{\partial \ell_n}{\partial w_j} \Big)^2

over the items n of the data with their shares s_n of the loss (Li et al. 2021, BRECQ, equation 10; Kim et al. 2024, SqueezeLLM,
equation 3). It stands in for the Hessian where the loss is the negative logarithm of the targets' probability.
"""

from collections.abc import Mapping

import torch
from torch import nn

from hawq.graph import Layer
from hawq.sensitivity.rounded import RoundingError, RoundingErrors
from hawq.sensitivity.table import SensitivityTable
from hessian.estimators.diagonal import diagonal
from hessian.estimators.exact_diagonal import gauss_newton_diagonal
from hessian.objective import Objective
from hessian.operators.base import NotExactError
from hessian.operators.fisher import Fisher
from hessian.parameters import unflatten
from hessian.torch_losses import is_classification


def fisher_diagonals(
    objective: Objective,
    layers: Mapping[str, Layer],
    *,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """F_jj of each layer's weight and its standard error, shaped like the weight.

    From per-example gradients where the graph shows them; elsewhere sampled by products with the matrix.
    """
    names = [layer.weight for layer in layers.values()]
    named = dict(objective.model.named_parameters())
    weights: dict[str, nn.Parameter] = {name: named[name] for name in names}
    try:
        exact = gauss_newton_diagonal(objective, weights, "empirical")
        return {name: (exact[layer.weight], torch.zeros_like(exact[layer.weight])) for name, layer in layers.items()}
    except NotExactError:
        operator = Fisher(objective, params=names)
        sampled = diagonal(operator, generator=generator, progress=progress)
    like = list(operator.parameters.values())
    parts = zip(operator.parameters, unflatten(sampled.value, like), unflatten(sampled.stderr, like), strict=True)
    found = {name: (value.clamp(min=0), stderr) for name, value, stderr in parts}
    return {name: found[layer.weight] for name, layer in layers.items()}


def fisher(
    layers: Mapping[str, Layer],
    errors: RoundingErrors,
    diagonals: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    loss: object,
) -> SensitivityTable:
    """The table; the standard error takes those of a weight's entries to be fully correlated: a bound."""
    omega = {name: _weighed(diagonals[name][0], errors[name]) for name in layers}
    stderr = {name: _weighed(diagonals[name][1], errors[name]) for name in layers}
    return SensitivityTable(omega, stderr, "fisher", predicts=0.5 if is_classification(loss) else None)  # type: ignore[arg-type]


def _weighed(entries: torch.Tensor, errors: Mapping[int, RoundingError]) -> dict[int, float]:
    return {bits: float((entries.double() * error.weight.double().square()).sum()) for bits, error in errors.items()}
