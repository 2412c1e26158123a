r"""Traces of diagonal Hessian blocks without sampling, where the network's structure allows it.

Where the outputs f are piecewise linear in a parameter tensor, its block is J^T A J with J the Jacobian of the outputs and
A the loss's second derivative in them. With A_n = sum_c s_nc v_nc v_nc^T (signs s) for each example n,

.. math:: \mathrm{tr}(J^\top A J) = \sum_n \sum_c s_{nc} \, \|J_n^\top v_{nc}\|^2,

one backward pass to the layers' outputs for each c, and per-example gradient norms there. What this takes for granted is
checked on every batch: the loss sees the parameters through the outputs only, examples do not mix, nothing is drawn at random.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import GradientEdge
from tqdm.auto import tqdm

from hessian.estimators.example_rows import mixing_nodes
from hessian.estimators.per_example import is_supported, squared_gradient_norms
from hessian.objective import Objective
from hessian.operators.base import NotExactError
from hessian.output_curvature import OutputCurvatureError, output_curvature_factors
from hessian.output_loss import loss_in_double
from hessian.structure import WeightUse, certify, reachable_parameters

MAX_OUTPUTS = 64  # above, one backward for each output costs more than sampling
_GRADIENT_BYTES = 512 * 2**20  # output gradients kept at a time


@dataclass(frozen=True)
class ExactTraces:
    """traces: by parameter. reasons: why each of the others has none. many_outputs: those of them whose block is proven to
    be J^T A J, with more outputs than a backward pass for each is worth: drawn labels estimate it."""

    traces: dict[str, float]
    reasons: dict[str, str]
    many_outputs: list[str]


def exact_traces(
    objective: Objective, parameters: Mapping[str, nn.Parameter], *, gauss_newton: bool = False, progress: bool = False
) -> ExactTraces:
    """Traces of the parameters' diagonal blocks over the data set.

    Of the Hessian, which takes outputs that are piecewise linear in the parameter; or of the Gauss-Newton matrix, which does
    not. Call it where the parameters require gradients, inside `Objective.undisturbed`.
    """
    parts = objective.gathered(lambda: _own_traces(objective, parameters, gauss_newton=gauss_newton, progress=progress))
    reasons: dict[str, str] = {}
    for part in parts:
        reasons |= {name: reason for name, reason in part.reasons.items() if name not in part.many_outputs}
    drawable = list(dict.fromkeys(name for part in parts for name in part.many_outputs if name not in reasons))
    reasons |= dict.fromkeys(drawable, f"there are more than {MAX_OUTPUTS} outputs an example")
    traces = {name: sum(part.traces[name] for part in parts) for name in parameters if name not in reasons}
    return ExactTraces(traces, reasons, drawable)


def _own_traces(
    objective: Objective, parameters: Mapping[str, nn.Parameter], *, gauss_newton: bool, progress: bool
) -> ExactTraces:
    """The part of this process's data."""
    traces = dict.fromkeys(parameters, 0.0)
    reasons: dict[str, str] = {}
    many = dict.fromkeys(parameters, False)
    for batch, weight in tqdm(objective.own_batches(), desc="traces", unit="batch", disable=not progress):
        left = {name: parameter for name, parameter in parameters.items() if name not in reasons}
        try:
            found = _batch_traces(objective, batch, left, gauss_newton=gauss_newton)
        except NotExactError as error:
            return ExactTraces({}, dict.fromkeys(parameters, str(error)), [])
        for name, trace in found.traces.items():
            traces[name] += weight * trace
        many |= dict.fromkeys(found.many_outputs, True)
        reasons |= {name: reason for name, reason in found.reasons.items() if name not in found.many_outputs}
        if len(reasons) == len(parameters):
            break
    drawable = [name for name, is_one in many.items() if is_one and name not in reasons]
    return ExactTraces({name: trace for name, trace in traces.items() if name not in reasons}, reasons, drawable)


def _batch_traces(
    objective: Objective, batch: object, parameters: Mapping[str, nn.Parameter], *, gauss_newton: bool
) -> ExactTraces:
    """Traces of the parameters' blocks for one batch's loss.

    NotExactError where there is none for any parameter.
    """
    state = torch.get_rng_state()
    outputs = objective.outputs(batch)
    if not isinstance(outputs, torch.Tensor) or outputs.dim() < 1:
        raise NotExactError("the model's output is not one tensor, examples first")
    if not outputs.requires_grad:
        raise NotExactError("autograd has not followed the forward pass: it runs under no_grad")
    if not len(outputs):
        return ExactTraces(dict.fromkeys(parameters, 0.0), {}, [])
    (leaf,), loss = loss_in_double(objective, outputs, batch)
    with torch.no_grad():
        again = objective.outputs(batch)
    if not torch.equal(torch.get_rng_state(), state) or not torch.allclose(again, outputs, rtol=1e-3, equal_nan=True):
        raise NotExactError("the forward pass or the loss draws random numbers")
    traces: dict[str, float] = {}
    uses: dict[str, WeightUse] = {}
    reasons = dict.fromkeys(reachable_parameters(loss, parameters), "the loss depends on it directly")
    for name, certificate in certify(outputs, parameters).items():
        if name in reasons:
            continue
        if certificate.absent:
            traces[name] = 0.0
        elif certificate.use is None or (certificate.reason and not gauss_newton):
            reasons[name] = certificate.reason
        elif not is_supported(certificate.use, parameters[name]):
            reasons[name] = f"per-example gradients are not read off {certificate.use.operation}"
        else:
            uses[name] = certificate.use
    if not uses:
        return ExactTraces(traces, reasons, [])
    many_outputs = outputs[0].numel() > MAX_OUTPUTS
    if not many_outputs:
        try:
            cotangents, signs = output_curvature_factors(leaf, loss, outputs)
        except OutputCurvatureError as error:
            raise NotExactError(str(error)) from error
    edges = [GradientEdge(node, 0) for node in {use.node: None for use in uses.values()}]
    mixing = mixing_nodes(outputs, edges)
    reasons |= {name: mixing[use.node] for name, use in uses.items() if use.node in mixing}
    uses = {name: use for name, use in uses.items() if use.node not in mixing}
    if many_outputs:
        return ExactTraces(traces, reasons, list(uses))
    if uses:
        edges = [edge for edge in edges if edge.node not in mixing]
        traces |= _traces(outputs, cotangents, signs, edges, uses, parameters)
    return ExactTraces(traces, reasons, [])


def _traces(
    outputs: torch.Tensor,
    cotangents: torch.Tensor,
    signs: torch.Tensor,
    edges: list[GradientEdge],
    uses: Mapping[str, WeightUse],
    parameters: Mapping[str, nn.Parameter],
) -> dict[str, float]:
    """The sum over cotangents and examples of signed squared gradient norms, for each parameter."""
    totals = dict.fromkeys(uses, 0.0)
    start = 0
    block = 1  # until the first backward has told how large the gradients are
    while start < len(cotangents):
        gradients = [
            torch.autograd.grad(outputs, edges, grad_outputs=cotangent, retain_graph=True)
            for cotangent in cotangents[start : start + block]
        ]
        by_node = {edge.node: parts for edge, parts in zip(edges, zip(*gradients, strict=True), strict=True)}
        for name, use in uses.items():
            norms = squared_gradient_norms(use, parameters[name], by_node[use.node], len(outputs))
            totals[name] += float((norms * signs[start : start + block]).sum())
        start += block
        size = sum(gradient.numel() * gradient.element_size() for gradient in gradients[0])
        block = max(1, _GRADIENT_BYTES // size)
    return totals
