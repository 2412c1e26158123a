"""A fetch that is under way while other work is done, and so are its derivatives of any order.

`begin` sends, `end` waits. In a backward pass the gradients of what was fetched are sent where `end` stood, and waited for
where `begin` stood: autograd does the work between the two in between, as its nodes are taken latest first.
"""

from collections.abc import Sequence
from typing import Any

import torch

from parallel.halo import Exchange, Messages


class OverlappedFetch:
    """Blocks of one divided tensor: those of several exchanges, of which this rank owns the same block and needs none of it.

    Every rank of the group must begin and end, and use what was fetched in its result, even where that is empty: its
    derivatives send messages, too.
    """

    def __init__(self, exchanges: Sequence[Exchange]) -> None:
        self.exchanges = exchanges
        self.shape = torch.Size()
        self._under_way: list[Messages] = []

    def begin(self, block: torch.Tensor) -> torch.Tensor:
        """Send this rank's `block`; what is returned goes into `end` and nowhere else."""
        for exchange in self.exchanges:
            exchange.check(block)
        self.shape = block.shape
        result: torch.Tensor = _Begin.apply(block, self)
        return result

    def end(self, begun: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What each exchange brought."""
        result: tuple[torch.Tensor, ...] = _End.apply(begun, self)
        return result

    def send(self, blocks: Sequence[torch.Tensor], exchanges: Sequence[Exchange]) -> None:
        """Messages of blocks[i] by exchanges[i]."""
        assert not self._under_way, "a fetch was begun again before it ended"
        self._under_way = [Messages(block, exchange) for block, exchange in zip(blocks, exchanges, strict=True)]

    def received(self) -> list[Messages]:
        """The messages under way, which are under way no more."""
        messages, self._under_way = self._under_way, []
        return messages


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: torch.Tensor, fetch: OverlappedFetch) -> torch.Tensor:
        ctx.fetch = fetch
        fetch.send([block] * len(fetch.exchanges), fetch.exchanges)
        return block.view_as(block)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _EndBack.apply(gradient, ctx.fetch), None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, begun: torch.Tensor, fetch: OverlappedFetch) -> tuple[torch.Tensor, ...]:
        del begun
        ctx.fetch = fetch
        return tuple(messages.received() for messages in fetch.received())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _BeginBack.apply(ctx.fetch, *gradients), None


class _BeginBack(torch.autograd.Function):
    """The adjoint of `_End`."""

    @staticmethod
    def forward(ctx: Any, fetch: OverlappedFetch, *gradients: torch.Tensor) -> torch.Tensor:
        ctx.fetch = fetch
        fetch.send(gradients, [exchange.adjoint for exchange in fetch.exchanges])
        return gradients[0].new_zeros(()).expand(fetch.shape)

    @staticmethod
    def backward(ctx: Any, direction: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *_End.apply(direction, ctx.fetch)


class _EndBack(torch.autograd.Function):
    """The adjoint of `_Begin`."""

    @staticmethod
    def forward(ctx: Any, begun: torch.Tensor, fetch: OverlappedFetch) -> torch.Tensor:
        ctx.fetch = fetch
        result = torch.zeros_like(begun, memory_format=torch.contiguous_format)
        for messages in fetch.received():
            messages.added_to(result)
        return result

    @staticmethod
    def backward(ctx: Any, direction: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Begin.apply(direction, ctx.fetch), None
