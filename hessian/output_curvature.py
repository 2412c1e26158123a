r"""The loss as a function of a network's outputs, one example at a time: its second derivative, factored into cotangents.

A Gauss-Newton or Fisher matrix is :math:`\sum_n J_n^\top A_n J_n`, with J_n the Jacobian of example n's outputs and A_n what
the loss brings. Written as :math:`A_n = \sum_c u_{nc} u_{nc}^\top`, each c takes one backward pass from cotangents u.
"""

import copy
import functools
import math
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

from hessian.draws import ExampleDraws
from hessian.item_losses import item_losses
from hessian.objective import LossFunction, Objective
from hessian.output_loss import leaf_copy

Kind = Literal["exact", "sampled", "empirical"]

_MAX_OUTPUTS = 1024  # above, the (outputs, outputs) matrices of a batch's examples outgrow the network's own tensors


class OutputCurvatureError(ValueError):
    """The loss's second derivative in the outputs is not one finite matrix for each example; the text says why."""


def output_cotangents(
    kind: Kind,
    objective: Objective,
    batch: object,
    outputs: torch.Tensor,
    leaf: torch.Tensor,
    loss: torch.Tensor,
    draws: ExampleDraws,
) -> torch.Tensor:
    r"""Cotangents u of one batch's examples, (C, \*outputs.shape); `leaf` and `loss` are `loss_in_double`'s.

    exact: the scaled eigenvectors of A_n, the loss's second derivative in example n's outputs; C is at most the number of
    outputs. sampled: one u with :math:`E[u u^\top] = A_n`: for a softmax cross-entropy
    :math:`\sqrt{s_n} (p_n - e_y)` with a label y drawn from p_n and s_n the example's share of the loss, for any other
    loss :math:`A_n^{1/2} z` with random signs z. empirical: :math:`\sqrt{s_i}\, \partial \ell_i / \partial f_n` for
    each of an example's items i (see `item_losses`): one, or as many as a cross-entropy has targets in an example.

    ValueError where the loss is not convex in the outputs, where outputs or targets of an example are too many (labels are
    drawn however many), or as `item_losses`; OutputCurvatureError.
    """
    if kind == "empirical":
        return _cotangents_of_item_losses(objective, batch, outputs)
    if kind == "sampled":
        drawn = _cotangents_of_drawn_labels(objective, batch, outputs, draws)
        if drawn is not None:
            return drawn
    width = outputs[0].numel()
    if width > _MAX_OUTPUTS:
        advice = "kind='sampled' has no such limit for a torch.nn.CrossEntropyLoss, nor has " if kind == "exact" else "use "
        raise ValueError(f"there are {width} outputs an example, more than {_MAX_OUTPUTS}: {advice}kind='empirical'")
    cotangents, signs = output_curvature_factors(leaf, loss, outputs)
    if not len(cotangents):
        return cotangents
    factors = cotangents.reshape(*signs.shape, width)
    eigenvalues = factors.square().sum(2)
    if bool((eigenvalues[signs < 0] > _rounding(leaf) * eigenvalues.max()).any()):
        raise ValueError(
            f"the loss is not convex in the outputs, so that it gives no Fisher matrix for kind={kind!r}: "
            "kind='empirical' takes any loss"
        )
    factors = factors * (signs > 0).unsqueeze(2)  # below zero is rounding
    if kind == "sampled":
        signs = draws.signs((len(outputs), width)).to(outputs)
        lengths = eigenvalues.sqrt().clamp_min(torch.finfo(outputs.dtype).tiny)
        along = torch.einsum("cnw,nw->cn", factors, signs) / lengths
        factors = torch.einsum("cn,cnw->nw", along, factors)
    return factors.reshape(-1, *outputs.shape)


def check_kind(kind: str) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"kind {kind!r} is none of {', '.join(map(repr, get_args(Kind)))}")


