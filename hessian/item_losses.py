"""The loss of every item by itself: what a batch's loss is the weighted mean of."""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hessian.batch import count_examples, split_batch
from hessian.diagnosis import explained_loss
from hessian.objective import LossFunction, Objective

_MODULES: dict[Any, type[nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.nll_loss: nn.NLLLoss,
    F.mse_loss: nn.MSELoss,
    F.l1_loss: nn.L1Loss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    F.huber_loss: nn.HuberLoss,
    F.binary_cross_entropy: nn.BCELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
}
_SEPARABLE = tuple(_MODULES.values())


def item_losses(objective: Objective, outputs: Any, targets: Any) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Losses l_i of a batch's items, (M,), and the shares s_i, (M,), with which they enter its loss, :math:`\sum_i s_i l_i`.

    Items are what the loss averages over: examples; for a cross-entropy every target, but for ignored ones, in proportion to
    its class weight; for a binary cross-entropy every binary target. A loss other than torch.nn's is evaluated example by
    example, and must be the mean of that.
    """
    loss = _MODULES[objective.loss]() if objective.loss in _MODULES else objective.loss
    if isinstance(loss, nn.modules.loss._Loss) and isinstance(loss, _SEPARABLE) and isinstance(outputs, torch.Tensor):
        single = copy.copy(loss)
        single.reduction = "none"
        return _of_module(single, outputs, targets, is_sum=objective.is_sum)
    return _one_by_one(objective.loss, outputs, targets, is_sum=objective.is_sum)


def _of_module(
    loss: nn.Module, outputs: torch.Tensor, targets: torch.Tensor, *, is_sum: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    values = explained_loss(loss, outputs, targets)
    if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss):
        values = values.reshape(-1)
        weights = torch.ones_like(values)
        if not targets.is_floating_point():
            flat = targets.reshape(-1)
            valid = flat != loss.ignore_index
            weights = valid.to(values)
            if loss.weight is not None:
                weights = weights * loss.weight.to(values)[flat.where(valid, 0).long()]
            counted = weights > 0
            if isinstance(loss, nn.CrossEntropyLoss) and loss.label_smoothing and bool((valid & ~counted).any()):
                raise ValueError("label smoothing gives targets of a class with weight 0 a loss but no share: no Fisher matrix")
            values, weights = values[counted] / weights[counted], weights[counted]
        return values, weights if is_sum else weights / weights.sum()
    if isinstance(loss, nn.BCELoss | nn.BCEWithLogitsLoss):
        values = values.reshape(-1, 1)
    values = values.reshape(len(values), -1)
    values = values.sum(1) if is_sum else values.mean(1)
    return values, torch.full_like(values, 1.0 if is_sum else 1 / len(values))


def _one_by_one(loss: LossFunction, outputs: Any, targets: Any, *, is_sum: bool) -> tuple[torch.Tensor, torch.Tensor]:
    count = count_examples(targets)
    if count_examples(outputs) != count:
        raise ValueError(
            f"cannot tell items apart: outputs for {count_examples(outputs)} examples, targets for {count}; the empirical "
            "Fisher matrix needs a loss of each example"
        )
    pairs = zip(split_batch(outputs, 1), split_batch(targets, 1), strict=True)
    values = torch.stack([explained_loss(loss, output, target).reshape(()) for output, target in pairs])
    shares = torch.full_like(values, 1.0 if is_sum else 1 / count)
    whole, mean = loss(outputs, targets).detach(), (shares * values).sum().detach()
    if not torch.allclose(mean, whole, rtol=1e-4, atol=1e-6):
        raise ValueError(
            f"the batch's loss {float(whole):.6g} is not the mean {float(mean):.6g} of its examples' losses: an empirical "
            "Fisher matrix is not defined for it"
        )
    return values, shares
