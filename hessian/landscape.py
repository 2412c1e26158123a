"""The loss along a direction of the parameters, and over the plane of two."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hessian.colours import BLUE, ORANGE
from hessian.drawn import Drawn, new_axes
from hessian.objective import Data, LossFunction, Objective
from hessian.operators.curvature import as_objective
from hessian.operators.hessian import Hessian
from hessian.parameters import Selection, select_parameters, unflatten

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class Line(Drawn):
    """The loss along a unit direction d.

    offsets: (n,) float64, distances from the model, 0 in the middle. losses: (n,) float64, at these. slope, curvature: g . d
    and d . H d at the model.
    """

    offsets: torch.Tensor
    losses: torch.Tensor
    slope: float
    curvature: float

    @property
    def loss(self) -> float:
        """The loss of the model itself."""
        return float(self.losses[len(self.losses) // 2])

    @property
    def quadratic(self) -> torch.Tensor:
        """The second-order model L + t g . d + t^2/2 d . H d at the offsets t, (n,) float64."""
        return self.loss + self.slope * self.offsets + self.curvature / 2 * self.offsets**2

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        values = {name: getattr(self, name).tolist() for name in ("offsets", "losses", "quadratic")}
        return values | {"slope": self.slope, "curvature": self.curvature}

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the loss and its quadratic model; `ax=None` makes a new figure."""
        ax = new_axes() if ax is None else ax
        ax.plot(self.offsets.numpy(), self.losses.numpy(), "o-", color=BLUE, markersize=3, label="loss")
        ax.plot(self.offsets.numpy(), self.quadratic.numpy(), "--", color=ORANGE, label="quadratic model")
        ax.plot([0], [self.loss], "*", color="black", markersize=10, label="the model", zorder=5)
        ax.set(xlabel="distance along the direction", ylabel="loss")
        ax.legend()
        return ax


@dataclass(frozen=True, eq=False)
class Plane(Drawn):
    """The loss over the plane of two unit directions.

    offsets: (n,) float64, distances from the model, 0 in the middle. losses: (n, n) float64, `losses[i, j]` at offsets[i]
    along the first direction and offsets[j] along the second.
    """

    offsets: torch.Tensor
    losses: torch.Tensor

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {"offsets": self.offsets.tolist(), "losses": self.losses.tolist()}

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw contours, the first direction to the right; `ax=None` makes a new figure."""
        ax = new_axes() if ax is None else ax
        across = self.offsets.numpy()
        heights = torch.where(self.losses.isfinite(), self.losses, torch.nan).T.numpy()
        filled = ax.contourf(across, across, heights, levels=16, cmap="viridis")
        ax.contour(across, across, heights, levels=list(filled.levels)[::2], colors="white", linewidths=0.5, alpha=0.7)
        ax.plot([0], [0], "*", color="white", markeredgecolor="black", markersize=12)
        ax.set(xlabel="distance along the first direction", ylabel="distance along the second", aspect="equal")
        ax.figure.colorbar(filled, ax=ax, label="loss")
        return ax


def line(
    model: nn.Module | Objective,
    loss: LossFunction | None = None,
    data: Data | None = None,
    direction: torch.Tensor | None = None,
    params: Selection = None,
    *,
    radius: float | None = None,
    num_points: int = 31,
    progress: bool = False,
) -> Line:
    r"""The loss of all data at :math:`\theta + t\, d`, for `num_points` values of t from -radius to radius.

    `direction`: (P,), in `named_parameters` order over the selected parameters; it is scaled to unit length. `radius`: in
    units of the parameters; by default the distance at which the second-order model has changed the loss by as much as
    itself (by 1, where it is 0): :math:`|g \cdot d|\, t + |d^\top H d|\, t^2 / 2 = |L|`. Costs a gradient and a product.

    The parameters are moved in place, and come back bit by bit, whatever happens; buffers, gradients, modes and the global
    random state stay as they are, and what is random in the model is drawn alike at all points. Where the loss overflows,
    it is inf or NaN. Raises ValueError for a direction that does not fit and an even number of points.
    """
    objective = as_objective(model, loss, data)
    parameters = select_parameters(objective.model, params)
    if direction is None or direction.dim() != 1:
        raise ValueError("direction is missing or no vector: pass (P,)")
    directions = _unit(direction[:, None], parameters)
    _check_points(radius, num_points)
    value, slope, curvature = _second_order_model(Hessian(objective, params=list(parameters)), directions[:, 0])
    offsets = _offsets(radius or default_radius(value, slope, curvature), num_points)
    losses = _losses_at(objective, parameters, directions, offsets[:, None], progress=progress)
    return Line(offsets, losses, slope, curvature)


def plane(
    model: nn.Module | Objective,
    loss: LossFunction | None = None,
    data: Data | None = None,
    directions: torch.Tensor | None = None,
    params: Selection = None,
    *,
    radius: float | None = None,
    num_points: int = 21,
    progress: bool = False,
) -> Plane:
    r"""The loss of all data at :math:`\theta + s\, d_1 + t\, d_2`, for `num_points` values each of s and t up to radius.

    `directions`: (P, 2), as in `line`, best orthogonal to each other. `radius`: by default the smaller of both directions'
    (see `line`). Costs as many passes over the data as there are points, with the same promises about the model.
    """
    objective = as_objective(model, loss, data)
    parameters = select_parameters(objective.model, params)
    if directions is None or directions.dim() != 2 or directions.shape[1] != 2:
        raise ValueError("directions are missing or not two: pass (P, 2)")
    both = _unit(directions, parameters)
    _check_points(radius, num_points)
    if radius is None:
        operator = Hessian(objective, params=list(parameters))
        radius = min(default_radius(*_second_order_model(operator, one)) for one in both.T)
    offsets = _offsets(radius, num_points)
    points = torch.cartesian_prod(offsets, offsets)
    losses = _losses_at(objective, parameters, both, points, progress=progress)
    return Plane(offsets, losses.view(num_points, num_points))


def default_radius(loss: float, slope: float, curvature: float) -> float:
    """The t > 0 with |slope| t + |curvature| t^2 / 2 = |loss|, or = 1 where the loss is 0; 1 where both are 0."""
    rise = abs(loss) or 1.0
    slope, curvature = abs(slope), abs(curvature)
    if slope == 0 and curvature == 0:
        return 1.0
    return 2 * rise / (slope + sqrt(slope**2 + 2 * curvature * rise))


def _second_order_model(operator: Hessian, direction: torch.Tensor) -> tuple[float, float, float]:
    """The loss, g . d and d . H d."""
    value, gradient = operator.loss_and_gradient()
    product = operator @ direction
    return value, float((gradient * direction).sum(dtype=torch.float64)), float((product * direction).sum(dtype=torch.float64))


def _unit(directions: torch.Tensor, parameters: Mapping[str, nn.Parameter]) -> torch.Tensor:
    """The columns of (P, K) at unit length, in the parameters' precision and place; ValueError where they do not fit."""
    size = sum(parameter.numel() for parameter in parameters.values())
    if directions.shape[0] != size:
        raise ValueError(f"a direction of {directions.shape[0]} numbers for {size} parameters: pass one for each")
    lengths = directions.detach().double().norm(dim=0)
    if not bool((lengths.isfinite() & (lengths > 0)).all()):
        raise ValueError("a direction is zero or not finite")
    first = next(iter(parameters.values()))
    return (directions.detach() / lengths.to(directions.dtype)).to(first.device, first.dtype)


