"""The smallest network that is still good enough: a search over the size limit with a measurement at each step."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tqdm.auto import tqdm

from hawq.allocate import Budget, Table, allocate
from hawq.allocation import Allocation

_SIZE = "size"
_NEIGHBOURS = 2  # tried below each size found: a measured metric does not fall evenly


@dataclass(frozen=True)
class Trial:
    """One measured allocation: the limit it is optimal for (None: no limit), its size, and whether its metric will do."""

    limit: float | None
    size: float
    metric: float
    kept: bool
    allocation: Allocation


@dataclass(frozen=True)
class SmallestWithin:
    """The smallest allocation found whose own measured metric is at least `threshold`, and all trials in their order."""

    allocation: Allocation
    size: float
    metric: float
    threshold: float
    trials: list[Trial]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def smallest_within(
    table: Table,
    size_costs: Table,
    budgets: Sequence[Budget] = (),
    ties: Iterable[Sequence[str]] = (),
    *,
    measure: Callable[[Allocation], float],
    baseline: float,
    max_drop: float,
    resolution: float = 0.01,
    progress: bool = False,
) -> SmallestWithin:
    """The smallest allocation whose measured metric is at least `baseline - max_drop`, to a relative `resolution` in size.

    Bisects the limit on the sum of `size_costs[row][bits]`, each limit with its optimal allocation under the `budgets`;
    then tries the limits 1 and 2 resolutions below what was found, again after each success. Since a measured metric may
    rise as sizes fall, smaller allocations that would do can stay unseen; the one returned was itself measured. No
    allocation is measured twice.

    Raises ValueError if even the best allocation without a size limit drops more, naming the best metric reached.
    """
    if not max_drop >= 0 or not math.isfinite(baseline):
        raise ValueError(f"max_drop={max_drop} from {baseline}: give a drop of at least 0 from a finite metric")
    if not 0 < resolution < 1:
        raise ValueError(f"resolution={resolution}: give a fraction of the size, between 0 and 1")
    ties, threshold = list(ties), baseline - max_drop
    size = Budget(_SIZE, size_costs, math.inf)
    sizes = {name: {bits: size.cost(name, bits) for bits in row} for name, row in table.items()}
    trials: dict[tuple[int, ...], Trial] = {}
    bar = tqdm(desc="smallest size", unit="allocation", disable=not progress)

    def attempt(allocation: Allocation, limit: float | None = None) -> Trial:
        key = tuple(allocation.bits.values())
        if key not in trials:
            metric = float(measure(allocation))
            kept = metric >= threshold - 1e-12 * abs(threshold)  # 0.99 - 0.01 is not 0.98 to the last digit
            trials[key] = Trial(limit, size.used(allocation.bits), metric, kept, allocation)
            bar.update()
        return trials[key]

    def within(limit: float) -> Trial:
        return attempt(allocate(table, [replace(size, limit=limit), *budgets], ties), limit)

    with bar:
        best = attempt(allocate(table, budgets, ties))
        if not best.kept:  # among equals in sensitivity it may have left bits unused
            widest = {name: {bits: -cost for bits, cost in row.items()} for name, row in sizes.items()}
            best = attempt(allocate(widest, budgets, ties))
        if not best.kept:
            reached = max(trial.metric for trial in trials.values())
            raise ValueError(
                f"a metric of at least {threshold:.6g} was asked for, but the widest widths that the budgets allow reach "
                f"{reached:.6g}: allow a larger drop, loosen the budgets or offer wider widths"
            )
        floor = failed = allocate(sizes, budgets, ties).objective
        least = within(floor)
        best = least if least.kept else best
        while best.size - failed > resolution * abs(best.size) and best is not least:
            limit = (failed + best.size) / 2
            trial = within(limit)
            best, failed = (trial, failed) if trial.kept else (best, limit)
        while True:
            below = (best.size - step * resolution * abs(best.size) for step in range(1, _NEIGHBOURS + 1))
            smaller = next((trial for trial in map(within, (limit for limit in below if limit >= floor)) if trial.kept), None)
            if smaller is None:
                return SmallestWithin(best.allocation, best.size, best.metric, threshold, list(trials.values()))
            best = smaller
