"""What is wrong with data that do not fit a model or its loss, and what to do about it.

A failed pass is explained once it has failed, so that nothing is looked at, or forbidden, where it works.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from hessian.batch import describe, dtype_name, tensors_of
from hessian.target_diagnosis import NAMES, check_shapes, class_range, of_classes, of_values
from hessian.torch_losses import is_classification, is_of_torch, loss_setting

# Not their subclasses: those say what they are, such as memory that ran out, a process that was lost, an error of this project.
_PLAIN = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError, AssertionError)

_OF_SHAPES = re.compile(r"shape|size|dimension|channel|height|width|\bdim\b|\b[0-5]-?D\b|out of range|elements")
_OF_KINDS = re.compile(r"type|device|out of bounds|index|must match|must be Tensor|has no attribute")


class DataMismatchError(ValueError):
    """The data do not fit the model or the loss; the text says what to change."""


@contextlib.contextmanager
def explained_forward(model: nn.Module, inputs: Any, where: str = "", *, own_call: bool = False) -> Iterator[None]:
    """Around a call of `model` with `inputs`: errors that these are the reason for become a DataMismatchError.

    where: which inputs they are, such as " of batch 3". own_call: a user's own function makes the call, and what it takes out
    of `inputs` is not known.
    """
    try:
        yield
    except _PLAIN as error:
        reason = _of_forward(model, inputs, where, error, own_call) if type(error) in _PLAIN else None
        if reason is None:
            raise
        raise DataMismatchError(reason) from error


def explained_loss(loss: Callable[[Any, Any], Any], outputs: Any, targets: Any, where: str = "") -> Any:
    """loss(outputs, targets); a DataMismatchError where these are the reason why it fails, or would be wrong."""
    problem = check_shapes(loss, outputs, targets, where)
    if problem:
        raise DataMismatchError(problem)
    try:
        return loss(outputs, targets)
    except _PLAIN as error:
        reason = _of_loss(loss, outputs, targets, where, error) if type(error) in _PLAIN else None
        if reason is None:
            raise
        raise DataMismatchError(reason) from error


def check_classes(loss: Callable[[Any, Any], Any], outputs: Any, targets: Any) -> None:
    """DataMismatchError for classes that there is no output for, before a kernel fails on them (or reads past its end)."""
    problem = class_range(loss, outputs, targets) if is_classification(loss) else None
    if problem:
        raise DataMismatchError(problem)


def class_weight(loss: Callable[[Any, Any], Any], targets: torch.Tensor) -> float:
    """What a cross-entropy divides by: how many targets are valid, or the sum of their classes' weights."""
    valid = targets[targets != loss_setting(loss, "ignore_index", -100)]
    weight = loss_setting(loss, "weight", None)
    if weight is None:
        return float(valid.numel())
    try:
        return float(weight[valid.long()].sum())  # bytes would be a mask
    except _PLAIN as error:
        if type(error) not in _PLAIN:
            raise
        if weight.device != targets.device:
            raise DataMismatchError(_of_held(weight, "targets", targets.device)) from error
        raise DataMismatchError(
            f"targets reach from {int(valid.min())} to {int(valid.max())}, and the loss has {len(weight)} class weights "
            f"({first_line(error)}): give a weight for each class, or classes from 0 to {len(weight) - 1}"
        ) from error


