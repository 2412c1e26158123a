"""Rows of a divided dimension fetched from the ranks that own them, differentiable any number of times.

A tensor's rows are owned in consecutive parts, one a rank. Each rank needs a range of rows of its own choice, which may reach
over several neighbours. Fetching is linear; its adjoint sends the gradients of fetched rows back to their owners, who add them
up, and the adjoint of that is fetching again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import distributed
from torch.distributed import P2POp, ProcessGroup

Range = tuple[int, int]  # first row, and the one behind the last


@dataclass(frozen=True)
class RowExchange:
    """Which rows each rank of `group` owns and which it needs, and the dimension that they lie along.

    group: None is the default group. owned: consecutive ranges that cover all rows, one a rank; needed: any ranges of them.
    """

    owned: tuple[Range, ...]
    needed: tuple[Range, ...]
    dim: int = 2
    group: ProcessGroup | None = None

    def __post_init__(self) -> None:
        size = distributed.get_world_size(self.group)
        for name, ranges in (("owned", self.owned), ("needed", self.needed)):
            if len(ranges) != size:
                raise ValueError(f"{len(ranges)} ranges are {name} by {size} ranks: give one for each")
        borders = [0, *(end for _, end in self.owned)]
        if any(one != (start, end) or start > end for one, start, end in zip(self.owned, borders, borders[1:], strict=False)):
            raise ValueError(f"the ranges {self.owned} are not consecutive: each must begin where the one before ends")
        for rank, (start, end) in enumerate(self.needed):
            if not 0 <= start <= end <= borders[-1]:
                raise ValueError(f"rank {rank} needs rows {start} to {end} of {borders[-1]}")

    @property
    def rank(self) -> int:
        """This process's position in the group."""
        return distributed.get_rank(self.group)

    def shared(self, owner: int, reader: int) -> Range:
        """The rows of `owner` that `reader` needs; empty ranges begin where they end."""
        start = max(self.owned[owner][0], self.needed[reader][0])
        return start, max(start, min(self.owned[owner][1], self.needed[reader][1]))

    def sent_rows(self, rank: int) -> int:
        """Rows that a rank sends in a fetch, and receives in the adjoint."""
        pairs = (self.shared(rank, reader) for reader in range(len(self.needed)) if reader != rank)
        return sum(end - start for start, end in pairs)


def partition(rows: int, ranks: int) -> tuple[Range, ...]:
    """`rows` divided as evenly as they can be, the first ranks having one more."""
    share, rest = divmod(rows, ranks)
    borders = [rank * share + min(rank, rest) for rank in range(ranks + 1)]
    return tuple(pairwise(borders))


def fetch(rows: torch.Tensor, exchange: RowExchange) -> torch.Tensor:
    """The rows that this rank needs; `rows` are those that it owns. Every rank of the group must call it."""
    start, end = exchange.owned[exchange.rank]
    if rows.shape[exchange.dim] != end - start:
        raise ValueError(f"there are {rows.shape[exchange.dim]} rows, and this rank owns rows {start} to {end}")
    result: torch.Tensor = _Fetch.apply(rows, exchange)
    return result


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, exchange: RowExchange) -> torch.Tensor:
        ctx.exchange = exchange
        return _fetched(rows, exchange)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _SendBack.apply(gradient, ctx.exchange), None


class _SendBack(torch.autograd.Function):
    """The adjoint of `_Fetch`."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, exchange: RowExchange) -> torch.Tensor:
        ctx.exchange = exchange
        return _sent_back(gradient, exchange)

    @staticmethod
    def backward(ctx: Any, direction: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Fetch.apply(direction, ctx.exchange), None


def _fetched(rows: torch.Tensor, exchange: RowExchange) -> torch.Tensor:
    me, dim, first = exchange.rank, exchange.dim, exchange.owned[exchange.rank][0]
    sent, received = {}, {}
    own = _like(rows, dim, 0)
    for other in range(len(exchange.owned)):
        start, end = exchange.shared(me, other)
        if start < end:
            part = rows.narrow(dim, start - first, end - start)
            if other == me:
                own = part
            else:
                sent[other] = part
        start, end = exchange.shared(other, me)
        if other != me and start < end:
            received[other] = _like(rows, dim, end - start)
    _exchange(sent, received, exchange.group)
    parts = {**received, me: own}
    return torch.cat([parts[rank] for rank in sorted(parts)], dim)


def _sent_back(gradient: torch.Tensor, exchange: RowExchange) -> torch.Tensor:
    me, dim = exchange.rank, exchange.dim
    (first, last), needed = exchange.owned[me], exchange.needed[me][0]
    sent, received = {}, {}
    for other in range(len(exchange.owned)):
        start, end = exchange.shared(other, me)
        if other != me and start < end:
            sent[other] = gradient.narrow(dim, start - needed, end - start)
        start, end = exchange.shared(me, other)
        if other != me and start < end:
            received[other] = _like(gradient, dim, end - start)
    _exchange(sent, received, exchange.group)
    result = torch.zeros_like(_like(gradient, dim, last - first))
    start, end = exchange.shared(me, me)
    if start < end:
        result.narrow(dim, start - first, end - start).copy_(gradient.narrow(dim, start - needed, end - start))
    for other in sorted(received):  # one order on every run
        start, end = exchange.shared(me, other)
        result.narrow(dim, start - first, end - start).add_(received[other])
    return result


def _like(tensor: torch.Tensor, dim: int, rows: int) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[dim] = rows
    return tensor.new_empty(shape)


def _exchange(sent: dict[int, torch.Tensor], received: dict[int, torch.Tensor], group: ProcessGroup | None) -> None:
    """Send and receive, by rank in the group; all messages are under way at once."""
    ranks: Sequence[int] = distributed.get_process_group_ranks(group or distributed.group.WORLD)
    operations = [
        *(P2POp(distributed.isend, tensor.contiguous(), ranks[other], group) for other, tensor in sent.items()),
        *(P2POp(distributed.irecv, tensor, ranks[other], group) for other, tensor in received.items()),
    ]
    for work in distributed.batch_isend_irecv(operations) if operations else ():
        work.wait()
