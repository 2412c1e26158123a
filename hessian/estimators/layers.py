"""The curvature of every parameter tensor of a model."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import nn
from tqdm.auto import tqdm

from hessian.estimators.eigenpairs import top_eigenpairs
from hessian.estimators.exact_diagonal import gauss_newton_diagonal
from hessian.estimators.exact_trace import ExactTraces, exact_traces
from hessian.estimators.layer_sampling import sampled_rows
from hessian.estimators.sampled_trace import sampled_gauss_newton_traces
from hessian.objective import Data, LossFunction, Objective
from hessian.operators.curvature import as_objective
from hessian.operators.hessian import Hessian
from hessian.parameters import Selection, requiring_grad, select_parameters
from hessian.results import LayerReport, LayerRow


def layer_report(
    model: nn.Module | Objective,
    loss: LossFunction | None = None,
    data: Data | None = None,
    params: Selection = None,
    *,
    eigenvalues: bool = False,
    channels: bool = False,
    method: Literal["auto", "exact", "hutchinson"] = "auto",
    rtol: float = 0.05,
    max_probes: int = 256,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> LayerReport:
    r"""Traces of the diagonal Hessian blocks, one for each selected parameter tensor; with `eigenvalues`, their top ones too.

    `auto` computes a trace exactly where the autograd graph proves that the outputs are piecewise linear in the
    parameter (see `hessian.structure`). The others are sampled by Rademacher probes z, until every standard error is at most
    `rtol` times its trace or `max_probes` probes are spent: :math:`z_l \cdot (H z)_l`, or, where that spreads less for its
    cost, the Gauss-Newton matrix's trace, exact or from drawn labels, plus :math:`z_l \cdot ((H - G) z)_l`. `exact` raises
    ValueError, naming the first parameter that has no exact trace and why; `hutchinson` samples H for all.

    `eigenvalues`: the largest eigenvalue of each block, to a residual of 1e-3 of it, by some ten products a block.
    `channels`: the trace's parts for each index of the tensor's first dimension.

    >>> import torch, hessian
    >>> model, batch = torch.nn.Linear(2, 1), (torch.eye(2), torch.zeros(2, 1))
    >>> {name: (row.trace, row.exact) for name, row in hessian.layer_report(model, torch.nn.MSELoss(), batch).items()}
    {'weight': (2.0, True), 'bias': (2.0, True)}
    """
    if method not in ("auto", "exact", "hutchinson"):
        raise ValueError(f"method {method!r} is none of 'auto', 'exact', 'hutchinson'")
    if max_probes < 2 or not rtol >= 0:
        raise ValueError(f"max_probes={max_probes} and rtol={rtol}: give at least 2 probes and a tolerance of at least 0")
    objective = as_objective(model, loss, data)
    parameters = select_parameters(objective.model, params)
    if method == "hutchinson":
        exact = ExactTraces({}, dict.fromkeys(parameters, "sampling was asked for"), [])
    else:
        with requiring_grad(parameters), objective.undisturbed():
            exact = exact_traces(objective, parameters, progress=progress)
    traces, reasons = exact.traces, dict(exact.reasons)
    if method == "exact" and reasons:
        name, reason = next(iter(reasons.items()))
        raise ValueError(f"the trace of {name!r} is not exact: {reason}; use method='auto' to sample it")
    rows = {name: LayerRow(trace, 0.0, True, parameters[name].numel()) for name, trace in traces.items()}
    if channels and traces:
        rows |= _with_channels(objective, {name: parameters[name] for name in traces}, rows)
    if exact.many_outputs and not channels:
        drawn = _with_drawn_labels(objective, {name: parameters[name] for name in exact.many_outputs}, reasons, rtol, generator)
        rows |= drawn
        reasons = {name: reason for name, reason in reasons.items() if name not in drawn}
    num_matvecs = 0
    operator = Hessian(objective, params=list(parameters))
    if reasons:
        sampled, num_matvecs = sampled_rows(
            operator.block(list(reasons)),
            reasons,
            rtol=rtol,
            max_probes=max_probes,
            with_gauss_newton=method == "auto",
            channels=channels,
            generator=generator,
            progress=progress,
        )
        rows |= sampled
    if eigenvalues:
        for name in tqdm(rows, desc="top eigenvalues", unit="tensor", disable=not progress):
            block = operator.block(name)
            start = block.space.random(1, "normal", generator).T  # one start: copies of the largest do not matter here
            pairs = top_eigenpairs(block, start=start)
            num_matvecs += pairs.num_matvecs
            rows[name] = replace(rows[name], top_eigenvalue=float(pairs.values[0]), residual=float(pairs.residuals[0]))
    return LayerReport({name: rows[name] for name in parameters}, num_matvecs)


def _with_drawn_labels(
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    reasons: Mapping[str, str],
    rtol: float,
    generator: torch.Generator | None,
) -> dict[str, LayerRow]:
    """Rows of parameters whose blocks are the Gauss-Newton matrix's; none where the loss gives nothing to draw from."""
    traces, stderrs = sampled_gauss_newton_traces(objective, parameters, rtol, generator)
    return {
        name: LayerRow(trace, stderrs[name], False, parameters[name].numel(), stderrs[name] <= rtol * trace, reasons[name])
        for name, trace in traces.items()
    }


def _with_channels(
    objective: Objective, parameters: Mapping[str, nn.Parameter], rows: Mapping[str, LayerRow]
) -> dict[str, LayerRow]:
    """Exact rows with their traces divided among channels, from the Gauss-Newton diagonal, which is theirs."""
    diagonal = gauss_newton_diagonal(objective, parameters)
    parts = {name: tensor.double().reshape(len(tensor) if tensor.dim() else 1, -1).sum(1) for name, tensor in diagonal.items()}
    return {
        name: replace(rows[name], channel_traces=part.tolist(), channel_stderrs=[0.0] * len(part))
        for name, part in parts.items()
    }
