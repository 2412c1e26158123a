"""Linear maps between processes, differentiable any number of times."""

from collections.abc import Callable
from typing import Any

import torch

Map = Callable[[torch.Tensor], torch.Tensor]


def linear_map(x: torch.Tensor, forth: Map, back: Map) -> torch.Tensor:
    """`forth(x)`, whose derivative is the adjoint map `back`, the derivative of that `forth` again, and so on.

    Both must be linear and return new tensors or views; neither is differentiated itself. Where they send messages, every
    process must call this, and differentiate it, in the same order.
    """
    result: torch.Tensor = _LinearMap.apply(x, forth, back)
    return result


class _LinearMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forth: Map, back: Map) -> torch.Tensor:
        ctx.maps = forth, back
        return forth(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        forth, back = ctx.maps
        return _LinearMap.apply(gradient, back, forth), None, None
