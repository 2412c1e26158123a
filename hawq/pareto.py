"""The frontier: the best that each size can do, predicted and measured."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import nan
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
from tqdm.auto import tqdm

from hawq.allocate import Budget, Table, allocate, common_widths, tied_groups
from hawq.allocation import Allocation, BudgetUse
from hawq.cost.size import bits_of_weights
from hessian import tables
from hessian.colours import BLUE, GREY, ORANGE
from hessian.drawn import new_axes
from hessian.tables import metric_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AVERAGES = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
FINE_AVERAGES = (2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.0, 4.5, 5.0, 5.5, 6.0, 7.0, 8.0)


class Outcome(NamedTuple):
    """What is measured of one allocation: bytes of the packed file, and of the network on the evaluation data the increase of
    the loss and the metric. audited_increase: of what the sensitivities are about, where that is another loss."""

    file_bytes: int
    increase: float
    metric: float
    audited_increase: float = nan


@dataclass(frozen=True)
class Point:
    """One allocation of the frontier: bytes of the packed file, the predicted and the measured increase of the loss.

    measured_increase, metric: of the whole network on the evaluation data. audited_increase: of what the objective, the sum
    of the table's entries, is about (see `hawq.prediction`), NaN where that was not measured. dominated: another point of
    the frontier has no more bytes and no more measured increase, and less of one of them.
    """

    average_bits: float
    file_bytes: int
    predicted_increase: float | None
    measured_increase: float
    metric: float
    objective: float
    audited_increase: float = nan
    dominated: bool = False

    def _dominates(self, other: "Point") -> bool:
        bytes_and_increases = ((self.file_bytes, other.file_bytes), (self.measured_increase, other.measured_increase))
        return all(a <= b for a, b in bytes_and_increases) and any(a < b for a, b in bytes_and_increases)


class Frontier(tables.Table, Sequence[Point]):
    """Points by rising bytes, `dominated` as their bytes and measured increases have it; NaN compares with nothing."""

    def __init__(self, points: Iterable[Point] = ()) -> None:
        given = list(points)
        self._points = [replace(point, dominated=any(other._dominates(point) for other in given)) for point in given]

    @overload
    def __getitem__(self, index: int) -> Point: ...
    @overload
    def __getitem__(self, index: slice) -> list[Point]: ...
    def __getitem__(self, index: int | slice) -> Point | list[Point]:
        return self._points[index]

    def __len__(self) -> int:
        return len(self._points)

    def header(self) -> list[str]:
        return ["average bits", "bytes", "metric", "increase of the loss", "predicted", "dominated"]

    def cells(self) -> list[list[str]]:
        return [
            [
                f"{point.average_bits:.3g}",
                f"{point.file_bytes:,}",
                metric_text(point.metric),
                f"{point.measured_increase:+.4g}",
                "" if point.predicted_increase is None else f"{point.predicted_increase:+.4g}",
                "yes" if point.dominated else "",
            ]
            for point in self
        ]

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the predicted and the measured increases over bytes, dominated points hollow; `ax=None` makes a new figure."""
        ax = new_axes() if ax is None else ax
        sizes = np.array([point.file_bytes / 1e3 for point in self])
        measured = np.array([point.measured_increase for point in self])
        if all(point.predicted_increase is not None for point in self):
            predicted: list[Any] = [point.predicted_increase for point in self]
            ax.plot(sizes, predicted, "--s", color=ORANGE, label="predicted from the summed sensitivity")
        ax.plot(sizes, measured, "-o", color=BLUE, label="measured on the evaluation data")
        beaten = np.array([point.dominated for point in self], dtype=bool)
        ax.plot(sizes[beaten], measured[beaten], "o", color=BLUE, markerfacecolor="white")
        background = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
        for point, size, increase in zip(self, sizes, measured, strict=True):
            label = f"{point.average_bits:.2g} bits, {metric_text(point.metric)}"
            ax.annotate(
                label, (size, increase), textcoords="offset points", xytext=(4, 9), fontsize=7, color=GREY, bbox=background
            )
        ax.set_yscale("symlog", linthresh=1e-3)
        ax.axhline(0, color=GREY, linewidth=0.6)
        ax.set(xlabel="model.safetensors (kB)", ylabel="increase of the loss")
        ax.margins(x=0.12, y=0.12)
        ax.legend(fontsize=8)
        return ax


