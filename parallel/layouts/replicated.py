"""Between tensors that every rank has and their parts, in pairs of operations that are each other's derivative.

A replicated tensor is one tensor, whose gradient every rank knows in full. It can be used in parts of a sum (Megatron's f and
g, Shoeybi et al. 2019, section 3), or cut into blocks.
"""

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from parallel.halo import Exchange, moved, own_part
from parallel.linear_map import Map, linear_map


def used_in_parts(x: torch.Tensor, group: ProcessGroup | None = None) -> torch.Tensor:
    """`x`, which every rank has, on its way into work that ranks divide among them: the gradients of all add up."""
    return linear_map(x, _same, _sum_over(group))


def summed(x: torch.Tensor, group: ProcessGroup | None = None) -> torch.Tensor:
    """The sum of every rank's `x`, on every rank."""
    return linear_map(x, _sum_over(group), _same)


def gathered(block: torch.Tensor, exchange: Exchange) -> torch.Tensor:
    """The whole tensor, on every rank, of the blocks that they own. exchange: of which every rank needs all."""
    return linear_map(block, lambda own: moved(own, exchange), lambda whole: _cut(whole, exchange))


def sliced(x: torch.Tensor, exchange: Exchange) -> torch.Tensor:
    """The block that this rank owns, of a tensor that every rank has: the inverse of `gathered`."""
    return linear_map(x, lambda whole: _cut(whole, exchange), lambda own: moved(own, exchange))


def _same(x: torch.Tensor) -> torch.Tensor:
    return x.view_as(x)


def _sum_over(group: ProcessGroup | None) -> Map:
    def total(x: torch.Tensor) -> torch.Tensor:
        result = x.contiguous().clone()
        distributed.all_reduce(result, group=group)
        return result

    return total


def _cut(x: torch.Tensor, exchange: Exchange) -> torch.Tensor:
    rank = exchange.rank
    return own_part(x, exchange.needed[rank], exchange.owned[rank], exchange.dims).contiguous()
