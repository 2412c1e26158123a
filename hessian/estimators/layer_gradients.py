"""Gradients at the outputs of layers, for a loss's curvature: what per-example gradients of parameters are read off.

What this takes for granted is checked on every batch: the loss sees the parameters through the outputs only, each parameter
enters one operation, whose rows belong to one example each.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, Node

from hessian.draws import ExampleDraws
from hessian.estimators.example_rows import mixing_nodes
from hessian.estimators.per_example import is_supported
from hessian.objective import Objective
from hessian.output_curvature import Kind, output_cotangents
from hessian.output_loss import loss_in_double
from hessian.structure import Certificate, WeightUse, certify, reachable_parameters

_GRADIENT_BYTES = 256 * 2**20  # output gradients kept at a time


@dataclass(frozen=True)
class LayerGradients:
    """What one batch brings for some of its cotangents.

    uses: where each parameter enters; those that the outputs do not depend on are left out. gradients: for each cotangent
    the gradient at the output of a use's node. counted: (N,), the examples with a cotangent other than zero. weight: the
    batch's share of the data. is_first: whether these are the batch's first cotangents. outputs_square: of the batch's
    outputs, the sum of squares; zero but for its first cotangents.
    """

    uses: Mapping[str, WeightUse]
    gradients: Mapping[Node, Sequence[torch.Tensor]]
    counted: torch.Tensor
    weight: float
    is_first: bool
    outputs_square: float


def layer_gradients(
    objective: Objective, parameters: Mapping[str, nn.Parameter], kind: Kind, seed: int, *, draws: int = 1, own: bool = False
) -> Iterator[LayerGradients]:
    """One pass over the data, batch by batch and as many cotangents (see `output_cotangents`) at a time as memory allows.

    `draws`: how often to draw cotangents for each batch, where they are drawn. `own`: over this process's part of the data,
    which the caller adds up; elsewhere that must be all. ValueError if a parameter's per-example gradients cannot be read,
    naming it and the reason.
    """
    for batch, weight in objective.own_batches() if own else objective.weighted_batches():
        yield from _of_batch(objective, parameters, kind, batch, weight, seed, draws)


def unreadable(objective: Objective, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """The parameters whose per-example gradients cannot be read off the first batch's graph, and why."""
    found: dict[str, str] = {}
    for reasons in objective.gathered(lambda: _unreadable(objective, parameters)):
        found |= reasons
    return found


def _unreadable(objective: Objective, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    batch, _ = next(iter(objective.own_batches()), (None, 0.0))
    if batch is None:
        return {}
    outputs = objective.outputs(batch)
    if not isinstance(outputs, torch.Tensor) or outputs.dim() < 1 or not outputs.requires_grad:
        return dict.fromkeys(parameters, "the model's output is not one tensor, examples first, that depends on it")
    _, loss = loss_in_double(objective, outputs, batch)
    return _uses(outputs, loss, parameters)[1]


def _of_batch(
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    kind: Kind,
    batch: Any,
    weight: float,
    seed: int,
    draws: int,
) -> Iterator[LayerGradients]:
    outputs = objective.outputs(batch)
    if not isinstance(outputs, torch.Tensor) or outputs.dim() < 1:
        raise ValueError("the model's output is not one tensor, examples first: return that from Objective's `forward`")
    if not outputs.requires_grad:
        raise ValueError("the outputs depend on no selected parameter: forward detaches them or uses no_grad")
    if not len(outputs):
        return
    (leaf,), loss = loss_in_double(objective, outputs, batch)
    uses, reasons = _uses(outputs, loss, parameters)
    if reasons:
        raise ValueError(_refusal(reasons, [name for name in parameters if name not in reasons]))
    own = ExampleDraws(batch, seed)
    drawn = [output_cotangents(kind, objective, batch, outputs, leaf, loss, own) for _ in range(draws)]
    cotangents = drawn[0] if draws == 1 else torch.cat(drawn)
    if not uses or not len(cotangents):
        return
    counted = (cotangents.reshape(*cotangents.shape[:2], -1) != 0).any(2).any(0)
    edges = _edges(uses)
    square = float(outputs.detach().square().sum(dtype=torch.float64))
    start, block = 0, 1  # until the first backward has told how large the gradients are
    while start < len(cotangents):
        gradients = [
            torch.autograd.grad(outputs, edges, grad_outputs=cotangent, retain_graph=True)
            for cotangent in cotangents[start : start + block]
        ]
        by_node = {edge.node: parts for edge, parts in zip(edges, zip(*gradients, strict=True), strict=True)}
        yield LayerGradients(uses, by_node, counted, weight, start == 0, square if start == 0 else 0.0)
        start += block
        block = max(1, _GRADIENT_BYTES // sum(gradient.numel() * gradient.element_size() for gradient in gradients[0]))


def _edges(uses: Mapping[str, WeightUse]) -> list[GradientEdge]:
    return [GradientEdge(node, 0) for node in dict.fromkeys(use.node for use in uses.values())]


def _uses(
    outputs: torch.Tensor, loss: torch.Tensor, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, WeightUse], dict[str, str]]:
    """Where each parameter that the outputs depend on enters, and the reason for those whose gradients cannot be read there."""
    direct = set(reachable_parameters(loss, parameters))
    reasons: dict[str, str] = {}
    uses: dict[str, WeightUse] = {}
    for name, certificate in certify(outputs, parameters).items():
        reason = "the loss depends on it directly" if name in direct else _why_unreadable(certificate, parameters[name])
        if reason:
            reasons[name] = reason
        elif certificate.use is not None:
            uses[name] = certificate.use
    if uses:
        mixing = mixing_nodes(outputs, _edges(uses))
        reasons |= {name: mixing[use.node] for name, use in uses.items() if use.node in mixing}
    return {name: use for name, use in uses.items() if name not in reasons}, reasons


def _why_unreadable(certificate: Certificate, parameter: nn.Parameter) -> str:
    """Empty where per-example gradients of the parameter can be read, or are zero."""
    use = certificate.use
    if certificate.absent:
        return ""
    if use is None:
        return f"the autograd graph shows no one operation that it enters; {certificate.reason}"
    if not is_supported(use, parameter):
        return f"they are not read off {use.operation}"
    if use.operation == "NativeBatchNorm" and use.node._saved_training:  # type: ignore[attr-defined]
        return "a batch norm in training mode mixes examples: call model.eval()"
    return ""


def _refusal(reasons: Mapping[str, str], left: Sequence[str]) -> str:
    """Parameters by reason, and what to select instead."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    listed = [
        ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "") + f" ({reason})"
        for reason, names in by_reason.items()
    ]
    if not left:
        advice = "no other parameter is selected"
    elif len(left) > 8:
        advice = f"leave them out, by choosing among the other {len(left)} with params= (names or globs)"
    else:
        advice = f"leave them out: params={list(left)}"
    return f"per-example gradients cannot be read for {'; '.join(listed)}. To go on, {advice}"