def frontier(
    table: Table,
    num_params: Mapping[str, int],
    measure: Callable[[Allocation], Outcome],
    *,
    predicts: float | None = None,
    ties: Iterable[Sequence[str]] = (),
    budgets: Sequence[Budget] = (),
    averages: Sequence[float] = AVERAGES,
    progress: bool = False,
) -> Frontier:
    """Allocate at each average width that the table offers, and `measure` each allocation.

    num_params: weights by layer (`hawq.num_params`). predicts: the factor that turns an objective into a predicted increase
    of the loss, such as `table.predicts`; None where it has other units. ties, budgets: what every point keeps besides.
    """
    widths = sorted({bits for name, row in table.items() if name in num_params for bits in row})
    total = sum(num_params.values())
    budget = Budget("bits of weights", bits_of_weights(num_params, widths), 0.0)
    ties = list(ties)
    groups = [group for group in tied_groups(table, ties) if group[0] in num_params]
    least = sum(min(sum(budget.cost(name, bits) for name in group) for bits in common_widths(table, group)) for group in groups)
    limits = [average * total for average in averages if average <= widths[-1] and average * total >= least]
    points = []
    allocations = optimal_allocations(table, budget, limits, ties, budgets)
    for allocation in tqdm(allocations, desc="frontier", unit="allocation", disable=not progress):
        found = measure(allocation)
        used = allocation.budgets[budget.name].used / total
        predicted = None if predicts is None else predicts * allocation.objective
        points.append(
            Point(used, found.file_bytes, predicted, found.increase, found.metric, allocation.objective, found.audited_increase)
        )
    return Frontier(points)


def optimal_allocations(
    table: Table,
    budget: Budget,
    limits: Iterable[float],
    ties: Iterable[Sequence[str]] = (),
    budgets: Sequence[Budget] = (),
) -> list[Allocation]:
    """The optimal allocation at each limit on `budget` (whose own limit does not count), by rising limit.

    A limit that allows no smaller objective than a lower one adds no allocation: its cost would buy nothing.
    Raises ValueError as `allocate` does.
    """
    ties = list(ties)
    found: list[Allocation] = []
    for limit in sorted(limits):
        allocation = allocate(table, [replace(budget, limit=limit), *budgets], ties)
        if not found or allocation.objective < found[-1].objective:
            found.append(allocation)
    return found


def convex_frontier(table: Table, budget: Budget, ties: Iterable[Sequence[str]] = ()) -> list[Allocation]:
    r"""All vertices of the lower convex hull of (cost, objective), from the least cost to the least objective.

    .. math:: \min_b \sum_i \Omega_i(b_i) + \lambda c_i(b_i) \quad \text{for } \lambda \text{ from } \infty \text{ to } 0

    The hull of a sum is the sum of the rows' hulls, so that one pass over their edges by falling slope is exact
    (Shoham and Gersho, 1988); each vertex is the optimal allocation at its own cost. Rows get one step wider at a time.
    Raises ValueError for a budget with products, whose costs are no sum over rows.
    """
    if budget.products:
        raise ValueError(f"budget {budget.name!r} has products: its hull is no sum over rows; use optimal_allocations")
    bits: dict[str, int] = {}
    steps = []
    for group in tied_groups(table, ties):
        corners = _lower_hull(
            [
                (sum(budget.cost(name, width) for name in group), sum(table[name][width] for name in group), width)
                for width in common_widths(table, group)
            ]
        )
        bits |= dict.fromkeys(group, corners[0][2])
        for (cost, omega, _), (next_cost, next_omega, width) in pairwise(corners):
            steps.append(((next_omega - omega) / (next_cost - cost), group, width))
    vertices = [dict(bits)]
    steps.sort(key=lambda step: step[0])  # stable: a row's own slopes rise, so its steps stay in order
    for _, group, width in steps:
        bits |= dict.fromkeys(group, width)
        vertices.append(dict(bits))
    return [_allocation(table, budget, {name: vertex[name] for name in table}) for vertex in vertices]


def _allocation(table: Table, budget: Budget, bits: dict[str, int]) -> Allocation:
    objective, used = float(sum(table[name][width] for name, width in bits.items())), budget.used(bits)
    return Allocation(bits, objective, gap=0.0, budgets={budget.name: BudgetUse(used, used)})


def _lower_hull(points: Sequence[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """Corners of the falling part of the lower convex hull, by rising cost."""
    hull: list[tuple[float, float, int]] = []
    for point in sorted(points):
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (point[0] - hull[-2][0]) >= (point[1] - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append(point)
    return hull
