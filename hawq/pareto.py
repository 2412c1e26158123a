"""The frontier: the best that each average width can do, predicted and measured."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm

from hawq.allocate import Budget, Table, allocate
from hawq.allocation import Allocation

AVERAGES = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)


@dataclass(frozen=True)
class Point:
    """One allocation of the frontier: bytes of the packed file, the predicted and the measured increase of the loss."""

    average_bits: float
    file_bytes: int
    predicted_increase: float | None
    measured_increase: float
    metric: float


def frontier(
    table: Table,
    bit_costs: Mapping[str, Mapping[int, float]],
    num_params: int,
    ties: Iterable[Sequence[str]],
    measure: Callable[[Allocation], tuple[int, float, float]],
    *,
    predicts_loss: bool,
    progress: bool = False,
) -> list[Point]:
    """Allocate at each average width that the table offers; `measure` returns (file bytes, loss increase, metric).

    `predicts_loss`: whether half of the objective predicts the loss increase (HAWQ-V2's table) or has other units.
    """
    widths = sorted({bits for row in table.values() for bits in row})
    averages = [average for average in AVERAGES if widths[0] <= average <= widths[-1]]
    ties = list(ties)
    points = []
    for average in tqdm(averages, desc="frontier", unit="allocation", disable=not progress):
        allocation = allocate(table, [Budget("bits of weights", bit_costs, average * num_params)], ties)
        file_bytes, increase, metric = measure(allocation)
        used = allocation.budgets["bits of weights"].used / num_params
        predicted = allocation.objective / 2 if predicts_loss else None
        points.append(Point(used, file_bytes, predicted, increase, metric))
    return points
