r"""The grid of values that a row's codes stand for: :math:`\hat w = s\,q`, q whole numbers from `low` to low + 2^b - 1.

Where `low` is not -2^(b-1), the codes are asymmetric. They still multiply as signed bytes without a zero point, because
packing keeps each row's `low` beside the unsigned codes.
"""

from dataclasses import dataclass, replace

import torch

from hawq.patches import MatrixForm

_ZERO_ROW_SCALE = 1e-8
_SMALLEST_HALF = 2.0**-14  # of the numbers that float16 holds with all its bits
_FRACTIONS = 24
_SMALLEST_FRACTION = 0.25


@dataclass(frozen=True)
class Grid:
    """scale: float64, low: whole numbers in float64; both (groups, rows, column groups), each for consecutive columns."""

    scale: torch.Tensor
    low: torch.Tensor
    bits: int

    def expanded(self, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scale, lowest and highest code, broadcastable to (groups, rows, columns)."""
        repeats = -(-columns // self.scale.shape[-1]) if self.scale.shape[-1] > 1 else 1
        scale, low = (tensor.repeat_interleave(repeats, -1)[..., :columns] for tensor in (self.scale, self.low))
        return scale, low, low + (2**self.bits - 1)

    def codes(self, rows: torch.Tensor) -> torch.Tensor:
        """The nearest codes."""
        scale, low, high = self.expanded(rows.shape[-1])
        return torch.round(rows / scale).clamp(low, high)

    def stored(self, form: MatrixForm, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes, shaped like the weight, in int8, and their scales in float32: (channels,) or (channels, column groups).

        Scales are rounded to what float16 holds, where it holds 11 bits of all of them: so files can store half as much.
        """
        scale = self.scale.flatten(0, 1).float()
        half = scale.half().float()
        scale = half if bool((scale > _SMALLEST_HALF).all() and torch.isfinite(half).all()) else scale
        return form.weight(codes).to(torch.int8), scale.squeeze(1) if scale.shape[1] == 1 else scale

    def with_scale(self, scale: torch.Tensor) -> "Grid":
        return replace(self, scale=scale)


def choose_grid(
    rows: torch.Tensor,
    bits: int,
    *,
    importance: torch.Tensor | None = None,
    group_size: int | None = None,
    symmetric: bool = False,
) -> Grid:
    """The grid with the least squared error of rounding each row to nearest, weighted by `importance` (groups, columns).

    rows: (groups, rows, columns). Candidates are a range of scales for each of a few lowest codes around that of the
    row's own range; `symmetric` allows -2^(b-1) only, as 8 bits do. `group_size`: columns that share a scale (None: all).
    """
    shape = rows.shape
    size = shape[2] if group_size is None else min(group_size, shape[2])
    count = -(-shape[2] // size)
    padding = count * size - shape[2]
    w = torch.nn.functional.pad(rows.double(), (0, padding)).reshape(-1, size)
    weights = torch.ones(shape[0], shape[2]) if importance is None else importance
    weights = torch.nn.functional.pad(weights.double(), (0, padding)).view(shape[0], 1, count, size)
    weights = weights.expand(-1, shape[1], -1, -1).reshape(-1, size)
    dtype = torch.float32 if rows.dtype == torch.float32 else torch.float64  # of the search; its result is refined in float64
    scale, low = _search(w.to(dtype), weights.to(dtype), bits, symmetric or bits == 8)
    grid_shape = (shape[0], shape[1], count)
    return Grid(scale.double().view(grid_shape), low.double().view(grid_shape), bits)


def _search(w: torch.Tensor, weights: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    steps = 2**bits - 1
    smallest, largest = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    width = (largest - smallest).clamp(min=torch.finfo(w.dtype).tiny)
    middle = -(2.0 ** (bits - 1))
    lows = [torch.full_like(width, middle)]
    if not symmetric:
        natural = torch.round(smallest / width * steps)
        lows += [torch.full_like(width, middle + 1), *((natural + shift).clamp(-steps, 0) for shift in (-1, 0, 1))]
    best_error = torch.full_like(width, torch.inf)
    best_scale, best_low = torch.full_like(width, _ZERO_ROW_SCALE), lows[0]
    for low in lows:
        # The extreme weights may lie half a step beyond either end of the codes.
        covering = torch.maximum(largest / (low + steps + 0.5), -smallest / (0.5 - low)).clamp(min=_ZERO_ROW_SCALE)
        for fraction in torch.linspace(_SMALLEST_FRACTION, 1.0, _FRACTIONS).tolist():
            scale = fraction * covering
            codes = torch.round(w / scale[:, None]).clamp(low[:, None], low[:, None] + steps)
            # The error at the least-squares scale of these codes, without a second pass.
            weighted = weights * codes
            product, square = (weighted * w).sum(1), (weighted * codes).sum(1)
            gain = torch.where(square > 0, product.clamp(min=0).square() / square, 0)
            better = -gain < best_error
            fitted = torch.where((square > 0) & (product > 0), product / square, scale)
            best_error = torch.where(better, -gain, best_error)
            best_scale, best_low = torch.where(better, fitted, best_scale), torch.where(better, low, best_low)
    empty = width <= torch.finfo(w.dtype).tiny
    return torch.where(empty, _ZERO_ROW_SCALE, best_scale).clamp(min=1e-30), best_low
