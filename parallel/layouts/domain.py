"""Domain parallelism: images are divided into tiles, one a rank of a group; the weights are on all of them.

An operation with a window over an image fetches what its own outputs see of other tiles (see `parallel.halo`), pads only at
the image's borders, and computes its part. Any kernel, stride, dilation and padding, sizes that do not divide evenly, and
windows that reach over several ranks are the same code. Where images are divided along one of their dimensions, the outputs
that see this rank's tile alone are computed while the messages are under way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import distributed
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from parallel.halo import Block, Exchange, Range, fetch, partition
from parallel.overlapped import OverlappedFetch

Pair = tuple[int, int]
Operation = Callable[[torch.Tensor, Pair], torch.Tensor]  # of a part of an image, and the padding that it still needs
Interpolation = Literal["nearest", "bilinear"]

_DIMS = (2, 3)  # height and width of (N, C, H, W)
_MOSTLY = 0.5  # of a rank's outputs: from here on it pays to compute those apart that need no other rank


@dataclass(frozen=True)
class Window:
    """What one output sees along a dimension: `kernel` inputs `dilation` apart, moving on by `stride`, `padding` of them beyond
    the border."""

    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    @property
    def reach(self) -> int:
        """From the first input that an output sees to the one behind the last."""
        return self.dilation * (self.kernel - 1) + 1

    def outputs(self, inputs: int) -> int:
        """Outputs of so many inputs."""
        return (inputs + 2 * self.padding - self.reach) // self.stride + 1

    def seen(self, outputs: Range) -> Range:
        """The inputs that these outputs see, those beyond the border counted from below 0 on."""
        start, end = outputs
        if start == end:
            return start * self.stride, start * self.stride
        return start * self.stride - self.padding, (end - 1) * self.stride - self.padding + self.reach

    def within(self, outputs: Range, inputs: Range) -> Range:
        """Those of the outputs that see these inputs alone."""
        first = -((-inputs[0] - self.padding) // self.stride)
        last = (inputs[1] + self.padding - self.reach) // self.stride
        start = min(max(outputs[0], first), outputs[1])
        return start, max(start, min(outputs[1], last + 1))


@dataclass(frozen=True)
class Tiles:
    """How images are divided: `size` (height, width) evenly into `grid` tiles along each, one a rank of `group`, row by row."""

    size: Pair
    grid: Pair
    group: ProcessGroup | None = None

    @classmethod
    def of_rows(cls, size: Pair, group: ProcessGroup | None = None) -> "Tiles":
        """Rows alone are divided, over all ranks of the group."""
        return cls(size, (distributed.get_world_size(group), 1), group)

    def blocks(self) -> tuple[Block, ...]:
        """The rows and columns of each rank."""
        return tuple(product(*(partition(size, parts) for size, parts in zip(self.size, self.grid, strict=True))))

    def own(self) -> Block:
        """The rows and columns of this rank."""
        return self.blocks()[distributed.get_rank(self.group)]

    def shard(self, image: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole image."""
        if image.shape[2:] != self.size:
            raise ValueError(f"the image has {tuple(image.shape[2:])} rows and columns, not {self.size}")
        rows, columns = self.own()
        return image[:, :, slice(*rows), slice(*columns)]

    def of_outputs(self, size: Pair) -> "Tiles":
        """The outputs of an operation, divided as evenly; ValueError where some rank would have none."""
        if size[0] < self.grid[0] or size[1] < self.grid[1]:
            raise ValueError(
                f"images of {self.size} become {size}, too few rows or columns for {self.grid} ranks: use fewer, or another "
                "layout"
            )
        return Tiles(size, self.grid, self.group)


