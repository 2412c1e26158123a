"""The curvature of every parameter tensor of a model."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn
from tqdm.auto import tqdm

from hessian.estimators.exact_trace import NotExactError, batch_traces
from hessian.objective import Data, LossFunction, Objective
from hessian.operators.curvature import as_objective
from hessian.operators.hessian import Hessian
from hessian.parameters import Selection, requiring_grad, select_parameters
from hessian.results import LayerReport, LayerRow

_PROBES_AT_ONCE = 8
_MIN_PROBES = 32  # a standard error of fewer is too noisy to stop by


def layer_report(
    model: nn.Module | Objective,
    loss: LossFunction | None = None,
    data: Data | None = None,
    params: Selection = None,
    *,
    method: Literal["auto", "exact", "hutchinson"] = "auto",
    rtol: float = 0.05,
    max_probes: int = 256,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> LayerReport:
    """Traces of the diagonal Hessian blocks, one for each selected parameter tensor.

    `auto` computes a trace exactly where the autograd graph proves that the outputs are piecewise linear in the
    parameter (see `hessian.structure`), and samples the others: Hutchinson's estimator with Rademacher probes, until
    every standard error is at most `rtol` times its trace or `max_probes` products are spent. `exact` raises
    ValueError, naming the first parameter that has no exact trace and why; `hutchinson` samples all.
    """
    if method not in ("auto", "exact", "hutchinson"):
        raise ValueError(f"method {method!r} is none of 'auto', 'exact', 'hutchinson'")
    if max_probes < 2 or not rtol >= 0:
        raise ValueError(f"max_probes={max_probes} and rtol={rtol}: give at least 2 probes and a tolerance of at least 0")
    objective = as_objective(model, loss, data)
    parameters = select_parameters(objective.model, params)
    with requiring_grad(parameters):
        if method == "hutchinson":
            traces: dict[str, float] = {}
            reasons = dict.fromkeys(parameters, "sampling was asked for")
        else:
            with objective.undisturbed():
                traces, reasons = _exact_traces(objective, parameters, progress)
        if method == "exact" and reasons:
            name, reason = next(iter(reasons.items()))
            raise ValueError(f"the trace of {name!r} is not exact: {reason}; use method='auto' to sample it")
        rows = {name: LayerRow(trace, 0.0, True, parameters[name].numel()) for name, trace in traces.items()}
        num_matvecs = 0
        if reasons:
            sampled = Hessian(objective, params=list(reasons))
            means, errors, num_matvecs = _hutchinson_by_parameter(sampled, rtol, max_probes, generator, progress)
            for name, mean, error in zip(sampled.parameters, means.tolist(), errors.tolist(), strict=True):
                converged = error <= rtol * abs(mean)
                rows[name] = LayerRow(mean, error, False, parameters[name].numel(), converged, reasons[name])
    return LayerReport({name: rows[name] for name in parameters}, num_matvecs)


def _exact_traces(
    objective: Objective, parameters: Mapping[str, nn.Parameter], progress: bool
) -> tuple[dict[str, float], dict[str, str]]:
    """Traces over the data set, and for every parameter without an exact one the reason."""
    traces = dict.fromkeys(parameters, 0.0)
    reasons: dict[str, str] = {}
    for batch, weight in tqdm(objective.weighted_batches(), desc="traces", unit="batch", disable=not progress):
        try:
            left = {name: parameter for name, parameter in parameters.items() if name not in reasons}
            found, failed = batch_traces(objective, batch, left)
        except NotExactError as error:
            return {}, dict.fromkeys(parameters, str(error))
        for name, trace in found.items():
            traces[name] += weight * trace
        reasons |= failed
        if len(reasons) == len(parameters):
            break
    return {name: trace for name, trace in traces.items() if name not in reasons}, reasons


def _hutchinson_by_parameter(
    operator: Hessian, rtol: float, max_probes: int, generator: torch.Generator | None, progress: bool
) -> tuple[torch.Tensor, torch.Tensor, int]:
    r"""Means and standard errors over probes z of z_l . (H z)_l, an unbiased estimate of tr(H_ll) for each tensor l."""
    sizes = [parameter.numel() for parameter in operator.parameters.values()]
    samples: list[torch.Tensor] = []
    means = errors = torch.zeros(len(sizes), dtype=torch.float64)
    with tqdm(total=max_probes, desc="Hutchinson probes", unit="product", disable=not progress) as bar:
        while len(samples) < max_probes:
            count = min(_PROBES_AT_ONCE, max_probes - len(samples))
            shape = (operator.shape[0], count)
            probes = torch.randint(0, 2, shape, generator=generator).to(operator.device, operator.dtype) * 2 - 1
            products = (probes * (operator @ probes)).double().cpu()
            samples.extend(torch.stack([piece.sum(0) for piece in products.split(sizes)], dim=1))
            bar.update(count)
            means = torch.stack(samples).mean(0)
            errors = torch.stack(samples).std(0) / len(samples) ** 0.5
            if len(samples) >= min(_MIN_PROBES, max_probes) and bool((errors <= rtol * means.abs()).all()):
                break
    if not torch.isfinite(means).all():
        raise ValueError("the curvature is not finite: the loss has no second derivative here, or overflows")
    return means, errors, len(samples)
