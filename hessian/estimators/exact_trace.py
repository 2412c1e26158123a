r"""Traces of diagonal Hessian blocks without sampling, where the network's structure allows it.

Where the outputs f are piecewise linear in a parameter tensor, its block is J^T A J with J the Jacobian of the outputs and
A the loss's second derivative in them. With A_n = sum_c s_nc v_nc v_nc^T (signs s) for each example n,

.. math:: \mathrm{tr}(J^\top A J) = \sum_n \sum_c s_{nc} \, \|J_n^\top v_{nc}\|^2,

one backward pass to the layers' outputs for each c, and per-example gradient norms there. What this takes for granted is
checked on every batch: the loss sees the parameters through the outputs only, examples do not mix, nothing is drawn at random.
"""

import copy
from collections.abc import Mapping

import torch
from torch import nn
from torch.autograd.graph import GradientEdge

from hessian.estimators.per_example import is_supported, squared_gradient_norms
from hessian.objective import Objective, map_tensors
from hessian.structure import WeightUse, certify, reachable_parameters

MAX_OUTPUTS = 64  # above, one backward for each output costs more than sampling
_GRADIENT_BYTES = 512 * 2**20  # output gradients kept at a time
_SCALES = 32  # powers of two that tell examples apart, of which a float32 holds more


class NotExactError(Exception):
    """No parameter's trace is exact on this batch; the text says why."""


def batch_traces(
    objective: Objective, batch: object, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, float], dict[str, str]]:
    """Traces of the parameters' blocks for one batch's loss, and the reasons for those that have no exact one."""
    state = torch.get_rng_state()
    outputs = objective.outputs(batch)
    if not isinstance(outputs, torch.Tensor) or outputs.dim() < 1:
        raise NotExactError("the model's output is not one tensor, examples first")
    if not outputs.requires_grad:
        raise NotExactError("autograd has not followed the forward pass: it runs under no_grad")
    if not len(outputs):
        return dict.fromkeys(parameters, 0.0), {}
    if outputs[0].numel() > MAX_OUTPUTS:
        raise NotExactError(f"there are {outputs[0].numel()} outputs an example, more than {MAX_OUTPUTS}")
    leaf, loss = _loss_in_double(objective, outputs, batch)
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
        elif certificate.use is None or certificate.reason:
            reasons[name] = certificate.reason
        elif not is_supported(certificate.use, parameters[name]):
            reasons[name] = f"per-example gradients are not read off {certificate.use.operation}"
        else:
            uses[name] = certificate.use
    if not uses:
        return traces, reasons
    cotangents, signs = _cotangents(leaf, loss, outputs)
    edges = [GradientEdge(node, 0) for node in {use.node: None for use in uses.values()}]
    mixing = _mixing_edges(outputs, edges)
    reasons |= {name: mixing[use.node] for name, use in uses.items() if use.node in mixing}
    uses = {name: use for name, use in uses.items() if use.node not in mixing}
    if uses:
        edges = [edge for edge in edges if edge.node not in mixing]
        traces |= _traces(outputs, cotangents, signs, edges, uses, parameters)
    return traces, reasons


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


