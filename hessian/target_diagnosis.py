"""Targets that torch's losses do not take, or take and get wrong: what they are, and what to give instead."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hessian.batch import dtype_name
from hessian.torch_losses import function_of, loss_name, loss_setting

NAMES = {torch.float32: "float", torch.float64: "double", torch.float16: "half", torch.bfloat16: "bfloat16"}  # of their methods

# Where torch goes on with a warning that the loss is likely to be wrong: (N,) against (N, 1) is compared all with all.
_STRETCHING = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
_STRETCHING_FUNCTIONS = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)


def check_shapes(loss: Any, outputs: Any, targets: Any, where: str) -> str | None:
    """What is wrong with shapes that an element-wise loss would stretch to each other, with a wrong loss as the result."""
    stretches = type(loss) in _STRETCHING or function_of(loss) in _STRETCHING_FUNCTIONS
    if not stretches or not isinstance(outputs, torch.Tensor) or not isinstance(targets, torch.Tensor):
        return None
    return None if outputs.shape == targets.shape else _of_shapes(loss, outputs, targets, where)


def class_range(loss: Any, outputs: Any, targets: Any) -> str | None:
    """What is wrong with class numbers that a classification has no output for."""
    if not isinstance(outputs, torch.Tensor) or not isinstance(targets, torch.Tensor) or targets.is_floating_point():
        return None
    classes = _classes(outputs)
    valid = targets[targets != loss_setting(loss, "ignore_index", -100)]
    if not valid.numel() or (int(valid.min()) >= 0 and int(valid.max()) < classes):
        return None
    wrong = int(valid.max()) if int(valid.max()) >= classes else int(valid.min())
    return (
        f"target {wrong} is out of range: the model has {classes} outputs, so targets are 0 to {classes - 1}, or ignore_index "
        "of the loss"
    )


def of_classes(loss: Any, outputs: torch.Tensor, targets: torch.Tensor, where: str, text: str) -> str | None:
    """Why a cross-entropy failed."""
    wanted = outputs.shape[:1] + outputs.shape[2:] if outputs.dim() > 1 else outputs.shape[:0]
    remedy = "targets"
    if targets.shape == (*wanted[:1], 1, *wanted[1:]):
        remedy += ".squeeze(1)"
    elif targets.shape == outputs.shape:
        remedy += ".argmax(1)"
    elif targets.shape != wanted:
        remedy = "a class number for every output"
    if targets.dtype != torch.int64:
        remedy += ".long()" if remedy.startswith("targets") else ", in int64"
    if remedy != "targets":
        return (
            f"targets{where} are {dtype_name(targets.dtype)} of shape {tuple(targets.shape)}, and {loss_name(loss)} of outputs "
            f"of shape {tuple(outputs.shape)} takes class numbers, int64 of shape {tuple(wanted)} ({text}): give {remedy}"
        )
    weight = loss_setting(loss, "weight", None)
    if isinstance(weight, torch.Tensor) and len(weight) != _classes(outputs):
        return f"the loss has {len(weight)} class weights and the model {_classes(outputs)} outputs: give one for each"
    if isinstance(weight, torch.Tensor) and weight.dtype != outputs.dtype and outputs.dtype in NAMES:
        kinds = f"{dtype_name(weight.dtype)} and outputs {dtype_name(outputs.dtype)}"
        return f"the loss's class weights are {kinds}: give weight.{NAMES[outputs.dtype]}()"
    return class_range(loss, outputs, targets)


def of_values(loss: Any, outputs: torch.Tensor, targets: torch.Tensor, where: str, text: str) -> str | None:
    """Why a loss that compares values, or one that is not known, failed."""
    functions = (F.binary_cross_entropy, F.binary_cross_entropy_with_logits)
    binary = isinstance(loss, nn.BCELoss | nn.BCEWithLogitsLoss) or function_of(loss) in functions
    if binary and targets.shape != outputs.shape:
        return _of_shapes(loss, outputs, targets, where)
    if binary and not targets.is_floating_point():
        method = NAMES.get(outputs.dtype, "float")
        kind = f"{dtype_name(targets.dtype)}, and {loss_name(loss)} takes probabilities"
        return f"targets{where} are {kind}: give targets.{method}()"
    if binary and "between 0 and 1" in text:
        low, high = (float(value) for value in outputs.detach().aminmax())
        return (
            f"outputs reach from {low:.3g} to {high:.3g}, and {loss_name(loss)} takes probabilities from 0 to 1: use "
            "BCEWithLogitsLoss, or end the model with a sigmoid"
        )
    if re.search("target .* out of bounds", text, re.IGNORECASE):  # of a cross-entropy inside a function of the user's
        return class_range(loss, outputs, targets)
    return None


def _classes(outputs: torch.Tensor) -> int:
    return outputs.shape[1] if outputs.dim() > 1 else outputs.numel()


def _of_shapes(loss: Callable[..., Any], outputs: torch.Tensor, targets: torch.Tensor, where: str) -> str:
    if (*targets.shape, 1) == outputs.shape:
        remedy = f"give targets.unsqueeze({targets.dim()})"
    elif (*outputs.shape, 1) == targets.shape:
        remedy = f"give targets.squeeze({outputs.dim()})"
    elif outputs.dim() == targets.dim() + 1 and not targets.is_floating_point():
        remedy = "of class numbers take CrossEntropyLoss, or give torch.nn.functional.one_hot(targets).float()"
    else:
        remedy = "give targets shaped like the outputs"
    shapes = f"outputs are of shape {tuple(outputs.shape)} and targets{where} of shape {tuple(targets.shape)}"
    return f"{shapes}, and {loss_name(loss)} compares them one by one: {remedy}"