def output_curvature_factors(
    leaf: torch.Tensor, loss: torch.Tensor, outputs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Scaled eigenvectors of the loss's output Hessian, example by example: (C, \*outputs.shape), and signs (C, N).

    OutputCurvatureError where the second derivatives are not finite, or couple examples.
    """
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
        raise OutputCurvatureError("the loss's second derivative in the outputs is not finite")
    own = torch.Generator().manual_seed(0)  # a check reaches no result and must not advance anybody's generator
    probe = torch.randn(count, width, generator=own, dtype=torch.float64).to(leaf)
    precision = _rounding(leaf)
    expected = torch.einsum("nij,nj->ni", blocks, probe)
    if not torch.allclose(product(probe), expected, rtol=precision, atol=precision * float(expected.abs().max())):
        raise OutputCurvatureError(
            "the loss of one example depends on other examples' outputs, or is computed too coarsely to tell"
        )
    values, vectors = torch.linalg.eigh(blocks)
    kept = values.abs().amax(0) > 1e-12 * values.abs().max()
    scaled = (vectors * values.abs().sqrt().unsqueeze(1))[:, :, kept]  # (N, width, C)
    return scaled.permute(2, 0, 1).reshape(-1, *outputs.shape).to(outputs.dtype), values[:, kept].sign().T


def _cotangents_of_item_losses(objective: Objective, batch: object, outputs: torch.Tensor) -> torch.Tensor:
    """The items' gradients, each times the root of its share: (T, *outputs.shape) for T items an example."""
    (leaf,), copied = leaf_copy(outputs, None)
    losses, shares = item_losses(objective, copied, objective.targets(batch))
    (gradient,) = torch.autograd.grad(losses, leaf, grad_outputs=shares.sqrt())
    if outputs.dim() < 3 or not _is_classification(objective.loss):
        return gradient.unsqueeze(0)
    positions = outputs[0, 0].numel()  # each has a target of its own
    if positions > _MAX_OUTPUTS:
        raise ValueError(
            f"there are {positions} targets an example, more than {_MAX_OUTPUTS}, and each takes a backward pass: "
            "kind='sampled' takes one for all"
        )
    one_position = torch.eye(positions, dtype=torch.bool, device=outputs.device).view(positions, 1, 1, *outputs.shape[2:])
    return gradient.where(one_position, 0)


def _cotangents_of_drawn_labels(
    objective: Objective, batch: object, outputs: torch.Tensor, draws: ExampleDraws
) -> torch.Tensor | None:
    """Those of a softmax cross-entropy over dimension 1, one label drawn for each position; None for another loss.

    The shares s are read off the losses at uniform outputs, which are s log(C) whatever targets, weights and smoothing.
    """
    loss, targets = objective.loss, objective.targets(batch)
    if type(loss) is nn.CrossEntropyLoss:
        unreduced = copy.copy(loss)
        unreduced.reduction = "none"
    elif loss is F.cross_entropy:
        unreduced = functools.partial(F.cross_entropy, reduction="none")  # type: ignore[assignment]
    else:
        return None
    if outputs.dim() < 2 or outputs.shape[1] < 2:
        return None
    with torch.no_grad():
        uniform = torch.zeros_like(outputs)
        losses = unreduced(uniform, targets).double()
        shares = losses / math.log(outputs.shape[1]) * (loss(uniform, targets).double() / losses.sum())
        probabilities = outputs.detach().double().softmax(1)
        below = probabilities.cumsum(1) < draws.uniform(losses.shape).to(outputs.device).unsqueeze(1)
        labels = below.sum(1, keepdim=True).clamp_max(outputs.shape[1] - 1)
        drawn = torch.zeros_like(probabilities).scatter_(1, labels, 1.0)
        return (shares.sqrt().unsqueeze(1) * (probabilities - drawn)).unsqueeze(0).to(outputs.dtype)


def _rounding(leaf: torch.Tensor) -> float:
    """How far from the truth second derivatives of the loss may be, relative to the largest."""
    return 1e-9 if leaf.dtype == torch.float64 else 1e-3


def _is_classification(loss: LossFunction) -> bool:
    return isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) or loss in (F.cross_entropy, F.nll_loss)