def first_line(error: Exception) -> str:
    """What an error says, in a line without a full stop."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(". ")


def _of_forward(model: nn.Module, inputs: Any, where: str, error: Exception, own_call: bool) -> str | None:
    text = first_line(error)
    tensors = list(tensors_of(inputs))
    if isinstance(error, TypeError | AttributeError) and not own_call:
        if not tensors:
            return f"inputs{where} are {describe(inputs)}, not a tensor ({text}): give torch.as_tensor(inputs)"
        if "positional argument" in text or not isinstance(inputs, torch.Tensor):
            return (
                f"model(inputs) failed for {describe(inputs)}{where} ({text}): say how the model is called with "
                "hessian.Objective(model, loss, data, forward=lambda model, batch: ...)"
            )
    given = f"inputs{where} are {{}}" if isinstance(inputs, torch.Tensor) else f"among the inputs{where} are {{}} tensors"
    return (
        _of_devices(model, tensors, given, text)
        or _of_dtypes(model, tensors, given, text)
        or _of_rows(model, tensors, where, error)
        or _of_sizes(model, inputs, where, text, error)
    )


def _of_devices(model: nn.Module, tensors: list[torch.Tensor], given: str, text: str) -> str | None:
    if "device" not in text and "backend" not in text and "meta tensor" not in text:
        return None
    own = sorted({str(parameter.device) for parameter in model.parameters()})
    others = [str(tensor.device) for tensor in tensors if str(tensor.device) not in own]
    if len(own) > 1:
        return f"the model's parameters are on {' and '.join(own)} ({text}): put all on one device, model.to({own[-1]!r})"
    if own and others:
        where = given.format(f"on {others[0]}")
        return f"{where} and the model's parameters on {own[0]}: give inputs.to({own[0]!r}), or model.to({others[0]!r})"
    return None


def _of_dtypes(model: nn.Module, tensors: list[torch.Tensor], given: str, text: str) -> str | None:
    if "type" not in text:
        return None
    own = next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), None)
    if own is None:
        return None
    name = dtype_name(own)
    for tensor in tensors:
        kind = dtype_name(tensor.dtype)
        if tensor.is_floating_point() and "indices" in text:
            return f"{given.format(kind)}, and an embedding looks up whole numbers: give inputs.long()"
        if tensor.dtype == own or own not in NAMES:
            continue
        fits = f"{given.format(kind)} and the model's parameters {name}: give inputs.{NAMES[own]}()"
        if tensor.dtype in NAMES:
            return f"{fits}, or model.{NAMES[tensor.dtype]}()"
        if not tensor.is_complex() and "indices" not in text:
            return f"{fits}, of images from 0 to 255 divided by 255"
    return None


def _of_rows(model: nn.Module, tensors: list[torch.Tensor], where: str, error: Exception) -> str | None:
    """Whole numbers that an embedding has no row for."""
    if not isinstance(error, IndexError):
        return None
    whole = [tensor for tensor in tensors if tensor.numel() and not tensor.is_floating_point() and not tensor.is_complex()]
    for tensor in whole:
        low, high = int(tensor.min()), int(tensor.max())
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding) and (high >= module.num_embeddings or low < 0):
                wrong = low if low < 0 else high
                rows = f"rows 0 to {module.num_embeddings - 1}"
                return f"inputs{where} hold {wrong}, and the embedding {name!r} has {rows}: check what numbers the words"
    return None


def _of_sizes(model: nn.Module, inputs: Any, where: str, text: str, error: Exception) -> str | None:
    if isinstance(error, TypeError | AttributeError) or not _OF_SHAPES.search(text):
        return None
    given = f"of shape {tuple(inputs.shape)}" if isinstance(inputs, torch.Tensor) else f"({describe(inputs)})"
    remedy = _size_remedy(model, inputs, text) if isinstance(inputs, torch.Tensor) else ""
    return f"inputs{where} {given} do not fit the model ({text}): {remedy}check model(inputs) by itself"


def _size_remedy(model: nn.Module, inputs: torch.Tensor, text: str) -> str:
    if "when training" in text:
        return "call model.eval(), or give at least 2 examples a batch, and "
    first = next((module for module in model.modules() if isinstance(module, _ConvNd | nn.Linear)), None)
    if isinstance(first, nn.Linear):
        flat = inputs.dim() > 2 and inputs[0].numel() == first.in_features
        return "give inputs.flatten(1), and " if flat else f"the first linear layer takes rows of {first.in_features}; "
    if first is None:
        return ""
    spatial, channels = len(first.kernel_size), first.in_channels
    sizes = ("length",) if spatial == 1 else ("depth", "height", "width")[-spatial:]
    wanted = f"the first convolution takes (N, {channels}, {', '.join(sizes)}): "
    if inputs.dim() == spatial + 1 and channels == 1:
        return f"{wanted}give inputs.unsqueeze(1), and "
    if inputs.dim() == spatial + 2 and inputs.shape[-1] == channels != inputs.shape[1]:
        return f"{wanted}give inputs.movedim(-1, 1), and "
    if inputs.dim() == 2 and spatial > 1:
        return f"{wanted}give inputs.unflatten(1, ({channels}, {', '.join(sizes)})), and "
    return wanted if inputs.dim() != spatial + 2 or inputs.shape[1] != channels else ""


def _of_loss(loss: Callable[[Any, Any], Any], outputs: Any, targets: Any, where: str, error: Exception) -> str | None:
    text = first_line(error)
    if not _OF_KINDS.search(text) and not _OF_SHAPES.search(text) and not is_of_torch(loss):
        return None  # what a user's own function means by it
    if "allocate" in text:
        return None
    if not isinstance(outputs, torch.Tensor) and (is_of_torch(loss) or type(outputs).__name__ in text):
        return (
            f"the model's output is {describe(outputs)}, and the loss takes one tensor ({text}): give hessian.Objective(model, "
            f"loss, data, forward=lambda model, batch: model(batch[0]){_part(outputs)}), or a model that returns that alone"
        )
    if not isinstance(targets, torch.Tensor) and is_of_torch(loss):
        return (
            f"targets{where} are {describe(targets)}, and the loss takes one tensor ({text}): give that, or the loss "
            "as lambda outputs, targets: ... that takes it out of them"
        )
    if isinstance(outputs, torch.Tensor) and isinstance(targets, torch.Tensor):
        own = next((tensor for tensor in _tensors_held(loss) if tensor.device != outputs.device), None)
        if own is not None:
            return _of_held(own, "outputs", outputs.device)
        if targets.device != outputs.device:
            return f"outputs are on {outputs.device} and targets{where} on {targets.device}: give both on one device"
        explain = of_classes if is_classification(loss) else of_values
        found = explain(loss, outputs, targets, where, text)
        if found:
            return found
    return (
        f"the loss failed for outputs {describe(outputs)} and targets{where} {describe(targets)} ({text}): "
        "check loss(model(inputs), targets) by itself"
    )


def _of_held(held: torch.Tensor, name: str, device: torch.device) -> str:
    return f"{name} are on {device} and a tensor of the loss on {held.device}: give loss.to({str(device)!r})"


def _tensors_held(loss: Any) -> list[torch.Tensor]:
    return [*loss.parameters(), *loss.buffers()] if isinstance(loss, nn.Module) else []


def _part(outputs: Any) -> str:
    """How to take the tensor that a loss is of out of a model's outputs."""
    if hasattr(outputs, "logits"):
        return ".logits"
    if isinstance(outputs, Mapping):
        name = "logits" if "logits" in outputs else next((key for key, value in outputs.items() if _is_tensor(value)), "...")
        return f"[{name!r}]"
    if is_dataclass(outputs):
        return "." + next((field.name for field in fields(outputs) if _is_tensor(getattr(outputs, field.name))), "...")
    return "[0]"


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
