r"""Dyadic rescaling: multiplication by a real number in integers alone.

.. math:: r \approx m / 2^c, \qquad \mathrm{round}(r x) \approx (m x) \gg c

with rounding to nearest, ties to even, as QuantizeLinear rounds. Yao et al. 2021, HAWQ-V3, section 3.1, equation 4.
"""

from collections.abc import Sequence
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
    """round(x / 2^shift), ties to even, for int64 tensors with |x| <= 2^62 and shift 0 to 62."""
    half = (torch.ones_like(shift) << shift) >> 1
    up = (x + half) >> shift
    tie = ((up << shift) - x == half) & (half > 0)
    return up - (tie & (up & 1 == 1)).to(up.dtype)


def dyadic(ratio: torch.Tensor, bits: int = MAX_BITS, bound: int = 1) -> Dyadic:
    """The multiplier and shift nearest to each `ratio` (float64, positive), with multipliers of `bits` bits.

    |m / 2^c - r| <= 2^-bits r, as long as c <= 62; below that ratio the error is at most 2^-63. `bound`: the largest
    magnitude that will be multiplied; where that times m would pass 2^62, m gets fewer bits.

    Raises ValueError for ratios that are not positive and finite, or so large that no shift to the right is left.
    """
    if not bool((torch.isfinite(ratio) & (ratio > 0)).all()):
        raise ValueError("a ratio of scales is zero, negative or not finite: calibrate the quantizers first")
    bits = _affordable(bits, bound)
    exponent = torch.frexp(ratio.double()).exponent
    shift = (bits - exponent.long()).clamp(max=_PRODUCT_BITS)
    if bool((shift < 0).any()):
        raise ValueError(f"a ratio of scales of {float(ratio.max()):.3g} needs more than {bits} bits")
    multiplier = torch.round(torch.ldexp(ratio.double(), shift)).long()
    full = (multiplier == 2**bits) & (shift > 0)
    return Dyadic(torch.where(full, multiplier >> 1, multiplier), shift - full.long())


def shared_dyadics(
    ratios: Sequence[torch.Tensor], bits: int = MAX_BITS, bound: int = 1
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Multipliers m_i (int64, signed) and one shift c for sums sum_i r_i x_i that are rounded once: sum_i m_i x_i >> c.

    The largest |r| gets `bits` bits; |m_i / 2^c - r_i| <= 2^-bits max |r|. `bound`: the largest sum of |x_i|.
    """
    largest = max(float(ratio.abs().max()) for ratio in ratios) or 1.0
    shift = dyadic(torch.tensor(largest, dtype=torch.float64), bits, bound).shift
    return [torch.round(torch.ldexp(ratio.double(), shift)).long() for ratio in ratios], shift


def _affordable(bits: int, bound: int) -> int:
    left = min(bits, _PRODUCT_BITS - bound.bit_length())
    if left < 8:
        raise ValueError(f"integers of up to {bound:.3g} leave no room for a multiplier in 64 bits: the layer is too large")
    return left
