"""Round to nearest, on the grid of least squared error of each channel."""

import torch

from hawq.patches import MatrixForm
from hawq.rounding.grid import choose_grid


def round_to_nearest(
    weight: torch.Tensor, bits: int, form: MatrixForm, *, symmetric: bool = False, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (int8, shaped like `weight`) and scales, (channels,) or (channels, column groups)."""
    rows = form.rows(weight.detach())
    grid = choose_grid(rows, bits, symmetric=symmetric, group_size=form.group_size(group_size))
    return grid.stored(form, grid.codes(rows.double()))
