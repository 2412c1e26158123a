"""Parts of a divided tensor fetched from the ranks that own them, differentiable any number of times.

Along each divided dimension every rank owns a range, and needs a range of its own choice, which may reach over several others'.
Fetching is linear; its adjoint sends the gradients of what was fetched back to the owners, who add them up, and the adjoint of
that is fetching again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import distributed
from torch.distributed import P2POp, ProcessGroup

Range = tuple[int, int]  # first row, and the one behind the last


Block = tuple[Range, ...]  # a range for each divided dimension


@dataclass(frozen=True)
class Exchange:
    """Which block of a tensor each rank of `group` owns and which it needs, along the dimensions `dims`.

    group: None is the default group. owned: blocks that cover the tensor once, one a rank; needed: any blocks of it.
    """

    owned: tuple[Block, ...]
    needed: tuple[Block, ...]
    dims: tuple[int, ...]
    group: ProcessGroup | None = None

    @property
    def rank(self) -> int:
        """This process's position in the group."""
        return distributed.get_rank(self.group)

    def sent(self, rank: int) -> int:
        """Entries of the divided dimensions that a rank sends in a fetch, and receives in the adjoint."""
        others = (needed for reader, needed in enumerate(self.needed) if reader != rank)
        return sum(_size(_common(self.owned[rank], needed)) for needed in others)


def row_exchange(
    owned: tuple[Range, ...], needed: tuple[Range, ...], dim: int = 2, group: ProcessGroup | None = None
) -> Exchange:
    """The exchange along one dimension; ValueError for ranges that do not follow each other or that reach beyond the end."""
    size = distributed.get_world_size(group)
    for name, ranges in (("owned", owned), ("needed", needed)):
        if len(ranges) != size:
            raise ValueError(f"{len(ranges)} ranges are {name} by {size} ranks: give one for each")
    borders = [0, *(end for _, end in owned)]
    if any(one != (start, end) or start > end for one, start, end in zip(owned, borders, borders[1:], strict=False)):
        raise ValueError(f"the ranges {owned} are not consecutive: each must begin where the one before ends")
    for rank, (start, end) in enumerate(needed):
        if not 0 <= start <= end <= borders[-1]:
            raise ValueError(f"rank {rank} needs rows {start} to {end} of {borders[-1]}")
    return Exchange(tuple((one,) for one in owned), tuple((one,) for one in needed), (dim,), group)


def partition(rows: int, ranks: int) -> tuple[Range, ...]:
    """`rows` divided as evenly as they can be, the first ranks having one more."""
    share, rest = divmod(rows, ranks)
    borders = [rank * share + min(rank, rest) for rank in range(ranks + 1)]
    return tuple(pairwise(borders))


def fetch(block: torch.Tensor, exchange: Exchange) -> torch.Tensor:
    """What this rank needs; `block` is what it owns. Every rank of the group must call it."""
    for dim, (start, end) in zip(exchange.dims, exchange.owned[exchange.rank], strict=True):
        if block.shape[dim] != end - start:
            raise ValueError(f"there are {block.shape[dim]} rows, and this rank owns rows {start} to {end}")
    result: torch.Tensor = _Fetch.apply(block, exchange)
    return result


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        ctx.exchange = exchange
        return moved(block, exchange.owned, exchange.needed, exchange)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _SendBack.apply(gradient, ctx.exchange), None


class _SendBack(torch.autograd.Function):
    """The adjoint of `_Fetch`."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        ctx.exchange = exchange
        return moved(gradient, exchange.needed, exchange.owned, exchange)

    @staticmethod
    def backward(ctx: Any, direction: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Fetch.apply(direction, ctx.exchange), None


def moved(tensor: torch.Tensor, held: tuple[Block, ...], wanted: tuple[Block, ...], exchange: Exchange) -> torch.Tensor:
    """This rank's wanted block: the sum of what all hold of it. `tensor`: the block that this rank holds."""
    me, dims = exchange.rank, exchange.dims
    ranks = range(len(held))
    sent = {other: own_part(tensor, held[me], _common(held[me], wanted[other]), dims) for other in ranks}
    arriving = {other: _common(held[other], wanted[me]) for other in ranks if _size(_common(held[other], wanted[me]))}
    parts = {other: _empty(tensor, block, dims) for other, block in arriving.items() if other != me}
    _send_and_receive({other: part for other, part in sent.items() if other != me and part.numel()}, parts, exchange.group)
    if me in arriving:
        parts[me] = sent[me]
    result = torch.zeros_like(_empty(tensor, wanted[me], dims))
    for other in sorted(parts):  # one order on every run
        own_part(result, wanted[me], arriving[other], dims).add_(parts[other])
    return result


def _common(one: Block, other: Block) -> Block:
    """The block that two have in common; an empty range ends where it begins."""
    ranges = []
    for (start, end), (other_start, other_end) in zip(one, other, strict=True):
        first = max(start, other_start)
        ranges.append((first, max(first, min(end, other_end))))
    return tuple(ranges)


def _size(block: Block) -> int:
    return math.prod(end - start for start, end in block)


def own_part(tensor: torch.Tensor, held: Block, wanted: Block, dims: tuple[int, ...]) -> torch.Tensor:
    """A view of the block `wanted` of a tensor that holds the block `held`."""
    for dim, (first, _), (start, end) in zip(dims, held, wanted, strict=True):
        tensor = tensor.narrow(dim, start - first if end > start else 0, end - start)
    return tensor


def _empty(like: torch.Tensor, block: Block, dims: tuple[int, ...]) -> torch.Tensor:
    shape = list(like.shape)
    for dim, (start, end) in zip(dims, block, strict=True):
        shape[dim] = end - start
    return like.new_empty(shape)


def _send_and_receive(sent: dict[int, torch.Tensor], received: dict[int, torch.Tensor], group: ProcessGroup | None) -> None:
    """By rank in the group; all messages are under way at once."""
    ranks: Sequence[int] = distributed.get_process_group_ranks(group or distributed.group.WORLD)
    operations = [
        *(P2POp(distributed.isend, tensor.contiguous(), ranks[other], group) for other, tensor in sent.items()),
        *(P2POp(distributed.irecv, tensor, ranks[other], group) for other, tensor in received.items()),
    ]
    for work in distributed.batch_isend_irecv(operations) if operations else ():
        work.wait()
