"""Sharpness over training: the top eigenvalue, followed from check to check."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from hessian.drawn import new_axes
from hessian.estimators.eigenpairs import top_eigenpairs
from hessian.objective import Data, LossFunction, Objective
from hessian.operators.base import LinearOperator
from hessian.operators.hessian import Hessian
from hessian.operators.preconditioned import adam_preconditioner, preconditioned
from hessian.parameters import Selection
from hessian.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WARM_PRODUCTS = 3


@dataclass(frozen=True)
class Sharpness:
    """One check: the top eigenvalue, its residual |A v - lambda v|, and the products spent. step: as the caller counts."""

    step: int
    value: float
    residual: float
    num_matvecs: int


class SharpnessTracker(Table):
    r"""The largest Hessian eigenvalue of a model in training, at three products a check.

    Every check starts from the last one's eigenvector, whose Krylov space of three vectors follows slow changes; the first,
    and any whose relative residual exceeds `tol`, goes on until that is reached or `max_matvecs` products are spent. `history`
    has a Sharpness for every check, so that what was not reached shows.

    With `optimizer` (Adam and its kin) the operator is :math:`D^{-1/2} H D^{-1/2}`, D its current diagonal. `data` is what the
    sharpness is of, best one fixed batch. Nothing of the model or of the global random state is changed.
    """

    def __init__(
        self,
        model: nn.Module | Objective,
        loss: LossFunction | None = None,
        data: Data | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        params: Selection = None,
        tol: float = 0.05,
        max_matvecs: int = 60,
    ) -> None:
        self._hessian = Hessian(model, loss, data, params)
        self._optimizer = optimizer
        self.tol, self.max_matvecs = tol, max_matvecs
        self.history: list[Sharpness] = []
        self._vector: torch.Tensor | None = None

    def update(self, step: int | None = None) -> Sharpness:
        """Check now; `step` (default: the number of earlier checks) is recorded with the result."""
        operator: LinearOperator = self._hessian
        if self._optimizer is not None:
            operator = preconditioned(self._hessian, adam_preconditioner(self._optimizer, self._hessian))
        spent = 0
        start = self._vector
        if start is not None:
            pairs = top_eigenpairs(operator, start=start, tol=self.tol, max_matvecs=_WARM_PRODUCTS)
            spent, start = pairs.num_matvecs, pairs.vectors
        if start is None or not bool(pairs.converged.all()):
            own = torch.Generator().manual_seed(0)  # any start does; the caller's random numbers stay as they are
            fresh = operator.space.random(1, "normal", own).T
            start = fresh if start is None else torch.cat([start, fresh], dim=1)
            pairs = top_eigenpairs(operator, start=start, tol=self.tol, max_matvecs=self.max_matvecs)
            spent += pairs.num_matvecs
        self._vector = pairs.vectors
        number = len(self.history) if step is None else step
        self.history.append(Sharpness(number, float(pairs.values[0]), float(pairs.residuals[0]), spent))
        return self.history[-1]

    @property
    def vector(self) -> torch.Tensor | None:
        """The eigenvector of the last check, (P, 1); None before the first."""
        return self._vector

    def header(self) -> list[str]:
        return ["step", "sharpness", "residual", "products"]

    def cells(self) -> list[list[str]]:
        return [[f"{row.step}", f"{row.value:.5g}", f"{row.residual:.1e}", f"{row.num_matvecs}"] for row in self.history]

    def plot(self, ax: "Axes | None" = None, label: str | None = None) -> "Axes":
        """Draw the sharpness over steps with its residuals, in the next colour of the axes; `ax=None` makes a new figure.

        label: what the legend calls it, where several are compared.
        """
        ax = new_axes() if ax is None else ax
        steps, values = [row.step for row in self.history], [row.value for row in self.history]
        residuals = [row.residual for row in self.history]
        ax.errorbar(steps, values, yerr=residuals, marker="o", markersize=3, capsize=2, label=label)
        ax.set(xlabel="step", ylabel="sharpness (largest eigenvalue)")
        if label is not None:
            ax.legend()
        return ax
