"""Domain parallelism: the rows of images are divided among the ranks of a group, the weights are on all of them.

An operation with a window over rows fetches the rows that its own outputs see (see `parallel.halo`), pads only at the image's
borders, and computes its part. Any kernel, stride, dilation and padding, rows that do not divide evenly, and windows that
reach over several ranks are the same code.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import distributed
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from parallel.halo import Range, fetch, partition, row_exchange
from parallel.layouts.replicated import summed, used_in_parts

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """What one row of outputs sees: `kernel` rows `dilation` apart, moving on by `stride`, `padding` rows beyond the border."""

    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    def rows_out(self, rows: int) -> int:
        """Rows of the output of an image of so many rows."""
        return (rows + 2 * self.padding - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    def seen(self, outputs: Range) -> Range:
        """The rows that these outputs see, those beyond the border counted from below 0 on."""
        start, end = outputs
        if start == end:
            return start * self.stride, start * self.stride
        reach = self.dilation * (self.kernel - 1) + 1
        return start * self.stride - self.padding, (end - 1) * self.stride - self.padding + reach


@dataclass(frozen=True)
class Rows:
    """How an image's rows are divided: `total` of them, along dimension 2 of (N, C, H, W), evenly over `group`."""

    total: int
    group: ProcessGroup | None = None

    def parts(self) -> tuple[Range, ...]:
        """The rows of each rank."""
        return partition(self.total, distributed.get_world_size(self.group))

    def own(self) -> Range:
        """The rows of this rank."""
        return self.parts()[distributed.get_rank(self.group)]

    def shard(self, image: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole image."""
        if image.shape[2] != self.total:
            raise ValueError(f"the image has {image.shape[2]} rows, not {self.total}")
        start, end = self.own()
        return image[:, :, start:end]


def windowed(
    x: torch.Tensor, rows: Rows, window: Window, operation: Callable[[torch.Tensor], torch.Tensor], *, border: float = 0.0
) -> tuple[torch.Tensor, Rows]:
    """This rank's rows of `operation`, which must not pad rows itself, and how the outputs' rows are divided.

    x: this rank's rows. border: the value of rows beyond the image. Raises ValueError where some rank would have no output.
    """
    outputs = Rows(window.rows_out(rows.total), rows.group)
    ranks = distributed.get_world_size(rows.group)
    if outputs.total < ranks:
        raise ValueError(
            f"{rows.total} rows become {max(outputs.total, 0)}, too few for {ranks} ranks: use fewer, or another layout"
        )
    seen = [window.seen(part) for part in outputs.parts()]
    needed = tuple((min(max(start, 0), rows.total), min(max(end, 0), rows.total)) for start, end in seen)
    exchange = row_exchange(rows.parts(), needed, 2, rows.group)
    start, end = seen[exchange.rank]
    first, last = needed[exchange.rank]
    # rows that are needed by no output of a border window count as negative padding, which cuts them off
    fetched = F.pad(fetch(x, exchange), (0, 0, first - start, end - last), value=border)
    return operation(fetched), outputs


def conv2d(
    x: torch.Tensor,
    rows: Rows,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> tuple[torch.Tensor, Rows]:
    """This rank's rows of `torch.nn.functional.conv2d`. x: (N, C, own rows, W)."""
    window = Window(weight.shape[2], stride[0], padding[0], dilation[0])
    return windowed(x, rows, window, lambda part: F.conv2d(part, weight, bias, stride, (0, padding[1]), dilation, groups))


def max_pool2d(x: torch.Tensor, rows: Rows, kernel: Pair, *, stride: Pair, padding: Pair = (0, 0)) -> tuple[torch.Tensor, Rows]:
    """This rank's rows of `torch.nn.functional.max_pool2d`."""
    window = Window(kernel[0], stride[0], padding[0])
    return windowed(x, rows, window, lambda part: F.max_pool2d(part, kernel, stride, (0, padding[1])), border=-torch.inf)


def avg_pool2d(x: torch.Tensor, rows: Rows, kernel: Pair, *, stride: Pair, padding: Pair = (0, 0)) -> tuple[torch.Tensor, Rows]:
    """This rank's rows of `torch.nn.functional.avg_pool2d`, which counts padding."""
    window = Window(kernel[0], stride[0], padding[0])
    return windowed(x, rows, window, lambda part: F.avg_pool2d(part, kernel, stride, (0, padding[1])))


def batch_norm2d(
    x: torch.Tensor, rows: Rows, weight: torch.Tensor | None, bias: torch.Tensor | None, *, eps: float = 1e-5
) -> torch.Tensor:
    """This rank's rows of a batch norm in training mode: mean and variance are those of whole images."""
    values = x.shape[0] * rows.total * x.shape[3]

    def mean(part: torch.Tensor) -> torch.Tensor:
        return used_in_parts(summed(part.sum((0, 2, 3), keepdim=True), rows.group), rows.group) / values

    centred = x - mean(x)
    result = centred * (mean(centred.square()) + eps).rsqrt()
    if weight is not None:
        result = result * weight.view(1, -1, 1, 1)
    return result if bias is None else result + bias.view(1, -1, 1, 1)


def mean_over_rows(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """(N, C): the mean of each whole image, on every rank."""
    return summed(x.sum((2, 3)), rows.group) / (rows.total * x.shape[3])
