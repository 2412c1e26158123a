"""The integer program against brute force and against published allocations."""

import json
import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hawq
from hawq import integer_program
from hawq.allocation import Allocation
from tests.oracles import best_allocation

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "hawq_v3_resnet18.json"


@st.composite
def problems(draw):
    """Small random tables with up to three budgets and ties; omegas over many orders of magnitude."""
    widths = draw(st.sampled_from([(2, 4), (2, 4, 8), (2, 3, 4, 8)]))
    count = draw(st.integers(1, 5))
    names = [f"layer{index}" for index in range(count)]
    decades = draw(st.sampled_from([1, 6, 11]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    table = {name: {bits: float(10 ** rng.uniform(-decades, 0)) for bits in widths} for name in names}
    budgets = []
    for position in range(draw(st.integers(0, 3))):
        whole = draw(st.booleans())
        size = {name: int(rng.integers(1, 1000)) if whole else float(rng.uniform(0.1, 10)) for name in names}
        costs = {name: {bits: size[name] * bits for bits in widths} for name in names}
        low = sum(min(row.values()) for row in costs.values())
        high = sum(max(row.values()) for row in costs.values())
        budgets.append(hawq.Budget(f"budget{position}", costs, low + rng.uniform(-0.1, 1.0) * (high - low)))
    ties = [tuple(names[:2])] if count > 2 and draw(st.booleans()) else []
    if count > 3 and draw(st.booleans()):
        ties.append((names[1], names[3]))
    return table, budgets, ties


@given(problems())
@settings(max_examples=100, deadline=None)
def test_equals_brute_force(problem):
    table, budgets, ties = problem
    best = best_allocation(table, budgets, ties)
    if best is None:
        with pytest.raises(ValueError, match="budget"):
            hawq.allocate(table, budgets, ties)
        return
    found = hawq.allocate(table, budgets, ties)
    assert found.objective == pytest.approx(best, rel=1e-9)
    assert found.gap is not None
    assert found.gap <= 1e-9
    for budget in budgets:
        assert found.budgets[budget.name].used <= budget.limit * (1 + 1e-12)
        assert found.budgets[budget.name].used == sum(budget.costs[name][bits] for name, bits in found.bits.items())
    for tie in ties:
        assert len({found.bits[name] for name in tie}) == 1


@st.composite
def joint_problems(draw):
    """Up to four layers and three activations that they share, with bit operations and a size, and ties across them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    layers = [f"layer{index}" for index in range(draw(st.integers(1, 4)))]
    rows = dict.fromkeys(layers, (2, 4, 8))
    rows |= {
        f"activation:{index}": draw(st.sampled_from([(4, 8), (8,), (2, 4, 8)])) for index in range(draw(st.integers(1, 3)))
    }
    inputs = [name for name in rows if name not in layers]
    table = {name: {bits: float(10 ** rng.uniform(-3, 0)) for bits in widths} for name, widths in rows.items()}
    sizes = {name: {bits: int(rng.integers(1, 100)) * bits for bits in rows[name]} for name in layers}
    products = {}
    for name in layers:
        for source in rng.choice(inputs, size=rng.integers(0, len(inputs) + 1), replace=False):
            macs = int(rng.integers(1, 100)) if draw(st.booleans()) else float(rng.uniform(0.1, 10))
            products[name, str(source)] = {(b, a): macs * b * a for b in rows[name] for a in rows[source]}
    low = sum(min(pair.values()) for pair in products.values())
    high = sum(max(pair.values()) for pair in products.values())
    others = {name: dict.fromkeys(rows[name], 0.0) for name in layers if all(name != one for one, _ in products)}
    bops = hawq.Budget("bops", others, low + rng.uniform(-0.1, 1.0) * (high - low) + 1e-6, products)
    size = hawq.Budget("size", sizes, rng.uniform(0.9, 1.0) * sum(max(row.values()) for row in sizes.values()))
    ties = [tie for tie in (layers[:2], inputs[:2], [layers[0], inputs[-1]]) if len(tie) > 1 and draw(st.booleans())]
    return table, [bops, size], ties


@given(joint_problems(), st.sampled_from([1, 200]))
@settings(max_examples=100, deadline=None)
def test_costs_of_two_rows_equal_brute_force(problem, spare):
    """Also with a first core of next to nothing, which has to grow."""
    with mock.patch.object(integer_program, "_SPARE", spare):
        check_costs_of_two_rows(*problem)


def check_costs_of_two_rows(table, budgets, ties):
    best = best_allocation(table, budgets, ties)
    if best is None:
        with pytest.raises(ValueError, match=r"budget|no width in common"):
            hawq.allocate(table, budgets, ties)
        return
    found = hawq.allocate(table, budgets, ties)
    assert found.objective == pytest.approx(best, rel=1e-9)
    assert found.gap is not None
    assert found.gap <= 1e-9
    assert all(found.budgets[budget.name].used <= budget.limit * (1 + 1e-12) for budget in budgets)
    assert all(len({found.bits[name] for name in tie}) == 1 for tie in ties)


def knapsack(groups: list[list[tuple[float, int]]], limit: int) -> float:
    """The least sum of values with one (value, whole cost) of each group and costs up to `limit`, by dynamic programming."""
    best = np.zeros(limit + 1)
    for group in groups:
        shifted = [np.concatenate([np.full(min(cost, limit + 1), np.inf), best])[: limit + 1] + value for value, cost in group]
        best = np.min(shifted, axis=0)
    return float(best[-1])


@pytest.mark.parametrize("spare", [1, 200])
@pytest.mark.parametrize("seed", range(6))
def test_many_layers_equal_dynamic_programming(monkeypatch, seed, spare):
    """More variables than the first core holds; sensitivities over eleven decades in half of the cases."""
    monkeypatch.setattr(integer_program, "_SPARE", spare)
    rng = np.random.default_rng(seed)
    decades, widths = (2, 11)[seed % 2], (2, 3, 4, 5, 6, 8)
    params = rng.integers(1, 40, 120)
    table = {
        str(index): {bits: 10.0 ** rng.uniform(-decades, 0) * 4.0**-bits * rng.uniform(1, 1.5) for bits in widths}
        for index in range(len(params))
    }
    costs = {str(index): {bits: int(count * bits) for bits in widths} for index, count in enumerate(params)}
    limit = int(sum(params) * rng.uniform(2.2, 6.0))
    found = hawq.allocate(table, [hawq.Budget("size", costs, limit)])
    groups = [[(omega, costs[name][bits]) for bits, omega in row.items()] for name, row in table.items()]
    assert found.objective == pytest.approx(knapsack(groups, limit), rel=1e-9)
    assert found.gap is not None
    assert found.gap <= 1e-9


@pytest.mark.parametrize("spare", [1, 200])
@pytest.mark.parametrize("seed", range(3))
def test_many_layers_with_their_activations_equal_dynamic_programming(monkeypatch, seed, spare):
    monkeypatch.setattr(integer_program, "_SPARE", spare)
    rng = np.random.default_rng(seed)
    widths, count = (2, 4, 6, 8), 30
    macs = rng.integers(1, 20, count)
    names = [(f"layer{index}", f"activation:{index}") for index in range(count)]
    table = {name: {bits: 4.0**-bits * rng.uniform(1, 100) for bits in widths} for pair in names for name in pair}
    products = {
        pair: {(b, a): int(size) * (b // 2) * (a // 2) for b in widths for a in widths}
        for pair, size in zip(names, macs, strict=True)
    }
    limit = int(sum(macs) * (2.0, 4.0, 8.0)[seed])
    found = hawq.allocate(table, [hawq.Budget("bops", {}, limit, products)])
    groups = [[(table[w][b] + table[x][a], cost) for (b, a), cost in products[w, x].items()] for w, x in names]
    assert found.objective == pytest.approx(knapsack(groups, limit), rel=1e-9)
    assert found.gap is not None
    assert found.gap <= 1e-9


def published() -> dict:
    if not GOLDEN.is_file():
        pytest.skip(f"{GOLDEN.name} is not beside this checkout, in ../shared/golden")
    return json.loads(GOLDEN.read_text())


def test_the_published_allocations_of_hawq_v3():
    """All nine ResNet-18 allocations that HAWQ-V3 ships (sizes, bit operations, latencies), proven optimal."""
    golden = published()
    widths = (4, 8)
    layers = [str(index) for index in range(len(golden["parameters"]))]
    omega = {
        layer: {
            bits: golden["average_hessian_trace"][index] * golden["delta_weights_squared"][str(bits)][index] for bits in widths
        }
        for index, layer in enumerate(layers)
    }
    costs = {
        "modelsize": lambda index, bits: golden["parameters"][index] * bits,
        "bops": lambda index, bits: golden["macs"][index] * bits * bits,
        "latency": lambda index, bits: golden["latency_ms"][str(bits)][index],
    }
    assert len(golden["allocations"]) == 9
    for name, expected in golden["allocations"].items():
        kind, fraction = name.split("_")
        table = {layer: {bits: costs[kind](index, bits) for bits in widths} for index, layer in enumerate(layers)}
        low, high = (sum(row[bits] for row in table.values()) for bits in widths)
        budget = hawq.Budget(kind, table, low + float(fraction) * (high - low))
        ties = [tuple(str(index) for index in pair) for pair in golden["tied_layers"]]
        found = hawq.allocate(omega, [budget], ties)
        assert list(found.bits.values()) == expected["optimal_bits"], name
        assert found.objective == pytest.approx(expected["optimal_omega"], abs=5e-7), name
        assert found.gap is not None
        assert found.gap <= 1e-9


def test_no_budget_takes_the_least_sensitive_width_of_each_layer():
    table = {"a": {2: 1.0, 4: 0.5}, "b": {2: -1.0, 4: 0.0}}
    assert hawq.allocate(table).bits == {"a": 4, "b": 2}


def test_a_table_over_many_orders_of_magnitude():
    table = {"a": {2: 1e9, 8: 0.0}, "b": {2: 3e-5, 4: 2e-5, 8: 0.0}, "c": {2: 3e-5, 4: 1e-5, 8: 0.0}}
    costs = {name: {bits: float(bits) for bits in row} for name, row in table.items()}
    assert hawq.allocate(table, [hawq.Budget("size", costs, 14)]).objective == pytest.approx(4e-5)


def test_fractions_that_add_up_exactly_are_within_the_limit():
    table = {"a": {2: 1.0, 4: 0.5}, "b": {2: 1.0, 4: 0.5}}
    costs = {"a": {2: 0.1, 4: 0.1}, "b": {2: 0.2, 4: 0.2}}
    assert hawq.allocate(table, [hawq.Budget("time", costs, 0.3)]).bits == {"a": 4, "b": 4}


def test_infeasible_budgets_say_by_how_much():
    table = {"a": {2: 1.0, 4: 0.5}, "b": {2: 1.0, 4: 0.5}}
    size = {name: {bits: 100.0 * bits for bits in row} for name, row in table.items()}
    with pytest.raises(ValueError, match=r"'size' allows 300, but .* already need 400, 100 \(33.3%\) more"):
        hawq.allocate(table, [hawq.Budget("size", size, 300)])
    with pytest.raises(ValueError, match=r"'size' allows -5, but .* 405 more"):
        hawq.allocate(table, [hawq.Budget("size", size, -5)])
    backwards = {name: {2: 4.0, 4: 2.0} for name in table}
    budgets = [hawq.Budget("size", size, 600), hawq.Budget("time", backwards, 5)]
    with pytest.raises(ValueError, match=r"'size' \(600\) and 'time' \(5\) can each be kept, but not together: .* 20.00%"):
        hawq.allocate(table, budgets)


def test_infeasible_products_say_by_how_much():
    """Two layers read one activation: 10 * 2 * 4 + 5 * 2 * 4 bit operations at the least, while size keeps the layers wide."""
    table = {"a": {2: 1.0, 4: 0.5}, "b": {2: 1.0, 4: 0.5}, "activation:x": {4: 1.0, 8: 0.1}}
    products = {
        (name, "activation:x"): {(b, a): macs * b * a for b in (2, 4) for a in (4, 8)} for name, macs in (("a", 10), ("b", 5))
    }
    with pytest.raises(ValueError, match=r"'bops' allows 100, but .* already need 120, 20 \(20.0%\) more"):
        hawq.allocate(table, [hawq.Budget("bops", {}, 100, products)])
    narrowness = hawq.Budget("narrowness", {name: {2: 1.0, 4: 0.0} for name in "ab"}, 0.5)  # both layers at 4 bits: 240
    with pytest.raises(ValueError, match=r"'bops' .* and 'narrowness' .* can each be kept, but not together: .* 20.00%"):
        hawq.allocate(table, [hawq.Budget("bops", {}, 200, products), narrowness])
    assert hawq.allocate(table, [hawq.Budget("bops", {}, 240, products), narrowness]).bits == {
        "a": 4,
        "b": 4,
        "activation:x": 4,
    }


def test_tied_rows_share_their_products():
    table = {"a": {4: 1.0, 8: 0.0}, "activation:x": {4: 1.0, 8: 0.0}, "activation:y": {4: 5.0, 8: 0.0}}
    bops = {("a", "activation:x"): {(b, x): float(b * x) for b in (4, 8) for x in (4, 8)}}
    budget = hawq.Budget("bops", {}, 32, bops)
    assert hawq.allocate(table, [budget]).objective == 1.0
    assert hawq.allocate(table, [budget], [("activation:x", "activation:y")]).bits == {
        "a": 4,
        "activation:x": 8,
        "activation:y": 8,
    }
    tied = hawq.allocate(table, [budget], [("a", "activation:x")])
    assert tied.bits == {"a": 4, "activation:x": 4, "activation:y": 8}
    assert tied.layers == {"a": 4}
    assert tied.activations == {"x": 4, "y": 8}
    assert tied.average_bits({"a": 10}) == 4.0


@pytest.mark.parametrize(
    ("table", "budgets", "ties", "message"),
    [
        ({}, [], [], "table is empty"),
        ({"a": {2: 1.0}}, [], [("a", "z")], "names 'z', which is not in the sensitivity table"),
        ({"a": {2: 1.0}, "b": {4: 1.0}}, [], [("a", "b")], "a, b have no width in common"),
        ({"a": {2: math.nan}}, [], [], "sensitivity of layer 'a' at 2 bits is nan"),
        ({"a": {2: 1.0, 4: 1.0}}, [hawq.Budget("s", {"a": {2: 1.0}}, 3)], [], "no cost for layer 'a' at 4 bits"),
        ({"a": {2: 1.0}}, [hawq.Budget("s", {"a": {2: 1.0}}, math.nan)], [], "has the limit nan"),
        ({"a": {2: 1.0}}, [hawq.Budget("s", {"a": {2: math.inf}}, 1)], [], "at 2 bits is not finite"),
        ({"a": {2: 1.0}}, [hawq.Budget("s", {"a": {2: 1.0}}, 3)] * 2, [], "same name"),
        ({"a": {2: 1.0}}, [hawq.Budget("s", {}, 3)], [], "no cost for layer 'a' at 2 bits"),
        ({"a": {2: 1.0}}, [hawq.Budget("s", {}, 3, {("a", "b"): {(2, 2): 1.0}})], [], "product of 'b', which is not in"),
        (
            {"a": {2: 1.0}, "b": {2: 1.0, 4: 1.0}},
            [hawq.Budget("s", {}, 3, {("a", "b"): {(2, 2): 1.0}})],
            [],
            "no finite cost for 'a' at 2 bits with 'b' at 4",
        ),
    ],
)
def test_bad_input(table, budgets, ties, message):
    with pytest.raises(ValueError, match=message):
        hawq.allocate(table, budgets, ties)


def test_allocations_round_trip(tmp_path):
    table = {"a": {2: 1.0, 4: 0.5}, "b": {2: 1.0, 4: 0.5}}
    costs = {name: {bits: 100.0 * bits for bits in row} for name, row in table.items()}
    allocation = hawq.allocate(table, [hawq.Budget("size", costs, 600)]).with_activations(8)
    allocation.save(tmp_path / "allocation.json")
    assert Allocation.load(tmp_path / "allocation.json") == allocation
    assert allocation.average_bits({"a": 10, "b": 30}) in (2.5, 3.5)
    for text in ("{}", "[]", "no json", allocation.to_json().replace('"version": 1', '"version": 99')):
        with pytest.raises(ValueError, match="no allocation of version 1"):
            Allocation.from_json(text)
