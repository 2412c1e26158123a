r"""Rounding by least squares on a layer's outputs: GPTQ, then coordinate descent on codes and scales in turn.

The error of rows is :math:`(\hat w - w) H (\hat w - w)^T`. With all other codes fixed, the best code of a column is the
nearest to :math:`\hat w_k - ((\hat w - w) H)_k / H_{kk}`, and the best scale of all codes q is
:math:`q H w^T / q H q^T`; neither step can make the error larger.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from hawq.layers import QuantizedLayer
from hawq.patches import MatrixForm
from hawq.rounding.adaround import adaround
from hawq.rounding.gptq import gptq
from hawq.rounding.grid import Grid, choose_grid
from hawq.rounding.moments import InputMoments

_BLOCK = 64
_DAMPING = 1.0  # of the mean of H's diagonal: much, because inputs to come differ from the calibration's (docs/LOG.md)
_MANY_COLUMNS = 8192  # whose second moments, and what is computed from them, take some 3 GiB
_FEW_COLUMNS = 12  # so few, as in depthwise layers, are inputs that resemble each other: what fits them fits no others


@dataclass(frozen=True)
class LeastSquares:
    """How weights are rounded by the second moments of their inputs.

    method: "gptq", with descent, or "adaround". symmetric: codes from -2^(b-1) on. group_size: columns that share a scale.
    """

    method: Literal["gptq", "adaround"] = "gptq"
    symmetric: bool = False
    group_size: int | None = None

    def reads_data(self, layer: QuantizedLayer) -> bool:
        """Whether that layer is rounded by least squares at all: not so embeddings, whose rows have one input each."""
        return layer.can_have_bias and _FEW_COLUMNS <= layer.form.num_columns <= _MANY_COLUMNS

    def __call__(
        self, weight: torch.Tensor, bits: int, form: MatrixForm, moments: InputMoments
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (int8, shaped like `weight`) and scales, (channels,) or (channels, column groups)."""
        wanted, hessian = moments.target(form.rows(weight.detach()), _DAMPING)
        importance = hessian.diagonal(dim1=1, dim2=2)
        size = form.group_size(self.group_size)
        grid = choose_grid(wanted.float(), bits, importance=importance, group_size=size, symmetric=self.symmetric)
        if self.method == "adaround":
            return grid.stored(form, adaround(wanted, hessian, grid))
        codes, grid = round_by_least_squares(wanted, hessian, grid)
        return grid.stored(form, codes)


def output_error(rows: torch.Tensor, wanted: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """(groups, rows): the squared error of each row's outputs, its mean taken out."""
    difference = rows - wanted
    return ((difference @ hessian) * difference).sum(2)


def round_by_least_squares(
    wanted: torch.Tensor, hessian: torch.Tensor, grid: Grid, *, sweeps: int = 2
) -> tuple[torch.Tensor, Grid]:
    """Codes (groups, rows, columns) and the grid with its scales fitted to them.

    wanted: (groups, rows, columns), hessian: (groups, columns, columns), both float64.
    """
    codes = gptq(wanted, hessian, grid)
    for _ in range(sweeps):
        grid = fit_scale(codes, wanted, hessian, grid)
        codes = descend(codes, wanted, hessian, grid)
    return codes, fit_scale(codes, wanted, hessian, grid)


def fit_scale(codes: torch.Tensor, wanted: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> Grid:
    """The grid with every row's scales multiplied by the factor that fits its outputs best."""
    scale, _, _ = grid.expanded(codes.shape[2])
    real = codes * scale
    products = real @ hessian
    factor = (products * wanted).sum(2) / (products * real).sum(2)
    factor = torch.where(torch.isfinite(factor) & (factor > 0), factor, 1.0)
    return grid.with_scale(grid.scale * factor[:, :, None])


def descend(codes: torch.Tensor, wanted: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> torch.Tensor:
    """One sweep of coordinate descent over all columns."""
    columns = codes.shape[2]
    scale, low, high = (tensor.expand_as(codes) for tensor in grid.expanded(columns))
    codes = codes.clone()
    pull = (codes * scale - wanted) @ hessian  # half the gradient
    curvature = hessian.diagonal(dim1=1, dim2=2)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        moves = torch.zeros_like(codes[:, :, start:end])
        inside = pull[:, :, start:end].clone()
        for column in range(end - start):
            at = start + column
            best = codes[:, :, at] - inside[:, :, column] / (curvature[:, at, None] * scale[:, :, at])
            new = torch.round(best).clamp(low[:, :, at], high[:, :, at])
            move = (new - codes[:, :, at]) * scale[:, :, at]
            codes[:, :, at] = new
            moves[:, :, column] = move
            inside += move[:, :, None] * hessian[:, None, at, start:end]
        pull += moves @ hessian[:, start:end, :]
    return codes
