r"""Traces of Gauss-Newton blocks for networks with many outputs: one backward pass a draw of labels, per-example norms.

With random cotangents u_n of examples n, :math:`E[u_n u_n^\top] = \nabla_f^2 \ell_n`, the trace of block l is the expectation
of :math:`\sum_n \|J_{nl}^\top u_n\|^2`. For a softmax cross-entropy u_n is the loss's gradient for a label drawn from the
model's own prediction, and spreads little where predictions are sure.
"""

from collections.abc import Mapping

import torch
from torch import nn

from hessian.estimators.layer_gradients import layer_gradients, unreadable
from hessian.estimators.per_example import squared_gradient_norms
from hessian.estimators.sampling import standard_error
from hessian.objective import Objective
from hessian.parameters import requiring_grad

_DRAWS = 8  # for each forward pass
_MOST_DRAWS = 256


def sampled_gauss_newton_traces(
    objective: Objective, parameters: Mapping[str, nn.Parameter], rtol: float, generator: torch.Generator | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Traces and their standard errors, for those of the parameters whose per-example gradients can be read.

    Ends at a relative standard error of `rtol`, looked at after 8, 16, 32 ... draws, or after 256.
    """
    with requiring_grad(parameters), objective.undisturbed():
        reasons = unreadable(objective, parameters)
    readable = {name: parameter for name, parameter in parameters.items() if name not in reasons}
    samples: dict[str, list[float]] = {name: [] for name in readable}
    look, drawn = _DRAWS, 0
    while readable:
        found = _draw(objective, readable, objective.seed(generator))
        if found is None:
            return {}, {}
        for name, values in found.items():
            samples[name] += values.tolist()
        drawn += _DRAWS
        if drawn < look:
            continue
        look *= 2
        means = {name: float(torch.tensor(values).mean()) for name, values in samples.items()}
        stderrs = {name: standard_error(torch.tensor(values, dtype=torch.float64)) for name, values in samples.items()}
        if drawn >= _MOST_DRAWS or all(stderrs[name] <= rtol * abs(means[name]) for name in means):
            return means, stderrs
    return {}, {}


def _draw(objective: Objective, parameters: Mapping[str, nn.Parameter], seed: int) -> dict[str, torch.Tensor] | None:
    """The sums of squared per-example gradients over the data set, for each of _DRAWS draws: (draws,). None where the loss of
    any part is not convex in the outputs, or has too many of these to draw from."""

    def own() -> dict[str, torch.Tensor] | None:
        try:
            return _own_draw(objective, parameters, seed)
        except ValueError:
            return None

    totals = {name: torch.zeros(_DRAWS, dtype=torch.float64) for name in parameters}
    for part in objective.gathered(own):
        if part is None:
            return None
        for name, values in part.items():
            totals[name] += values
    return totals


def _own_draw(objective: Objective, parameters: Mapping[str, nn.Parameter], seed: int) -> dict[str, torch.Tensor]:
    totals = {name: torch.zeros(_DRAWS, dtype=torch.float64) for name in parameters}
    with requiring_grad(parameters), objective.undisturbed():
        start = 0
        for part in layer_gradients(objective, parameters, "sampled", seed, draws=_DRAWS, own=True):
            start = 0 if part.is_first else start
            for name, use in part.uses.items():
                norms = squared_gradient_norms(use, parameters[name], part.gradients[use.node], len(part.counted))
                totals[name][start : start + len(norms)] += part.weight * norms.sum(1).cpu()
            start += len(next(iter(part.gradients.values())))
            del part
    return totals
