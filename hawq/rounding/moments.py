r"""Second moments of a layer's inputs: all that least-squares rounding needs to know of the data.

With float inputs x and the inputs x̂ that have passed the rounded layers before, the error of rounded rows ŵ is

.. math:: E (\hat w \hat x - w x)^2 = \hat w H \hat w^T - 2\, w C \hat w^T + const,

with H = E x̂ x̂^T and C = E x x̂^T.
The means stay in, although a bias could take them up: on data with other means than the calibration's, it could not.
"""

from dataclasses import dataclass

import torch

from hawq.patches import MatrixForm

_POSITIONS = 16384  # that are looked at in all, or this many for each column, if that is more
_POSITIONS_A_COLUMN = 8


@dataclass(frozen=True)
class InputMoments:
    """quantized: H, (groups, columns, columns), float64. cross: C, likewise, its first index of the float input. count:
    positions seen."""

    quantized: torch.Tensor
    cross: torch.Tensor
    count: int

    def target(self, rows: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows that fit the float outputs best on quantized inputs, W C H^-1, and the damped H.

        Damping adds `damping` times the mean of H's diagonal to the diagonals of H and C: directions that the data do
        not reach keep the weight that they had.
        """
        columns = self.quantized.shape[-1]
        level = self.quantized.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(torch.float32).tiny) * damping
        extra = level[:, None, None] * torch.eye(columns, dtype=torch.float64)
        hessian = self.quantized + extra
        wanted = torch.linalg.solve(hessian, rows.double() @ (self.cross + extra), left=False)
        return wanted, hessian


class MomentCollector:
    """Adds up moments over `num_batches` batches at a limited number of positions, drawn with `generator`."""

    def __init__(self, form: MatrixForm, num_batches: int, generator: torch.Generator | None) -> None:
        self.form, self.generator = form, generator
        self.limit = -(-max(_POSITIONS, _POSITIONS_A_COLUMN * form.num_columns) // num_batches)
        self.count = 0
        self.sums: list[torch.Tensor] | None = None

    def add(self, x: torch.Tensor, quantized: torch.Tensor) -> None:
        """One batch of float inputs and of the same inputs in the quantized network."""
        positions, chosen = self.form.num_positions(x), None
        if positions > self.limit:
            chosen = torch.randint(positions, (self.limit,), generator=self.generator)
        float_columns, columns = self.form.columns(x, chosen), self.form.columns(quantized, chosen)
        parts = [(first.transpose(1, 2) @ columns).double() for first in (columns, float_columns)]
        self.count += columns.shape[1]
        self.sums = parts if self.sums is None else [total.add_(part) for total, part in zip(self.sums, parts, strict=True)]

    def moments(self) -> InputMoments:
        """What was added up, as means."""
        assert self.sums is not None
        second, cross = (part / self.count for part in self.sums)
        return InputMoments(second, cross, self.count)
