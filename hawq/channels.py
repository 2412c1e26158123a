"""Channels followed through a graph: which layers read a channel of a result, and whether it may be scaled on the way.

Every element of a result is numbered with its channel; operations that move values move the numbers. A channel may be
scaled by s > 0 behind its source and by 1/s in its readers where every operation between is positively homogeneous,
f(s x) = s f(x), and keeps channels apart.
"""

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from hawq.graph import LAYER_OPERATIONS, MOVING, Layer, argument, own_tensor

aten = torch.ops.aten

_ELEMENTWISE = frozenset(
    (aten.relu.default, aten.leaky_relu.default, aten.abs.default, aten.neg.default, aten.dropout.default, aten.alias.default)
)
_MOVING = MOVING | {aten.unbind.int, operator.getitem}
_REDUCING = frozenset((aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default))
_PER_PLACE = frozenset(  # operations on the places of each channel, channels second
    (
        aten.adaptive_avg_pool1d.default,
        aten.adaptive_avg_pool2d.default,
        aten.adaptive_avg_pool3d.default,
        aten.avg_pool1d.default,
        aten.avg_pool2d.default,
        aten.avg_pool3d.default,
        aten.max_pool1d.default,
        aten.max_pool2d.default,
        aten.max_pool3d.default,
    )
)
_CLIPPING = frozenset((aten.clamp.default, aten.clamp_min.default, aten.hardtanh.default, aten.relu6.default))
_DEFAULT_LIMITS: dict[Any, tuple[float, float]] = {aten.hardtanh.default: (-1.0, 1.0), aten.relu6.default: (0.0, 6.0)}