def _cotangents(leaf: torch.Tensor, loss: torch.Tensor, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled eigenvectors of the loss's output Hessian, example by example: (C, *outputs.shape), and signs (C, N)."""
    nothing = outputs.new_zeros((0, *outputs.shape)), outputs.new_zeros((0, len(outputs)))
    if not loss.requires_grad:
        return nothing
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    if not gradient.requires_grad:  # a loss that is linear in the outputs has no curvature in them
        return nothing
    count, width = len(leaf), leaf[0].numel()

    def product(direction: torch.Tensor) -> torch.Tensor:
        (row,) = torch.autograd.grad(gradient, leaf, grad_outputs=direction.reshape(leaf.shape), retain_graph=True)
        return row.reshape(count, width)

    unit = torch.eye(width, dtype=leaf.dtype, device=leaf.device)
    blocks = torch.stack([product(unit[column].expand(count, width)) for column in range(width)], dim=2)
    if not torch.isfinite(blocks).all():
        raise NotExactError("the loss's second derivative in the outputs is not finite")
    probe = torch.randn(count, width, generator=_check_generator(), dtype=torch.float64).to(leaf)
    precision = 1e-9 if leaf.dtype == torch.float64 else 1e-3
    expected = torch.einsum("nij,nj->ni", blocks, probe)
    if not torch.allclose(product(probe), expected, rtol=precision, atol=precision * float(expected.abs().max())):
        raise NotExactError("the loss of one example depends on other examples' outputs, or is computed too coarsely to tell")
    values, vectors = torch.linalg.eigh(blocks)
    kept = values.abs().amax(0) > 1e-12 * values.abs().max()
    scaled = (vectors * values.abs().sqrt().unsqueeze(1))[:, :, kept]  # (N, width, C)
    return scaled.permute(2, 0, 1).reshape(-1, *outputs.shape).to(outputs.dtype), values[:, kept].sign().T


def _loss_in_double(objective: Objective, outputs: torch.Tensor, batch: object) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of the outputs and the loss of it, in float64 if the loss works there.

    Near a minimum the second derivatives are differences of nearly equal numbers (p - p^2 with p close to 1).
    """
    loss = objective.loss
    if type(loss).__module__ == "torch.nn.modules.loss":  # its own tensors, class weights, follow; others may hold the model
        loss = copy.deepcopy(objective.loss).double()  # type: ignore[attr-defined]
    in_double = Objective(objective.model, loss, objective.data, forward=objective.forward, items=objective.items)
    leaf = outputs.detach().double().requires_grad_(True)
    try:
        return leaf, in_double.batch_loss(leaf, map_tensors(_to_double, batch))
    except RuntimeError:  # a loss that holds on to tensors of another precision
        leaf = outputs.detach().requires_grad_(True)
        return leaf, objective.batch_loss(leaf, batch)


def _to_double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _mixing_edges(outputs: torch.Tensor, edges: list[GradientEdge]) -> dict[torch.autograd.graph.Node, str]:
    """The nodes whose rows do not belong to one example each, in order, and what is wrong with them.

    If an example's rows receive gradient from that example alone, then scaling each example's cotangent by a power of two
    scales its rows' gradients by the same, to the last bit. Every two examples get different powers in some round.
    """
    count = len(outputs)
    cotangent = torch.randn(outputs.shape, generator=_check_generator(), dtype=torch.float64).to(outputs)
    plain = torch.autograd.grad(outputs, edges, grad_outputs=cotangent, retain_graph=True)
    wrong = {
        edge.node: f"its layer sees {len(gradient)} rows for {count} examples"
        for edge, gradient in zip(edges, plain, strict=True)
        if gradient.shape[0] % count
    }
    digits = torch.arange(count, device=outputs.device)
    while bool(digits.any()):
        powers = torch.pow(2.0, digits % _SCALES).to(outputs)
        digits = digits // _SCALES
        scaled = torch.autograd.grad(outputs, edges, grad_outputs=cotangent * _first(powers, cotangent), retain_graph=True)
        for edge, before, after in zip(edges, plain, scaled, strict=True):
            if edge.node not in wrong:
                rows = powers.repeat_interleave(before.shape[0] // count)
                if not torch.equal(after, before * _first(rows, before)):
                    wrong[edge.node] = "its layer's rows do not belong to one example each, in the order of the batch"
    return wrong


def _first(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(N,) values, shaped to multiply `like` along its first dimension."""
    return values.view(-1, *(1,) * (like.dim() - 1))


def _check_generator() -> torch.Generator:
    """Randomness for checks, whose outcome reaches no result: it must not advance anybody's generator."""
    return torch.Generator().manual_seed(0)
