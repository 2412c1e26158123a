r"""GPTQ (Frantar et al. 2022): columns are rounded one after the other, and what is left of each is carried to the rest.

For rows w and second moments H of their inputs, with U the upper Cholesky factor of H^-1, column k is rounded to q_k and
the others move by :math:`-(w_k - q_k) / U_{kk} \; U_{k,>k}`: the least-squares answer to the error made.
"""

import torch

from hawq.rounding.grid import Grid

_BLOCK = 64  # columns whose corrections reach the columns behind the block all at once


def gptq(rows: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes (groups, rows, columns), in float64, for `rows` and positive definite `hessian` (groups, columns, columns).

    Columns with the largest moments go first (the paper's `act-order`), whatever their place.
    """
    columns = rows.shape[2]
    order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    by_column = order[:, None, :].expand_as(rows)
    scale, low, high = (tensor.expand_as(rows).gather(2, by_column) for tensor in grid.expanded(columns))
    left = rows.gather(2, by_column).clone()
    ordered = hessian.gather(1, order[:, :, None].expand_as(hessian)).gather(2, order[:, None, :].expand_as(hessian))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(ordered)), upper=True)
    codes = torch.empty_like(left)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        block = left[:, :, start:end]
        errors = torch.empty_like(block)
        for column in range(end - start):
            at = start + column
            codes[:, :, at] = torch.round(block[:, :, column] / scale[:, :, at]).clamp(low[:, :, at], high[:, :, at])
            error = (block[:, :, column] - codes[:, :, at] * scale[:, :, at]) / upper[:, at, at, None]
            block[:, :, column + 1 :] -= error[:, :, None] * upper[:, None, at, at + 1 : end]
            errors[:, :, column] = error
        left[:, :, end:] -= errors @ upper[:, start:end, end:]
    return torch.empty_like(codes).scatter_(2, by_column, codes)
