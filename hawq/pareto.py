"""The frontier: the best that each size can do, predicted and measured."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from tqdm.auto import tqdm

from hawq.allocate import Budget, Table, allocate, common_widths, tied_groups
from hawq.allocation import Allocation, BudgetUse

AVERAGES = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
FINE_AVERAGES = (2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.0, 4.5, 5.0, 5.5, 6.0, 7.0, 8.0)
_WEIGHTS = "bits of weights"


@dataclass(frozen=True)
class Point:
    """One allocation of the frontier: bytes of the packed file, the predicted and the measured increase of the loss.

    measured_increase, metric: of the whole network on the evaluation data. audited_increase: of what the objective, the sum
    of the table's entries, is about (see `hawq.prediction`). dominated: another point of the frontier has no more bytes
    and no more measured increase, and less of one of them.
    """

    average_bits: float
    file_bytes: int
    predicted_increase: float | None
    measured_increase: float
    metric: float
    objective: float
    audited_increase: float
    dominated: bool = False


def frontier(
    table: Table,
    bit_costs: Mapping[str, Mapping[int, float]],
    num_params: int,
    ties: Iterable[Sequence[str]],
    measure: Callable[[Allocation], tuple[int, float, float, float]],
    *,
    predicts: float | None,
    budgets: Sequence[Budget] = (),
    averages: Sequence[float] = AVERAGES,
    progress: bool = False,
) -> list[Point]:
    """Allocate at each average width that the table offers; `measure` returns (file bytes, loss increase, metric, audited one).

    `predicts`: the factor that turns an objective into a predicted increase of the loss, None where it has other units.
    `budgets`: limits that every point keeps besides.
    """
    widths = sorted({bits for name, row in table.items() if name in bit_costs for bits in row})
    ties = list(ties)
    groups = [group for group in tied_groups(table, ties) if group[0] in bit_costs]
    least = sum(min(sum(bit_costs[name][bits] for name in group) for bits in common_widths(table, group)) for group in groups)
    limits = [average * num_params for average in averages if average <= widths[-1] and average * num_params >= least]
    points = []
    allocations = optimal_allocations(table, Budget(_WEIGHTS, bit_costs, 0.0), limits, ties, budgets)
    for allocation in tqdm(allocations, desc="frontier", unit="allocation", disable=not progress):
        file_bytes, increase, metric, audited = measure(allocation)
        used = allocation.budgets[_WEIGHTS].used / num_params
        predicted = None if predicts is None else predicts * allocation.objective
        points.append(Point(used, file_bytes, predicted, increase, metric, allocation.objective, audited))
    return mark_dominated(points)


def mark_dominated(points: Sequence[Point]) -> list[Point]:
    """The points with `dominated` as their bytes and measured increases have it; NaN compares with nothing."""

    def dominates(one: Point, other: Point) -> bool:
        bytes_and_increases = ((one.file_bytes, other.file_bytes), (one.measured_increase, other.measured_increase))
        return all(a <= b for a, b in bytes_and_increases) and any(a < b for a, b in bytes_and_increases)

    return [replace(point, dominated=any(dominates(other, point) for other in points)) for point in points]


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