@dataclass(frozen=True)
class Readers:
    """layers: for each layer that reads, the source's channel that each of its input channels holds. free: (channels,), those
    that reach layers and nothing else. barrier: the first operation found that stops the others."""

    layers: dict[str, torch.Tensor]
    free: torch.Tensor
    barrier: fx.Node | None

    def column_maxima(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """(channels,): the largest of non-negative values, each shaped like the reader's weight or (input channels,), over
        all columns that read a channel."""
        largest = torch.zeros(len(self.free), dtype=torch.float64)
        for reader, channels in self.layers.items():
            value = values[reader]
            columns = value if value.dim() == 1 else _by_input(value, len(channels)).amax((1, 3)).flatten()
            largest.scatter_reduce_(0, channels, columns.to(largest.dtype), "amax")
        return largest

    def scaled_columns(self, reader: str, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The reader's weight with the columns of each channel times that channel's scale, (channels,)."""
        columns = _by_input(weight, len(self.layers[reader]))
        factor = scale[self.layers[reader]].view(columns.shape[0], 1, columns.shape[2], 1)
        return (columns * factor).view_as(weight)


def find_readers(source: fx.Node, dim: int, layers: dict[str, Layer]) -> Readers:
    """The readers of the channels of `source`, a tensor whose channels are at `dim`."""
    shape = _shape(source)
    channels = torch.arange(shape[dim])
    free, reached = torch.ones(shape[dim], dtype=torch.bool), torch.zeros(shape[dim], dtype=torch.bool)
    names = {layer.node: name for name, layer in layers.items()}
    readers: dict[str, torch.Tensor] = {}
    barrier: fx.Node | None = None
    spread = [1] * len(shape)
    spread[dim] = -1
    pending: list[tuple[fx.Node, Any]] = [(source, channels.view(spread).expand(shape))]
    while pending:
        node, numbers = pending.pop()
        for user in node.users:
            if user.target is aten.sym_size.int:
                continue
            if user in names and user.args[0] is node:
                read = _constant_but(numbers, -1 if user.target is aten.linear.default else 1)
                if read is not None:
                    readers[names[user]] = read
                    reached[read] = True
                    continue
            moved = _follow(user, node, numbers)
            if moved is None:
                held = numbers if isinstance(numbers, torch.Tensor) else torch.cat([part.flatten() for part in numbers])
                free[held.flatten().unique()] = False
                barrier = barrier or user
            else:
                pending.append((user, moved))
    return Readers(readers, free & reached, barrier)


def scalable(layer: Layer) -> bool:
    """Whether a layer's bias, like its weight, is its own."""
    return layer.bias is None or own_tensor(argument(layer.node, 2)) is not None


def _by_input(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """(groups, output channels of a group, input channels of a group, kernel): a view."""
    return weight.reshape(channels // weight.shape[1], -1, weight.shape[1], weight[0, 0].numel())


def _follow(node: fx.Node, source: fx.Node, numbers: Any) -> Any:
    """The channel numbers in the result of `node`, None where its channels may not be scaled."""
    if node.op != "call_function" or node.target in LAYER_OPERATIONS:
        return None
    if node.target is operator.getitem:
        return numbers[node.args[1]]
    if node.target is aten.scaled_dot_product_attention.default or node.target is aten.matmul.default:
        # Sums of values over tokens, with weights that do not depend on the values.
        value = 2 if node.target is aten.scaled_dot_product_attention.default else 1
        if [at for at, argument in enumerate(node.args) if argument is source] != [value] or numbers.dim() < 2:
            return None
        return _expanded(numbers, -2, _shape(node))
    if node.args[0] is not source or sum(read is source for read in _flat(node.args)) > 1:
        return None
    if node.target in _MOVING:
        arguments = fx.map_arg(node.args, lambda read: numbers.contiguous() if read is source else _size(read))
        return node.target(*arguments)  # type: ignore[operator]
    if node.target in _ELEMENTWISE or _is_scaling(node) or (node.target in _CLIPPING and _is_homogeneous(node)):
        return numbers
    if node.target in _REDUCING:
        dims = node.args[1] if len(node.args) > 1 else None
        if not dims or (numbers.amax(dims) != numbers.amin(dims)).any():
            return None
        return numbers.amax(dims).reshape(_shape(node))
    if node.target in _PER_PLACE or _pads_places(node, numbers.dim()):
        kept = _constant_but(numbers, 1)
        return None if kept is None else kept.view(-1, *(1,) * (numbers.dim() - 2)).expand(_shape(node))
    return None


def _is_scaling(node: fx.Node) -> bool:
    return node.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(node.args[1], int | float)


def _is_homogeneous(node: fx.Node) -> bool:
    """Whether both ends of a clip are 0 or infinite."""
    low: Any
    high: Any
    low, high = _DEFAULT_LIMITS.get(node.target, (None, None))
    low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min", low)
    high = node.args[2] if len(node.args) > 2 else node.kwargs.get("max", high)
    return all(end is None or (isinstance(end, int | float) and (end == 0 or math.isinf(end))) for end in (low, high))


def _pads_places(node: fx.Node, dims: int) -> bool:
    """Whether `node` pads neither channels nor examples, and with nothing but zeros and the tensor's own values."""
    if node.target not in (aten.pad.default, aten.constant_pad_nd.default):
        return False
    constant = node.target is aten.constant_pad_nd.default or (node.args[2] if len(node.args) > 2 else "constant") == "constant"
    value = node.args[-1] if len(node.args) > (2 if node.target is aten.constant_pad_nd.default else 3) else 0
    return len(node.args[1]) <= 2 * (dims - 2) and not (constant and value)  # type: ignore[arg-type]


def _constant_but(numbers: torch.Tensor, dim: int) -> torch.Tensor | None:
    """The numbers along `dim`, None where they differ along another."""
    rows = numbers.movedim(dim, 0).flatten(1)
    return rows[:, 0] if (rows == rows[:, :1]).all() else None


def _expanded(numbers: torch.Tensor, dim: int, shape: list[int]) -> torch.Tensor | None:
    """`numbers`, the same along `dim`, spread to `shape`."""
    first = numbers.narrow(dim, 0, 1)
    return first.expand(shape) if (numbers == first).all() else None


def _flat(arguments: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(arguments, found.append)
    return found


def _shape(node: fx.Node) -> list[int]:
    """The shape of a result for the batch that the graph was traced with."""
    return [_hint(size) for size in node.meta["val"].shape]


def _size(node: fx.Node) -> int:
    return _hint(node.meta["val"])


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)
