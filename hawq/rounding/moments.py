r"""Second moments of a layer's inputs: all that least-squares rounding needs to know of the data.

With float inputs x and the inputs x̂ that have passed the rounded layers before, the error of rounded rows ŵ is

.. math:: E (\hat w \hat x - w x)^2 = \hat w H \hat w^T - 2\, w C \hat w^T + const, \qquad H = E \hat x \hat x^T, \; C = E x \hat x^T.

The means stay in, although a bias could take them up: on data with other means than the calibration's, it could not.
"""

from dataclasses import dataclass

import torch

from hawq.patches import MatrixForm


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
        eye = torch.eye(self.quantized.shape[-1], dtype=torch.float64)
        level = self.quantized.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30) * damping
        extra = level[:, None, None] * eye
        hessian = self.quantized + extra
        wanted = torch.linalg.solve(hessian, rows.double() @ (self.cross + extra), left=False)
        return wanted, hessian


class MomentCollector:
    """Adds up moments over batches, in float64, at no more than `limit` positions a batch (drawn with `generator`)."""

    def __init__(self, form: MatrixForm, limit: int, generator: torch.Generator | None) -> None:
        self.form, self.limit, self.generator = form, limit, generator
        self.count = 0
        self.sums: list[torch.Tensor] | None = None

    def add(self, x: torch.Tensor, quantized: torch.Tensor, positions: int) -> None:
        """One batch of float and of quantized inputs, with `positions` outputs."""
        chosen = None
        if positions > self.limit:
            chosen = torch.randint(positions, (self.limit,), generator=self.generator)
        float_columns = self.form.columns(x, chosen)
        columns = float_columns if quantized is x else self.form.columns(quantized, chosen)
        transposed = columns.transpose(1, 2)
        second = (transposed @ columns).double()
        cross = second if quantized is x else (float_columns.transpose(1, 2) @ columns).double()
        parts = [second, cross]
        self.count += columns.shape[1]
        self.sums = parts if self.sums is None else [total.add_(part) for total, part in zip(self.sums, parts, strict=True)]

    def moments(self) -> InputMoments:
        assert self.sums is not None
        second, cross = (part / self.count for part in self.sums)
        return InputMoments(second, cross, self.count)
