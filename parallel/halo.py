"""Parts of a divided tensor fetched from the ranks that own them, differentiable any number of times.

Along each divided dimension every rank owns a range, and needs a range of its own choice, which may reach over several others'.
Fetching is linear; its adjoint sends the gradients of what was fetched back to the owners, who add them up, and the adjoint of
that is fetching again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import distributed
from torch.distributed import P2POp, ProcessGroup

from parallel.linear_map import linear_map

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

    @property
    def adjoint(self) -> "Exchange":
        """What was fetched goes back to its owners, who add it up."""
        return Exchange(self.needed, self.owned, self.dims, self.group)

    def check(self, block: torch.Tensor) -> None:
        """Raise ValueError for a block that is not the one that this rank owns."""
        for dim, (start, end) in zip(self.dims, self.owned[self.rank], strict=True):
            if block.shape[dim] != end - start:
                raise ValueError(f"there are {block.shape[dim]} rows, and this rank owns rows {start} to {end}")

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
    """`rows` divided as evenly as they can be, the first ranks having one more.

    >>> partition(7, 3)
    ((0, 3), (3, 5), (5, 7))
    """
    share, rest = divmod(rows, ranks)
    borders = [rank * share + min(rank, rest) for rank in range(ranks + 1)]
    return tuple(pairwise(borders))


def fetch(block: torch.Tensor, exchange: Exchange) -> torch.Tensor:
    """What this rank needs; `block` is what it owns. Every rank of the group must call it."""
    exchange.check(block)
    return linear_map(block, lambda own: moved(own, exchange), lambda needed: moved(needed, exchange.adjoint))


def moved(tensor: torch.Tensor, exchange: Exchange) -> torch.Tensor:
    """This rank's needed block: the sum of what all have of it. `tensor`: the block that this rank has."""
    return Messages(tensor, exchange).received()


class Messages:
    """The messages of an exchange, under way from the moment that this is made. Every rank of the group must make it."""

    def __init__(self, tensor: torch.Tensor, exchange: Exchange) -> None:
        self.exchange, self.tensor = exchange, tensor
        me, dims, owned, needed = exchange.rank, exchange.dims, exchange.owned, exchange.needed
        ranks = range(len(owned))
        self.blocks = {other: block for other in ranks if _size(block := _common(owned[other], needed[me]))}
        sent = {other: block for other in ranks if other != me and _size(block := _common(owned[me], needed[other]))}
        self.parts = {other: _empty(tensor, block, dims) for other, block in self.blocks.items() if other != me}
        self._sent = {other: own_part(tensor, owned[me], block, dims).contiguous() for other, block in sent.items()}
        self._works = _send_and_receive(self._sent, self.parts, exchange.group)

    def received(self) -> torch.Tensor:
        """The needed block, when all of it is there."""
        needed, dims = self.exchange.needed[self.exchange.rank], self.exchange.dims
        return self.added_to(torch.zeros_like(_empty(self.tensor, needed, dims)))

    def added_to(self, result: torch.Tensor) -> torch.Tensor:
        """`result`, the needed block, with everything that was received added to it in place."""
        exchange = self.exchange
        me, dims = exchange.rank, exchange.dims
        if me in self.blocks:
            self.parts[me] = own_part(self.tensor, exchange.owned[me], self.blocks[me], dims)
        for work in self._works:
            work.wait()
        for other in sorted(self.parts):  # one order on every run
            own_part(result, exchange.needed[me], self.blocks[other], dims).add_(self.parts[other])
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


def _send_and_receive(
    sent: dict[int, torch.Tensor], received: dict[int, torch.Tensor], group: ProcessGroup | None
) -> Sequence[distributed.Work]:
    """By rank in the group; all messages are under way at once."""
    ranks: Sequence[int] = distributed.get_process_group_ranks(group or distributed.group.WORLD)
    operations = [
        *(P2POp(distributed.isend, tensor, ranks[other], group) for other, tensor in sent.items()),
        *(P2POp(distributed.irecv, tensor, ranks[other], group) for other, tensor in received.items()),
    ]
    return distributed.batch_isend_irecv(operations) if operations else ()
