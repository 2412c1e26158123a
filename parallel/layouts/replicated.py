"""Between tensors that every rank has and their parts, in pairs of operations that are each other's derivative.

A replicated tensor is one tensor, whose gradient every rank knows in full. It can be used in parts of a sum (Megatron's f and
g, Shoeybi et al. 2019, section 3), or cut into blocks.
"""

from typing import Any

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from parallel.halo import Exchange, moved, own_part


def used_in_parts(x: torch.Tensor, group: ProcessGroup | None = None) -> torch.Tensor:
    """`x`, which every rank has, on its way into work that ranks divide among them: the gradients of all add up."""
    result: torch.Tensor = _UsedInParts.apply(x, group)
    return result


def summed(x: torch.Tensor, group: ProcessGroup | None = None) -> torch.Tensor:
    """The sum of every rank's `x`, on every rank."""
    result: torch.Tensor = _Summed.apply(x, group)
    return result


def gathered(block: torch.Tensor, exchange: Exchange) -> torch.Tensor:
    """The whole tensor, on every rank, of the blocks that they own. exchange: of which every rank needs all."""
    result: torch.Tensor = _Gathered.apply(block, exchange)
    return result


def sliced(x: torch.Tensor, exchange: Exchange) -> torch.Tensor:
    """The block that this rank owns, of a tensor that every rank has: the inverse of `gathered`."""
    result: torch.Tensor = _Sliced.apply(x, exchange)
    return result


class _UsedInParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Summed.apply(gradient, ctx.group), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
        ctx.group = group
        total = x.contiguous().clone()
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _UsedInParts.apply(gradient, ctx.group), None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        ctx.exchange = exchange
        return moved(block, exchange.owned, exchange.needed, exchange)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Sliced.apply(gradient, ctx.exchange), None


class _Sliced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        ctx.exchange = exchange
        rank = exchange.rank
        return own_part(x, exchange.needed[rank], exchange.owned[rank], exchange.dims).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Gathered.apply(gradient, ctx.exchange), None
