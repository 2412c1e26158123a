"""The smallest allocation within a drop of the metric."""

import json

import numpy as np
import pytest

import hawq
from hawq.max_drop import smallest_within

WIDTHS = (2, 3, 4, 5, 6, 8)


def problem(seed: int, count: int = 30):
    rng = np.random.default_rng(seed)
    params = rng.integers(100, 5000, count)
    table = {
        str(i): {bits: float(size * 10 ** rng.uniform(-2, 0) * 4.0**-bits) for bits in WIDTHS} for i, size in enumerate(params)
    }
    return table, {str(i): {bits: float(size * bits) for bits in WIDTHS} for i, size in enumerate(params)}


@pytest.mark.parametrize("seed", range(3))
def test_a_metric_that_falls_with_the_objective_gives_the_true_minimum(seed):
    """Then the truth is another integer program: least size with the objective as a budget."""
    table, sizes = problem(seed)
    max_drop = hawq.allocate(table, [hawq.Budget("size", sizes, 0.5 * sum(row[8] for row in sizes.values()))]).objective
    truth = hawq.allocate(sizes, [hawq.Budget("drop", table, max_drop)]).objective
    result = smallest_within(
        table, sizes, measure=lambda allocation: 1.0 - allocation.objective, baseline=1.0, max_drop=max_drop
    )
    assert truth <= result.size <= truth * 1.01
    assert result.metric >= result.threshold - 1e-9
    assert result.size == sum(sizes[name][bits] for name, bits in result.allocation.bits.items())
    assert len(result.trials) < 20
    assert len({tuple(trial.allocation.bits.values()) for trial in result.trials}) == len(result.trials)
    assert json.loads(json.dumps(result.to_dict()))["size"] == result.size


def test_the_narrowest_widths_may_do():
    table, sizes = problem(0, 5)
    result = smallest_within(table, sizes, measure=lambda _: 0.98, baseline=0.99, max_drop=0.01)
    assert set(result.allocation.bits.values()) == {2}
    assert len(result.trials) == 2


def test_a_metric_out_of_order_is_met_by_the_neighbours_below():
    """The bisection ends at the failing average of 4 bits; a little below it, a lucky allocation does."""
    table, sizes = problem(1)
    all_8 = sum(row[8] for row in sizes.values())

    def measure(allocation):
        share = sum(sizes[name][bits] for name, bits in allocation.bits.items()) / all_8
        return 1.0 if share > 0.5 or 0.484 < share < 0.493 else 0.0

    result = smallest_within(table, sizes, measure=measure, baseline=1.0, max_drop=0.1)
    assert 0.484 < result.size / all_8 < 0.493
    assert result.metric == 1.0
    assert any(not trial.kept and trial.size > result.size for trial in result.trials)


def test_other_budgets_and_ties_hold():
    table, sizes = problem(2, 6)
    other = hawq.Budget("wide", {name: {bits: float(bits == 8) for bits in row} for name, row in table.items()}, 2)
    result = smallest_within(
        table, sizes, [other], [("0", "1")], measure=lambda found: 1 - found.objective, baseline=1.0, max_drop=15.0
    )
    for trial in result.trials:
        bits = trial.allocation.bits
        assert sum(width == 8 for width in bits.values()) <= 2
        assert bits["0"] == bits["1"]


def test_widths_that_sensitivity_leaves_unused_are_tried_before_giving_up():
    """At equal sensitivity the optimum may be narrow; the widest allocation is measured too."""
    table, sizes = {"a": {4: 0.0, 8: 0.0}}, {"a": {4: 4.0, 8: 8.0}}
    result = smallest_within(table, sizes, measure=lambda found: found.bits["a"] / 8, baseline=1.0, max_drop=0.0)
    assert result.allocation.bits == {"a": 8}


@pytest.mark.parametrize("metric", [0.7, float("nan")])
def test_a_drop_that_no_widths_keep_names_the_best_metric(metric):
    table, sizes = problem(0, 3)
    with pytest.raises(ValueError, match=rf"at least 0.98 was asked for, but .* reach {metric:g}"):
        smallest_within(table, sizes, measure=lambda _: metric, baseline=0.99, max_drop=0.01)


@pytest.mark.parametrize(
    ("options", "message"), [({"max_drop": -0.1}, "max_drop=-0.1"), ({"resolution": 0.0}, "resolution=0.0")]
)
def test_bad_options(options, message):
    table, sizes = problem(0, 3)
    with pytest.raises(ValueError, match=message):
        smallest_within(table, sizes, **{"measure": lambda _: 1.0, "baseline": 1.0, "max_drop": 0.1} | options)
