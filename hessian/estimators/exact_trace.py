r"""Traces of diagonal Hessian blocks without sampling, where the network's structure allows it.

Where the outputs f are piecewise linear in a parameter tensor, its block is J^T A J with J the Jacobian of the outputs and
A the loss's second derivative in them. With A_n = sum_c s_nc v_nc v_nc^T / |s_nc| (signs s) for each example n,

.. math:: \mathrm{tr}(J^\top A J) = \sum_n \sum_c \mathrm{sign}_{nc} \, \|J_n^\top v_{nc}\|^2,

one backward pass to the layers' outputs for each c, and per-example gradient norms there.
"""

import copy
from collections.abc import Mapping

import torch
from torch import nn
from torch.autograd.graph import GradientEdge

from hessian.estimators.per_example import is_supported, squared_gradient_norms
from hessian.objective import Objective, map_tensors
from hessian.structure import WeightUse, certify

MAX_OUTPUTS = 64  # above, one backward for each output costs more than sampling
_GRADIENT_BYTES = 512 * 2**20  # output gradients kept at a time


class NotExactError(Exception):
    """No parameter's trace is exact on this batch; the text says why."""


def batch_traces(
    objective: Objective, batch: object, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, float], dict[str, str]]:
    """Traces of the parameters' blocks for one batch's loss, and the reasons for those that have no exact one."""
    outputs = objective.outputs(batch)
    if not isinstance(outputs, torch.Tensor) or outputs.dim() < 2:
        raise NotExactError("the model's output is not one (N, ...) tensor")
    num_examples = outputs.shape[0]
    if outputs[0].numel() > MAX_OUTPUTS:
        raise NotExactError(f"there are {outputs[0].numel()} outputs an example, more than {MAX_OUTPUTS}")
    traces: dict[str, float] = {}
    reasons: dict[str, str] = {}
    uses: dict[str, WeightUse] = {}
    for name, certificate in certify(outputs, parameters).items():
        if certificate.reason and certificate.use is None and certificate.piecewise_linear and "depend" in certificate.reason:
            traces[name] = 0.0
        elif certificate.reason:
            reasons[name] = certificate.reason
        elif certificate.use is None or not is_supported(certificate.use):
            where = certificate.use.operation if certificate.use else "an unknown operation"
            reasons[name] = f"per-example gradients are not read off {where}"
        else:
            uses[name] = certificate.use
    if not uses:
        return traces, reasons
    cotangents, signs = _cotangents(objective, outputs, batch)
    edges = {use.node: GradientEdge(use.node, 0) for use in uses.values()}
    _check_independence(outputs, list(edges.values()), num_examples)
    totals = dict.fromkeys(uses, 0.0)
    start = 0
    block = 1  # until the first backward has told how large the gradients are
    while start < len(cotangents):
        gradients = [
            torch.autograd.grad(outputs, list(edges.values()), grad_outputs=cotangent, retain_graph=True)
            for cotangent in cotangents[start : start + block]
        ]
        by_node = dict(zip(edges, zip(*gradients, strict=True), strict=True))
        for name, use in uses.items():
            norms = squared_gradient_norms(use, parameters[name], by_node[use.node], num_examples)
            totals[name] += float((norms * signs[start : start + block]).sum())
        start += block
        size = sum(gradient.numel() * gradient.element_size() for gradient in gradients[0])
        block = max(1, _GRADIENT_BYTES // size)
    return traces | totals, reasons


def _cotangents(objective: Objective, outputs: torch.Tensor, batch: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled eigenvectors of the loss's output Hessian, example by example: (C, *outputs.shape), and signs (C, N)."""
    leaf, loss = _loss_in_double(objective, outputs, batch)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    width = leaf[0].numel()
    if not gradient.requires_grad:  # a loss that is linear in the outputs has no curvature in them
        return outputs.new_zeros((0, *outputs.shape)), outputs.new_zeros((0, len(outputs)))

    def product(direction: torch.Tensor) -> torch.Tensor:
        (row,) = torch.autograd.grad(gradient, leaf, grad_outputs=direction.view_as(leaf), retain_graph=True)
        return row.flatten(1)

    unit = torch.eye(width, dtype=leaf.dtype, device=leaf.device)
    blocks = torch.stack([product(unit[column].expand(len(leaf), width)) for column in range(width)], dim=2)
    probe = torch.randn(len(leaf), width, generator=_check_generator()).to(leaf)
    expected = torch.einsum("nij,nj->ni", blocks, probe)
    if not torch.allclose(product(probe), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
        raise NotExactError("the loss of one example depends on other examples' outputs")
    values, vectors = torch.linalg.eigh(blocks)
    kept = values.abs().amax(0) > 1e-12 * values.abs().max()
    scaled = (vectors * values.abs().sqrt().unsqueeze(1))[:, :, kept]  # (N, width, C)
    return scaled.permute(2, 0, 1).reshape(-1, *outputs.shape).to(outputs.dtype), values[:, kept].sign().T


def _loss_in_double(objective: Objective, outputs: torch.Tensor, batch: object) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of the outputs and the loss of it, in float64 if the loss works there.

    Near a minimum the second derivatives are differences of nearly equal numbers (p - p^2 with p close to 1).
    """
    loss = copy.deepcopy(objective.loss).double() if isinstance(objective.loss, nn.Module) else objective.loss
    in_double = Objective(objective.model, loss, objective.data, forward=objective.forward, items=objective.items)
    leaf = outputs.detach().double().requires_grad_(True)
    try:
        return leaf, in_double.batch_loss(leaf, map_tensors(_to_double, batch))
    except RuntimeError:  # a loss that holds on to tensors of another precision
        leaf = outputs.detach().requires_grad_(True)
        return leaf, objective.batch_loss(leaf, batch)


def _to_double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _check_independence(outputs: torch.Tensor, edges: list[GradientEdge], num_examples: int) -> None:
    """Raise unless an example's outputs depend on that example's rows alone, at every edge.

    The gradients of a random half of the examples must vanish, exactly, in the rows of the other half.
    """
    half = torch.randperm(num_examples, generator=_check_generator())[: num_examples // 2].to(outputs.device)
    mask = torch.zeros(num_examples, dtype=torch.bool, device=outputs.device)
    mask[half] = True
    cotangent = torch.randn(outputs.shape, generator=_check_generator()).to(outputs)
    cotangent[~mask] = 0
    for gradient in torch.autograd.grad(outputs, edges, grad_outputs=cotangent, retain_graph=True):
        if gradient.shape[0] % num_examples:
            raise NotExactError(f"a layer sees {gradient.shape[0]} rows for {num_examples} examples")
        if gradient.unflatten(0, (num_examples, -1))[~mask].any():
            raise NotExactError("the outputs of one example depend on other examples")


def _check_generator() -> torch.Generator:
    """Randomness for checks, whose outcome reaches no result: it must not advance anybody's generator."""
    return torch.Generator().manual_seed(0)