def _check_points(radius: float | None, num_points: int) -> None:
    if num_points < 3 or num_points % 2 == 0:
        raise ValueError(f"num_points={num_points}: give an odd number from 3 on, so that the model itself is in the middle")
    if radius is not None and not 0 < radius < float("inf"):
        raise ValueError(f"radius={radius}: give a positive distance, in units of the parameters")


def _offsets(radius: float, num_points: int) -> torch.Tensor:
    half = num_points // 2
    return radius * torch.arange(-half, half + 1, dtype=torch.float64) / half


def _losses_at(
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    directions: torch.Tensor,
    points: torch.Tensor,
    *,
    progress: bool,
) -> torch.Tensor:
    """The loss at each of the (n, K) points, coordinates along the (P, K) directions: (n,) float64."""
    losses = torch.zeros(len(points), dtype=torch.float64)
    with _restored(parameters.values()) as originals:
        for index, point in enumerate(tqdm(points, desc="landscape", unit="point", disable=not progress)):
            moved = directions @ point.to(directions)
            pieces = unflatten(moved, originals)
            for parameter, original, piece in zip(parameters.values(), originals, pieces, strict=True):
                torch.add(original, piece, out=parameter.data)
            losses[index] = _loss(objective)
    return losses


@contextmanager
def _restored(parameters: Any) -> Iterator[list[torch.Tensor]]:
    """Copies of the parameters, which come back at the end.

    Values are written to `.data`: autograd need not know of a change that it will never see, and graphs that operators
    keep of this model stay valid.
    """
    parameters = list(parameters)
    originals = [parameter.detach().clone() for parameter in parameters]
    try:
        yield originals
    finally:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.data.copy_(original)


def _loss(objective: Objective) -> float:
    """The data set's loss where the parameters now are, finite or not."""

    def own() -> float:
        with objective.undisturbed(), torch.no_grad():
            return sum(
                weight * float(objective.loss_of(objective.outputs(batch), batch)) for batch, weight in objective.own_batches()
            )

    return sum(objective.gathered(own))
