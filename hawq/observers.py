"""Ranges of activations: from a tensor's values to the scale and zero point that represent them best."""

from collections.abc import Sequence
from typing import Literal

import torch

from hawq.affine import dequantize, quantize

RangeMethod = Literal["min-max", "percentile", "mse"]

_BINS = 4096
_PERCENTILE = 0.9999


def activation_range(values: Sequence[torch.Tensor], method: RangeMethod = "mse", *, bits: int = 8) -> tuple[float, float]:
    """The range (low <= 0 <= high) that unsigned codes of so many bits should cover, for one tensor's values over many batches.

    `min-max`: all of them. `percentile`: all but 0.01% (of a tensor of both signs, half at either end). `mse`: the
    range, shrunk towards zero, with the least squared rounding error.
    """
    low = min(0.0, *(float(value.min()) for value in values))
    high = max(0.0, *(float(value.max()) for value in values))
    if low == high:
        return 0.0, 1.0
    if method == "min-max":
        return low, high
    counts = torch.stack([torch.histc(value.float(), _BINS, low, high) for value in values]).sum(0).double()
    width = (high - low) / _BINS
    centers = low + width * (torch.arange(_BINS, dtype=torch.float64) + 0.5)
    if method == "percentile":
        return _percentile_range(counts, centers, low, high)
    candidates = [(fraction * low, fraction * high) for fraction in torch.linspace(0.3, 1.0, 71).tolist()]
    errors = [float((counts * (_rounded(centers, *pair, bits) - centers).square()).sum()) for pair in candidates]
    return candidates[min(range(len(errors)), key=errors.__getitem__)]


def _percentile_range(counts: torch.Tensor, centers: torch.Tensor, low: float, high: float) -> tuple[float, float]:
    shares = counts.cumsum(0) / counts.sum()
    tails = (low < 0) + (high > 0)
    cut = (1 - _PERCENTILE) / tails
    first = float(centers[int((shares >= cut).nonzero()[0])]) if low < 0 else 0.0
    last = float(centers[int((shares >= 1 - cut).nonzero()[0])]) if high > 0 else 0.0
    return min(first, 0.0), max(last, 0.0)


def _rounded(values: torch.Tensor, low: float, high: float, bits: int) -> torch.Tensor:
    scale, zero_point = (parameter.double() for parameter in activation_parameters(low, high, bits=bits))
    return dequantize(quantize(values, scale, zero_point, 0, 2**bits - 1), scale, zero_point)


def activation_parameters(low: float, high: float, *, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale (float32) and zero point (uint8) of unsigned codes that cover [low, high] and represent 0 exactly."""
    scale = torch.tensor((high - low) / (2**bits - 1), dtype=torch.float32)
    zero_point = torch.tensor(round(-low / float(scale)), dtype=torch.float32).clamp(0, 2**bits - 1)
    return scale, zero_point.to(torch.uint8)
