"""Averages over windows as integer matrices: the sum of each window, on a grid finer by the number of values in it."""

from collections.abc import Sequence
from math import lcm, prod
from typing import Any

import torch
from torch import fx

from hawq.integer.grid import Compute, Grid, Site

aten = torch.ops.aten

_POOLS = {aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3}
_ADAPTIVE = {
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
}
_DIMS: dict[Any, int] = _POOLS | _ADAPTIVE
AVERAGES = frozenset((aten.mean.dim, *_DIMS))

Window = tuple[int, int, int]  # start, end, and the number that its sum is divided by


def average(site: Site, node: fx.Node) -> tuple[Grid, Compute] | None:
    """The rule of `mean`, `avg_pool` and `adaptive_avg_pool`; None for a mean over examples or channels of unlike scales."""
    source = site.grid(node.args[0])
    if source is None:
        return None
    example = site.value(node.args[0])
    shape = tuple(example.shape)
    if node.target is aten.mean.dim:
        return _mean(node, source, shape)
    dims = _DIMS[node.target]
    if node.target in _ADAPTIVE:
        sizes = _per_dim(node.args[1], dims)
        windows = [_adaptive_windows(n, n if size is None else size) for n, size in zip(shape[-dims:], sizes, strict=True)]
        divisor = 1
    else:
        settings: Sequence[Any] = (*node.args[1:], *(None,) * 6)
        kernel, stride, padding, ceil_mode, include, override = settings[:6]
        kernels = _per_dim(kernel, dims)
        axes = zip(shape[-dims:], kernels, _per_dim(stride or kernels, dims), _per_dim(padding or 0, dims), strict=True)
        counted = True if include is None else bool(include)
        windows = [_windows(n, k, s, p, bool(ceil_mode), counted) for n, k, s, p in axes]
        divisor = int(override) if override else 1
        if override:
            windows = [[(start, end, 1) for start, end, _ in row] for row in windows]
    matrices, gain = [], 1
    for n, row in zip(shape[-dims:], windows, strict=True):
        matrix, common = _sums(n, row, example.device)
        matrices.append(matrix)
        divisor *= common
        gain *= int(matrix.sum(0).max())

    def compute(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        for dim, matrix in zip(range(-dims, 0), matrices, strict=True):
            x = torch.matmul(x.movedim(dim, -1), matrix).movedim(-1, dim)
        return x.contiguous()

    return Grid(source.scale / divisor, source.bound * gain), compute


def _mean(node: fx.Node, source: Grid, shape: Sequence[int]) -> tuple[Grid, Compute] | None:
    keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim"))
    given: Any = node.args[1]
    dims = [dim % len(shape) for dim in given or range(len(shape))]
    unlike = not source.is_uniform and any(source.scale.shape[dim] > 1 for dim in dims)
    if 0 in dims or unlike or node.kwargs.get("dtype"):
        return None
    count = prod(shape[dim] for dim in dims)
    scale = source.scale if source.is_uniform else source.scale.amax(dims, keepdim=keep)
    return Grid(scale / count, source.bound * count), lambda x, *_, **__: x.sum(dims, keepdim=keep)


def _per_dim(value: Any, dims: int) -> list[Any]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * dims if len(values) == 1 else values


def _adaptive_windows(n: int, size: int) -> list[Window]:
    ends = [(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
    return [(start, end, end - start) for start, end in ends]


def _windows(n: int, kernel: int, stride: int, padding: int, ceil_mode: bool, include_padding: bool) -> list[Window]:
    steps = n + 2 * padding - kernel
    size = (-(-steps // stride) if ceil_mode else steps // stride) + 1
    if ceil_mode and (size - 1) * stride >= n + padding:
        size -= 1  # a window must start in the input or in the padding before it
    result = []
    for i in range(size):
        start = i * stride - padding
        end = min(start + kernel, n + padding)
        inside = max(start, 0), min(end, n)
        result.append((*inside, end - start if include_padding else inside[1] - inside[0]))
    return result


def _sums(n: int, windows: Sequence[Window], device: torch.device) -> tuple[torch.Tensor, int]:
    """(n, windows) integers that sum each window times common / its count, and `common`, the counts' common multiple."""
    common = lcm(*(count for _, _, count in windows))
    matrix = torch.zeros(n, len(windows), dtype=torch.int64, device=device)
    for column, (start, end, count) in enumerate(windows):
        matrix[start:end, column] = common // count
    return matrix, common
