"""Ranges: from a tensor's values to the scale (and zero point) that represents them best."""

from collections.abc import Sequence
from typing import Literal

import torch

from hawq.affine import dequantize, per_channel, quantize, signed_range

RangeMethod = Literal["min-max", "percentile", "mse"]

_WEIGHT_CANDIDATES = 64
_ZERO_CHANNEL_SCALE = 1e-8
_BINS = 4096
_PERCENTILE = 0.9999


def weight_scale(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The symmetric scale of each output channel with the least squared rounding error: (channels,).

    A grid of clipping points between a fifth and all of the channel's largest magnitude, then the least-squares scale
    for the codes found, <w, q> / <q, q>. A channel of zeros gets a scale so small that its bias stays exact.
    """
    qmin, qmax = signed_range(bits)
    flat = weight.detach().flatten(1)
    largest = flat.abs().amax(1)
    best = torch.where(largest > 0, largest / -qmin, torch.full_like(largest, _ZERO_CHANNEL_SCALE))
    least = _squared_error(flat, best, qmin, qmax)
    for step in range(1, _WEIGHT_CANDIDATES + 1):
        fraction = 0.2 + 0.8 * step / _WEIGHT_CANDIDATES
        # The largest weight may lie half a step beyond either end of the codes.
        candidate = torch.where(largest > 0, fraction * largest / (qmax + 0.5), best)
        for scale in (candidate, _least_squares_scale(flat, candidate, qmin, qmax)):
            error = _squared_error(flat, scale, qmin, qmax)
            better = error < least
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def _least_squares_scale(flat: torch.Tensor, scale: torch.Tensor, qmin: int, qmax: int) -> torch.Tensor:
    codes = quantize(flat, scale.unsqueeze(1), 0, qmin, qmax)
    fitted = (flat * codes).sum(1) / codes.square().sum(1)
    return torch.where(torch.isfinite(fitted) & (fitted > 0), fitted, scale)


def _squared_error(flat: torch.Tensor, scale: torch.Tensor, qmin: int, qmax: int) -> torch.Tensor:
    columns = per_channel(scale, flat)
    return (dequantize(quantize(flat, columns, 0, qmin, qmax), columns) - flat).square().sum(1)


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
