r"""The arithmetic of affine quantization, as the ONNX operators define it, and nothing else.

.. math:: q = \mathrm{clip}(\mathrm{round}(x / s) + z,\, q_{\min},\, q_{\max}), \qquad \hat x = (q - z)\, s

with rounding to nearest, ties to even.
"""

from typing import Any

import torch
from torch import library


def check_width(bits: int) -> None:
    """Raise ValueError unless `bits` is a width that weights can have."""
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"a width of {bits} bits: weights take whole numbers from 2 to 8")


def signed_range(bits: int) -> tuple[int, int]:
    """qmin and qmax of a signed integer: -2^(b-1) and 2^(b-1) - 1."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def per_channel(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A (channels,) tensor, shaped to multiply `like`, whose first dimension is the channels."""
    return values.view(-1, *(1,) * (like.dim() - 1))


def quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | int, qmin: Any, qmax: Any) -> torch.Tensor:
    """Codes q of `x`, as whole numbers in x's dtype; qmin and qmax are numbers, or tensors that broadcast to x.

    >>> quantize(torch.tensor([-1.0, 0.26, 9.0]), torch.tensor(0.5), 0, *signed_range(3))
    tensor([-2.,  1.,  3.])
    """
    return (torch.round(x / scale) + zero_point).clamp(qmin, qmax)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | int = 0) -> torch.Tensor:
    """The real numbers that codes stand for, in the scale's dtype."""
    return (codes.to(scale.dtype) - zero_point) * scale


def spread(values: torch.Tensor, shape: tuple[int, ...], axis: int) -> torch.Tensor:
    """Values of channels, or of channels and groups of columns, shaped to multiply a weight of that shape."""
    if values.dim() == 2:
        return values.repeat_interleave(shape[1] // values.shape[1], 1)
    return values.view(*(-1 if dim == axis else 1 for dim in range(len(shape))))


# The two operations of a quantized network as single nodes, so that an exported graph shows them as such.


@library.custom_op("hawq::dequantize_weight", mutates_args=())
def dequantize_weight(codes: torch.Tensor, scale: torch.Tensor, axis: int) -> torch.Tensor:
    """Integer codes times their scale: (channels,) along `axis`, or (channels, groups) for equal groups of columns."""
    return codes.to(scale.dtype) * spread(scale, tuple(codes.shape), axis)


@dequantize_weight.register_fake
def _(codes: torch.Tensor, scale: torch.Tensor, axis: int) -> torch.Tensor:
    del axis
    return codes.new_empty(codes.shape, dtype=scale.dtype)


@library.custom_op("hawq::round_activation", mutates_args=())
def round_activation(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmax: int) -> torch.Tensor:
    """`x` rounded to the values of an unsigned byte from 0 to qmax with that scale and zero point (both scalars)."""
    return dequantize(quantize(x, scale, zero_point, 0, qmax), scale, zero_point)


@round_activation.register_fake
def _(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmax: int) -> torch.Tensor:
    del scale, zero_point, qmax
    return torch.empty_like(x)
