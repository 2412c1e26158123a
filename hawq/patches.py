"""Every layer as a matrix product: its weight as rows, and the columns of inputs that the rows are multiplied with."""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

aten = torch.ops.aten

_DEFAULTS: dict[Any, tuple[Any, ...]] = {}  # of the arguments after (input, weight, bias), by operation
for _operation in (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default):
    _DEFAULTS[_operation] = (1, 0, 1, 1)  # stride, padding, dilation, groups
for _operation in (aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding):
    _DEFAULTS[_operation] = (1, "valid", 1, 1)
for _operation in (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input):
    _DEFAULTS[_operation] = (1, 0, 0, 1, 1)  # stride, padding, output padding, groups, dilation
TRANSPOSED = frozenset((aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input))


@dataclass(frozen=True)
class MatrixForm:
    """A layer as `outputs = rows @ columns`, group by group.

    operation, settings: the ATen operation and its arguments after (input, weight, bias). shape: the weight's.
    """

    operation: Any
    settings: tuple[Any, ...]
    shape: torch.Size

    @property
    def is_transposed(self) -> bool:
        return self.operation in TRANSPOSED

    @property
    def channel_axis(self) -> int:
        """The dimension of the weight that its output channels (of an embedding, its rows) lie along."""
        return 1 if self.is_transposed and self.groups == 1 else 0

    @property
    def has_channel_scales(self) -> bool:
        """Whether each output channel is a slice of the weight; grouped transposed convolutions hold them in another order."""
        return not self.is_transposed or self.groups == 1 or self.groups == self.shape[0] == self.shape[0] * self.shape[1]

    def group_size(self, size: int | None) -> int | None:
        """`size` where groups of so many columns can have scales of their own: in linear layers and embeddings whose
        columns it divides; else None."""
        return size if size and len(self.shape) == 2 and self.shape[1] % size == 0 and size < self.shape[1] else None

    def _settings(self) -> tuple[Any, ...]:
        defaults = _DEFAULTS[self.operation]
        return (*self.settings, *defaults[len(self.settings) :])

    @property
    def groups(self) -> int:
        if self.operation not in _DEFAULTS:
            return 1  # linear, embedding
        return self._settings()[3]

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as (groups, channels of a group, columns)."""
        if not self.is_transposed:
            return weight.reshape(self.groups, -1, prod(self.shape[1:]))
        split = weight.unflatten(0, (self.groups, -1)).transpose(1, 2)
        spatial = tuple(range(3, split.dim()))
        return split.flip(spatial).flatten(2)

    def weight(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of `rows`."""
        if not self.is_transposed:
            return rows.reshape(self.shape)
        inner, kernel = self.shape[0] // self.groups, self.shape[2:]
        split = rows.unflatten(2, (inner, *kernel))
        return split.flip(tuple(range(3, split.dim()))).transpose(1, 2).reshape(self.shape)

    def columns(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """The inputs of the products, (groups, positions, columns); `positions`: only those outputs, counted over examples
        and places. Convolutions are unfolded, transposed ones after zeros have been put between their inputs."""
        if self.operation is aten.linear.default:
            flat = x.flatten(0, -2)
            return (flat if positions is None else flat[positions]).unsqueeze(0)
        x, stride, dilation, kernel = self._as_plain_convolution(x)
        dims = x.dim() - 2
        for axis in range(dims):
            reach = (kernel[axis] - 1) * dilation[axis] + 1
            x = x.unfold(2 + axis, reach, stride[axis])[..., :: dilation[axis]]
        x = x.movedim(1, 1 + dims)  # (examples, *places, channels, *kernel)
        places = x.shape[: 1 + dims]
        if positions is None:
            positions = torch.arange(prod(places), device=x.device)
        picked = x[tuple(torch.unravel_index(positions, places))]
        return picked.reshape(len(positions), self.groups, -1).transpose(0, 1)

    @property
    def num_columns(self) -> int:
        """The products that make up one output."""
        return prod(self.shape[1:]) if not self.is_transposed else prod(self.shape) // (self.groups * self.shape[1])

    def num_positions(self, x: torch.Tensor) -> int:
        """How many outputs each channel has for that input: the length of `columns`."""
        if self.operation is aten.linear.default:
            return x.numel() // x.shape[-1]
        x, stride, dilation, kernel = self._as_plain_convolution(x)
        spans = (d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
        return len(x) * prod((size - span) // step + 1 for size, span, step in zip(x.shape[2:], spans, stride, strict=True))

    def _as_plain_convolution(self, x: torch.Tensor) -> tuple[torch.Tensor, list[int], list[int], list[int]]:
        """The padded input, and the stride, dilation and kernel of a convolution without padding."""
        dims = len(self.shape) - 2
        if x.dim() == dims + 1:
            x = x.unsqueeze(0)
        kernel = list(self.shape[2:])
        if self.is_transposed:
            stride, padding, output_padding, _, dilation = (_each(value, dims) for value in self._settings())
            spread = x.new_zeros(*x.shape[:2], *((size - 1) * step + 1 for size, step in zip(x.shape[2:], stride, strict=True)))
            spread[(slice(None), slice(None), *(slice(None, None, step) for step in stride))] = x
            amounts = [
                (d * (k - 1) - p, d * (k - 1) - p + extra)
                for k, d, p, extra in zip(kernel, dilation, padding, output_padding, strict=True)
            ]
            return _pad(spread, amounts), [1] * dims, dilation, kernel
        stride, padding, dilation, _ = self._settings()
        stride, dilation = _each(stride, dims), _each(dilation, dims)
        if padding == "same":  # an odd one out goes behind
            totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
            return _pad(x, [(total // 2, total - total // 2) for total in totals]), stride, dilation, kernel
        each = [0] * dims if padding == "valid" else _each(padding, dims)
        return _pad(x, [(amount, amount) for amount in each]), stride, dilation, kernel


def _each(value: Any, dims: int) -> list[int]:
    """A setting for every spatial dimension."""
    values = list(value) if isinstance(value, tuple | list) else [value]
    return values * dims if len(values) == 1 else values


def _pad(x: torch.Tensor, amounts: list[tuple[int, int]]) -> torch.Tensor:
    flat = [amount for pair in reversed(amounts) for amount in pair]
    return nn.functional.pad(x, flat) if any(flat) else x  # negative amounts cut, as a transposed convolution's padding does
