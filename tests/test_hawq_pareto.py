"""Frontiers against all assignments, enumerated."""

import itertools

import numpy as np
import pytest

import hawq
from hawq.pareto import FINE_AVERAGES, Frontier, Outcome, Point, convex_frontier, frontier, optimal_allocations
from tests.oracles import best_allocation


def problem(seed: int, *, ties: bool = False):
    rng = np.random.default_rng(seed)
    names = ["a", "b", "c", "d"]
    table = {name: {bits: float(rng.uniform(0, 1)) for bits in (2, 3, 4, 8)} for name in names}
    costs = {name: {bits: int(rng.integers(1, 50)) for bits in (2, 3, 4, 8)} for name in names}
    return table, hawq.Budget("cost", costs, 0.0), [("a", "c")] if ties else []


def assignments(table, budget, ties):
    """(cost, objective) of every assignment."""
    for widths in itertools.product(*table.values()):
        bits = dict(zip(table, widths, strict=True))
        if all(len({bits[name] for name in tie}) == 1 for tie in ties):
            yield sum(budget.costs[name][bits[name]] for name in table), sum(table[name][bits[name]] for name in table)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_convex_frontier_is_the_hull_of_all_assignments(seed, ties):
    table, budget, tied = problem(seed, ties=ties)
    points = np.array(list(assignments(table, budget, tied)))
    hull = [(allocation.budgets["cost"].used, allocation.objective) for allocation in convex_frontier(table, budget, tied)]
    assert hull[0][0] == points[:, 0].min()
    assert hull[-1][1] == pytest.approx(points[:, 1].min())
    for (cost, objective), (next_cost, next_objective) in itertools.pairwise(hull):
        assert cost < next_cost
        assert objective > next_objective
        slope = (next_objective - objective) / (next_cost - cost)
        assert (points[:, 1] >= objective + slope * (points[:, 0] - cost) - 1e-12).all()
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(hull)]
    assert slopes == sorted(slopes)
    for cost, objective in hull:
        assert min(points[points[:, 0] <= cost, 1]) == pytest.approx(objective)


def test_costs_of_two_rows_have_no_sum_of_hulls():
    table = {"a": {2: 1.0}, "activation:x": {8: 0.0}}
    with pytest.raises(ValueError, match="has products"):
        convex_frontier(table, hawq.Budget("bops", {}, 0.0, {("a", "activation:x"): {(2, 8): 1.0}}))


@pytest.mark.parametrize("seed", range(2))
def test_optimal_allocations_fall_strictly(seed):
    table, budget, ties = problem(seed, ties=True)
    costs = sorted({cost for cost, _ in assignments(table, budget, ties)})
    found = optimal_allocations(table, budget, reversed(costs), ties)
    objectives = [allocation.objective for allocation in found]
    assert objectives == sorted(set(objectives), reverse=True)
    for allocation in found:
        limited = hawq.Budget("cost", budget.costs, allocation.budgets["cost"].limit)
        assert allocation.objective == pytest.approx(best_allocation(table, [limited], ties))
    assert objectives[-1] == pytest.approx(best_allocation(table, [], ties))


def test_the_measured_frontier():
    """Bytes and increases as measured decide which points are dominated; other budgets hold at every point."""
    params = {"a": 10, "b": 30}
    table = {name: {bits: count * 4.0**-bits for bits in (2, 3, 4, 8)} for name, count in params.items()}
    narrow = hawq.Budget("narrow", {name: {bits: float(bits == 8) for bits in row} for name, row in table.items()}, 1)
    measured = []

    def measure(allocation):
        measured.append(allocation)
        increase = -0.1 if len(measured) == 2 else allocation.objective
        return Outcome(int(allocation.budgets["bits of weights"].used), increase, 0.9, 3 * allocation.objective)

    points = frontier(table, params, measure, predicts=0.5, budgets=[narrow], averages=FINE_AVERAGES)
    assert len(points) == len(measured) == len({tuple(allocation.bits.values()) for allocation in measured})
    assert all(sorted(allocation.bits.values())[0] < 8 for allocation in measured)
    assert [point.dominated for point in points] == [False, False] + [True] * (len(points) - 2)
    assert [point.predicted_increase for point in points] == [allocation.objective / 2 for allocation in measured]
    assert [point.audited_increase for point in points] == [3 * point.objective for point in points]
    assert points[0].average_bits == 2.0


def test_dominated_points():
    nan = float("nan")
    increases = [(100, 0.5), (120, 0.5), (120, 0.4), (130, nan), (140, 0.4), (140, 0.1), (140, 0.1)]
    points = [Point(4.0, size, None, increase, 0.9, 1.0, 0.0) for size, increase in increases]
    assert [point.dominated for point in Frontier(points)] == [False, True, False, False, True, False, False]