def windowed(
    x: torch.Tensor, tiles: Tiles, windows: tuple[Window, Window], operation: Operation, *, border: float = 0.0
) -> tuple[torch.Tensor, Tiles]:
    """This rank's part of `operation`, and how the outputs are divided.

    x: this rank's tile. windows: along height and width. border: the value of what is beyond the image. Raises ValueError where
    some rank would have no output.
    """
    height, width = (window.outputs(size) for window, size in zip(windows, tiles.size, strict=True))
    outputs = tiles.of_outputs((height, width))
    padding = tuple(0 if parts > 1 else window.padding for parts, window in zip(tiles.grid, windows, strict=True))
    divided = [axis for axis in (0, 1) if tiles.grid[axis] > 1]
    if len(divided) == 1:
        line = _Line(tiles, outputs, divided[0], windows[divided[0]], border)
        return line.outputs(x, lambda part: operation(part, padding)), outputs  # type: ignore[arg-type]  # a pair
    seen = [tuple(window.seen(part) for window, part in zip(windows, block, strict=True)) for block in outputs.blocks()]
    if not divided:
        return operation(x, padding), outputs  # type: ignore[arg-type]
    needed = tuple(tuple(_inside(part, size) for part, size in zip(block, tiles.size, strict=True)) for block in seen)
    rank = distributed.get_rank(tiles.group)
    part = fetch(x, Exchange(tiles.blocks(), needed, _DIMS, tiles.group))
    for dim, wanted, there in zip(_DIMS, seen[rank], needed[rank], strict=True):
        part = _padded(part, dim, wanted, there, border)
    return operation(part, (0, 0)), outputs


