r"""Convolutions and batch norms whose second backward pass costs no more than it must.

torch differentiates its convolution backward with general code that treats batches as channels and loops over groups,
and the backward of a batch norm that uses its running statistics as if they were the batch's. Here the same derivatives are
written with the kernels that training uses. For y = x * W (a convolution) and the gradient g of y,

.. math:: g_x = g \star W, \qquad g_W = x \star g,

with cotangents u of g_x and U of g_W, the second backward pass is

.. math:: \bar g = u * W + x * U, \qquad \bar x = g \star U, \qquad \bar W = u \star g:

two convolutions forward and one ordinary backward of a convolution of u with U.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS: dict[Callable[..., Any], int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


class CheapSecondBackward(TorchFunctionMode):
    """Inside, convolutions and batch norms are recorded so that differentiating twice is cheap; values stay the same."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = None
        if func in _CONVOLUTIONS:
            result = _convolution(_CONVOLUTIONS[func], *args, **kwargs)
        elif func is F.batch_norm:
            result = _batch_norm(*args, **kwargs)
        elif func is torch._weight_norm:
            result = _weight_norm(*args, **kwargs)
        return func(*args, **kwargs) if result is None else result


def _convolution(
    dimensions: int,
    input: torch.Tensor,  # noqa: A002  # torch's name for it
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor | None:
    """The convolution; None for what is left to torch: padding by name, autocast, torch.func, batchless or unusual input."""
    plain = all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in (input, weight))
    if isinstance(padding, str) or not plain or not torch.is_grad_enabled() or torch.is_autocast_enabled(input.device.type):
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:  # inside vmap, jvp, grad of torch.func
        return None
    if input.dim() != dimensions + 2 or input.dtype != weight.dtype or not input.is_floating_point():
        return None
    settings = [(value,) * dimensions if isinstance(value, int) else tuple(value) for value in (stride, padding, dilation)]
    settings = [value * dimensions if len(value) == 1 else value for value in settings]
    return _Convolution.apply(input, weight, bias, *settings, False, (0,) * dimensions, groups)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *settings: Any
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.settings = settings
        return torch.ops.aten.convolution(inputs, weight, bias, *settings)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        inputs, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        return (*_ConvolutionBackward.apply(gradient, inputs, weight, ctx.settings, wanted), *(None for _ in ctx.settings))


class _ConvolutionBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gradient: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, settings: Any, wanted: tuple[bool, ...]
    ) -> Any:
        ctx.save_for_backward(gradient, inputs, weight)
        ctx.set_materialize_grads(False)
        ctx.settings = settings
        sizes = [weight.shape[0]] if wanted[2] else None
        return torch.ops.aten.convolution_backward(gradient, inputs, weight, sizes, *settings, list(wanted))

    @staticmethod
    def backward(ctx: Any, of_inputs: torch.Tensor | None, of_weight: torch.Tensor | None, of_bias: torch.Tensor | None) -> Any:
        gradient, inputs, weight = ctx.saved_tensors
        needs_gradient, needs_inputs, needs_weight = ctx.needs_input_grad[:3]
        parts = []
        if needs_gradient and of_inputs is not None:
            parts.append(_Convolution.apply(of_inputs, weight, None, *ctx.settings))
        if needs_gradient and of_weight is not None:
            parts.append(_Convolution.apply(inputs, of_weight, None, *ctx.settings))
        if needs_gradient and of_bias is not None:
            parts.append(of_bias.view(1, -1, *(1,) * (gradient.dim() - 2)).expand_as(gradient))
        by_inputs = by_weight = None
        wanted = (needs_inputs and of_weight is not None, needs_weight and of_inputs is not None, False)
        if any(wanted):
            first = inputs if of_inputs is None else of_inputs
            second = weight if of_weight is None else of_weight
            by_inputs, by_weight, _ = _ConvolutionBackward.apply(gradient, first, second, ctx.settings, wanted)
        return sum(parts[1:], parts[0]) if parts else None, by_inputs, by_weight, None, None


def _weight_norm(v: torch.Tensor, g: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """v g / |v|, by its formula: torch's own second derivative of it takes the norm for a constant."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _batch_norm(
    input: torch.Tensor,  # noqa: A002  # torch's name for it
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,  # noqa: ARG001  # of no use without training
    eps: float = 1e-5,
) -> torch.Tensor | None:
    """x s + t with s = weight / sqrt(var + eps), t = bias - mean s; None for what is left to torch."""
    if training or running_mean is None or running_var is None or torch.is_autocast_enabled(input.device.type):
        return None
    if input.dim() < 2 or input.dtype != running_var.dtype:
        return None
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else weight * scale
    shift = -running_mean * scale
    shift = shift if bias is None else bias + shift
    shape = (1, -1) + (1,) * (input.dim() - 2)
    return input * scale.view(shape) + shift.view(shape)
