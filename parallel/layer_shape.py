"""What a cost model must know of a layer, and how it is read off a network."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hessian.diagnosis import explained_forward
from parallel.evaluation_mode import in_evaluation_mode

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


@dataclass(frozen=True)
class LayerShape:
    """A layer of a network, for one example.

    weights: their number, biases included. inputs, outputs: values. channels: of the output, which a model-parallel layer
    divides; 0 where it has no weights to divide, and its weights, if any, are on every rank. rows_in, rows_out: rows of the
    image (tokens of a text) that a domain-parallel layer divides; 1 where every output needs all of the input. kernel_rows:
    rows of the input that one row of the output sees; 1 where those of different outputs do not overlap. columns: of the image,
    the fewer of input and output.
    """

    name: str
    weights: int
    inputs: int
    outputs: int
    channels: int = 0
    rows_in: int = 1
    rows_out: int = 1
    kernel_rows: int = 1
    columns: int = 1

    def __post_init__(self) -> None:
        for name in ("weights", "channels"):
            if getattr(self, name) < 0:
                raise ValueError(f"layer {self.name!r} has {name}={getattr(self, name)}: give at least 0")
        for name in ("inputs", "outputs", "rows_in", "rows_out", "kernel_rows", "columns"):
            if getattr(self, name) < 1:
                raise ValueError(f"layer {self.name!r} has {name}={getattr(self, name)}: give at least 1")

    @property
    def halo_values(self) -> int:
        """Values of the floor(k/2) rows on one side of a part that its neighbour's outputs need."""
        return self.inputs // self.rows_in * (self.kernel_rows // 2)


def describe(model: nn.Module, example: Any) -> list[LayerShape]:
    """The layers of `model` in the order in which they compute, as a chain: parallel branches come one after the other.

    example: a batch of inputs. A module that is called repeatedly counts once, at its first call. Raises ValueError for a
    network without weights, or with weights of its own that no module's forward reads.
    """
    found: dict[str, LayerShape] = {}

    def record(name: str, module: nn.Module, arguments: Sequence[Any], output: Any) -> None:
        tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
        if name not in found and tensors and isinstance(output, torch.Tensor):
            found[name] = _shape(name, module, tensors[0], output)

    modules = {name: module for name, module in model.named_modules() if _counts(module)}
    handles = [
        module.register_forward_hook(lambda module, arguments, output, name=name: record(name, module, arguments, output))
        for name, module in modules.items()
    ]
    try:
        with in_evaluation_mode(model), torch.no_grad(), explained_forward(model, example):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name, module in modules.items() if name not in found and _own_weights(module)]
    if missing:
        raise ValueError(f"module {missing[0]!r} has weights and is never called with a tensor: its cost cannot be told")
    if not any(layer.weights for layer in found.values()):
        raise ValueError("the network has no weights: there is nothing to train")
    return list(found.values())


def _counts(module: nn.Module) -> bool:
    return _own_weights(module) > 0 or isinstance(module, (*_POOLS, nn.Upsample))


def _own_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def _shape(name: str, module: nn.Module, x: torch.Tensor, output: torch.Tensor) -> LayerShape:
    weights, inputs, outputs = _own_weights(module), x[0].numel(), output[0].numel()
    columns = min(x.shape[3], output.shape[3]) if x.dim() == output.dim() == 4 else 1
    if isinstance(module, (*_CONVOLUTIONS, *_POOLS, nn.Upsample)):
        channels = module.out_channels if isinstance(module, _CONVOLUTIONS) else 0
        return LayerShape(name, weights, inputs, outputs, channels, x.shape[2], output.shape[2], _seen_rows(module), columns)
    if isinstance(module, nn.Linear):
        rows = x.shape[1] if x.dim() > 2 else 1
        return LayerShape(name, weights, inputs, outputs, module.out_features, rows, rows)
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and x.dim() > 2:
        return LayerShape(name, weights, inputs, outputs, 0, x.shape[2], x.shape[2], 1, columns)
    return LayerShape(name, weights, inputs, outputs)


def _seen_rows(module: nn.Module) -> int:
    if isinstance(module, nn.Upsample):
        return 1 if module.mode == "nearest" else 3  # bilinear: a row on either side, of which each output sees one
    seen = _first(getattr(module, "dilation", 1)) * (_first(module.kernel_size) - 1) + 1
    overlaps = seen > _first(module.stride) or module.padding not in (0, (0, 0), "valid")
    return seen if overlaps else 1


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, tuple) else value)