@dataclass(frozen=True)
class _Line:
    """An operation on images that are divided along one dimension, `axis` of height and width."""

    tiles: Tiles
    results: Tiles
    axis: int
    window: Window
    border: float

    def outputs(self, x: torch.Tensor, operation: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """This rank's outputs; those that see no other rank's tile come while the others' parts are under way."""
        own, wanted = self.tiles.own()[self.axis], self.results.own()[self.axis]
        fetching = OverlappedFetch(self._halos())
        begun = fetching.begin(x)
        inner = self.window.within(wanted, own)
        if inner[1] - inner[0] < _MOSTLY * (wanted[1] - wanted[0]):
            inner = (wanted[1], wanted[1])
        pieces = {}
        if inner[0] < inner[1]:
            start, end = self.window.seen(inner)
            pieces[inner] = operation(x.narrow(_DIMS[self.axis], start - own[0], end - start))
        before, after = fetching.end(begun)
        for outer in ((wanted[0], inner[0]), (inner[1], wanted[1])):
            if outer[0] < outer[1]:
                pieces[outer] = operation(self._seen(outer, before, x, after))
        some = next(iter(pieces.values()))
        # of no elements, but in the graph: derivatives of what was fetched send messages, whether this rank used it or not
        link = (before.sum() + after.sum()).to(some).expand(some.narrow(_DIMS[self.axis], 0, 0).shape)
        return torch.cat([*(pieces[one] for one in sorted(pieces)), link], _DIMS[self.axis])

    def _halos(self) -> list[Exchange]:
        """What each rank needs of those before and behind it."""
        total, group = self.tiles.size[self.axis], self.tiles.group
        owned = [block[self.axis] for block in self.tiles.blocks()]
        needed = [_inside(self.window.seen(block[self.axis]), total) for block in self.results.blocks()]
        before = tuple(((start, max(start, min(end, own[0]))),) for (start, end), own in zip(needed, owned, strict=True))
        after = tuple(((min(end, max(start, own[1])), end),) for (start, end), own in zip(needed, owned, strict=True))
        blocks = tuple((own,) for own in owned)
        return [Exchange(blocks, halo, (_DIMS[self.axis],), group) for halo in (before, after)]

    def _seen(self, outputs: Range, before: torch.Tensor, x: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """What some outputs see, padded at the image's borders."""
        dim, own = _DIMS[self.axis], self.tiles.own()[self.axis]
        wanted = self.window.seen(outputs)
        there = _inside(wanted, self.tiles.size[self.axis])
        needed = _inside(self.window.seen(self.results.own()[self.axis]), self.tiles.size[self.axis])
        starts = (min(needed[0], own[0]), own[0], max(needed[0], own[1]))
        parts = []
        for start, tensor in zip(starts, (before, x, after), strict=True):
            first = max(there[0], start)
            last = min(there[1], start + tensor.shape[dim])
            if first < last:
                parts.append(tensor.narrow(dim, first - start, last - first))
        part = torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)
        return _padded(part, dim, wanted, there, self.border)


def _inside(part: Range, size: int) -> Range:
    return min(max(part[0], 0), size), min(max(part[1], 0), size)


def _padded(part: torch.Tensor, dim: int, wanted: Range, there: Range, value: float) -> torch.Tensor:
    """The `wanted` range of an image of which the range `there` is there; negative padding where outputs see the border
    alone."""
    around = (there[0] - wanted[0], wanted[1] - there[1])
    if around == (0, 0):
        return part
    return F.pad(part, (0, 0) * (3 - dim) + around, value=value)


def conv2d(
    x: torch.Tensor,
    tiles: Tiles,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> tuple[torch.Tensor, Tiles]:
    """This rank's part of `torch.nn.functional.conv2d`. x: (N, C, own rows, own columns)."""
    windows = _windows((weight.shape[2], weight.shape[3]), stride, padding, dilation)
    return windowed(x, tiles, windows, lambda part, rest: F.conv2d(part, weight, bias, stride, rest, dilation, groups))


def max_pool2d(
    x: torch.Tensor, tiles: Tiles, kernel: Pair, *, stride: Pair, padding: Pair = (0, 0)
) -> tuple[torch.Tensor, Tiles]:
    """This rank's part of `torch.nn.functional.max_pool2d`."""
    windows = _windows(kernel, stride, padding)
    return windowed(x, tiles, windows, lambda part, rest: F.max_pool2d(part, kernel, stride, rest), border=-torch.inf)


def avg_pool2d(
    x: torch.Tensor, tiles: Tiles, kernel: Pair, *, stride: Pair, padding: Pair = (0, 0)
) -> tuple[torch.Tensor, Tiles]:
    """This rank's part of `torch.nn.functional.avg_pool2d`, which counts padding."""
    windows = _windows(kernel, stride, padding)
    return windowed(x, tiles, windows, lambda part, rest: F.avg_pool2d(part, kernel, stride, rest))


def _windows(kernel: Pair, stride: Pair, padding: Pair, dilation: Pair = (1, 1)) -> tuple[Window, Window]:
    height, width = (Window(*one) for one in zip(kernel, stride, padding, dilation, strict=True))
    return height, width


def upsample(x: torch.Tensor, tiles: Tiles, factor: Pair, mode: Interpolation) -> tuple[torch.Tensor, Tiles]:
    """This rank's part of `torch.nn.functional.interpolate` to `factor` times the size, without aligned corners."""
    outputs = tiles.of_outputs((tiles.size[0] * factor[0], tiles.size[1] * factor[1]))
    needed = tuple(
        tuple(_between(*one, mode) for one in zip(block, factor, tiles.size, strict=True)) for block in outputs.blocks()
    )
    part = fetch(x, Exchange(tiles.blocks(), needed, _DIMS, tiles.group))
    size = [factor[axis] * part.shape[_DIMS[axis]] for axis in (0, 1)]
    part = F.interpolate(part, size, mode=mode)
    rank = distributed.get_rank(tiles.group)
    for dim, (start, end), (first, _), times in zip(_DIMS, outputs.own(), needed[rank], factor, strict=True):
        part = part.narrow(dim, start - times * first, end - start)
    return part, outputs


def _between(outputs: Range, factor: int, size: int, mode: Interpolation) -> Range:
    """The inputs that some outputs are interpolated between: output i lies at (i + 1/2) / factor - 1/2 of the inputs."""
    if mode == "nearest":
        return outputs[0] // factor, (outputs[1] - 1) // factor + 1
    first, last = ((2 * one + 1 - factor) // (2 * factor) for one in (outputs[0], outputs[1] - 1))
    return _inside((first, last + 2), size)
