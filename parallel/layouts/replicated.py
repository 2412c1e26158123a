"""Between tensors that every rank has and parts that add up: two operations, each the other's derivative.

Megatron's f and g (Shoeybi et al. 2019, section 3). A replicated tensor is one tensor, whose gradient every rank knows in full;
parts of a sum have gradients of their own, all the same.
"""

from typing import Any

import torch
from torch import distributed
from torch.distributed import ProcessGroup


def used_in_parts(x: torch.Tensor, group: ProcessGroup | None = None) -> torch.Tensor:
    """`x`, which every rank has, on its way into work that ranks divide among them: the gradients of all add up."""
    result: torch.Tensor = _UsedInParts.apply(x, group)
    return result


def summed(x: torch.Tensor, group: ProcessGroup | None = None) -> torch.Tensor:
    """The sum of every rank's `x`, on every rank."""
    result: torch.Tensor = _Summed.apply(x, group)
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
