r"""Dyadic rescaling: multiplication by a real number in integers alone.

.. math:: r \approx m / 2^c, \qquad \mathrm{round}(r x) \approx (m x) \gg c

with rounding to nearest, ties to even, as QuantizeLinear rounds. Yao et al. 2021, HAWQ-V3, section 3.1, equation 4.
"""

from dataclasses import dataclass

import torch

MAX_BITS = 31
_PRODUCT_BITS = 62  # of m * x, which is added up and rounded in an int64


@dataclass(frozen=True)
class Dyadic:
    """The numbers multiplier / 2^shift: int64 tensors of any one broadcastable shape, |multiplier| <= 2^31, shift 0 to 62."""

    multiplier: torch.Tensor
    shift: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """round(x * multiplier / 2^shift), exactly, for int64 `x` with |x * multiplier| <= 2^62."""
        return shift_right(x * self.multiplier, self.shift)


def shift_right(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """round(x / 2^shift), ties to even, for int64 tensors with |x| <= 2^62 and shift 0 to 62.

    >>> shift_right(torch.tensor([5, 6, 7, 10]), torch.tensor(2)).tolist()  # 1.25, 1.5, 1.75, 2.5
    [1, 2, 2, 2]
    """
    half = (torch.ones_like(shift) << shift) >> 1
    up = (x + half) >> shift
    tie = ((up << shift) - x == half) & (half > 0)
    return up - (tie & (up & 1 == 1)).to(up.dtype)


def dyadic(ratio: torch.Tensor, bits: int = MAX_BITS, room: torch.Tensor | int = _PRODUCT_BITS) -> Dyadic:
    """The multiplier and shift nearest to each `ratio` (float64), with multipliers of `bits` bits.

    |m / 2^c - r| <= 2^-bits |r| as long as that takes c <= `room`; below it |m / 2^c - r| <= 2^-(room + 1).

    Raises ValueError for ratios that are not finite, or so large that no shift to the right is left.

    >>> number = dyadic(torch.tensor(0.75, dtype=torch.float64), bits=8)
    >>> int(number.multiplier) / 2 ** int(number.shift)
    0.75
    """
    ratio = ratio.double()
    if not bool(torch.isfinite(ratio).all()):
        raise ValueError("a ratio of scales is not finite: the quantizers are not calibrated, or a scale is 0")
    shift = torch.minimum(bits - torch.frexp(ratio).exponent.long(), torch.as_tensor(room, device=ratio.device))
    multiplier = torch.round(torch.ldexp(ratio, shift)).long()
    full = multiplier.abs() == 2**bits  # rounded up to one bit more
    multiplier, shift = torch.where(full, multiplier >> 1, multiplier), shift - full.long()
    if bool((shift < 0).any()):
        raise ValueError(f"a ratio of scales of {float(ratio.abs().max()):.3g} needs more than {bits} bits")
    return Dyadic(multiplier, shift)


def room_for(reach: torch.Tensor) -> torch.Tensor:
    """The largest shift with which results of up to `reach` fit their 62 bits before they are shifted.

    Raises ValueError where that leaves less than a byte behind the point.
    """
    room = _PRODUCT_BITS - torch.ceil(torch.log2(reach.double() + 1)).long()
    if bool((room < 8).any()):
        raise ValueError(f"integers of up to {float(reach.max()):.3g} cannot be rescaled in 64 bits: the layer is too large")
    return room
