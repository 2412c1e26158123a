"""How an allocation holds within its sensitivities' standard errors, against closed forms."""

import json
import math
import sys

import pytest
import torch

import hawq
from hawq.stability import stability

COSTS = {"a": {2: 2.0, 4: 4.0}, "b": {2: 2.0, 4: 4.0}}
ONE_WIDE = [hawq.Budget("size", COSTS, 6)]


def two_layers(error: float) -> hawq.SensitivityTable:
    """Only one of two layers can be wide: b, unless noise makes a the more sensitive."""
    omega = {"a": {2: 1.0, 4: 0.0}, "b": {2: 1.2, 4: 0.0}}
    return hawq.SensitivityTable(omega, {name: {2: error, 4: 0.0} for name in omega}, "hessian-trace")


def test_share_and_regret_of_two_layers():
    """The difference of the two draws is N(0.2, 2 * 0.2^2); regret is its negative part."""
    samples, spread, mean = 300, 0.2 * math.sqrt(2), 0.2
    result = stability(two_layers(0.2), ONE_WIDE, samples=samples, generator=torch.Generator().manual_seed(0))
    normal = torch.distributions.Normal(0.0, 1.0)
    share = float(normal.cdf(torch.tensor(mean / spread)))
    regret = spread * float(normal.log_prob(torch.tensor(mean / spread)).exp()) - mean * (1 - share)
    assert result.rows["b"].bits == 4
    assert abs(result.rows["b"].share - share) < 4 * math.sqrt(share * (1 - share) / samples)
    assert result.rows["a"].share == result.rows["b"].share
    assert (result.rows["a"].narrowest, result.rows["a"].widest) == (2, 4)
    assert abs(result.expected_regret - regret) < 4 * result.regret_stderr
    assert 0 < result.regret_stderr < regret / 2
    assert result.relative_regret == pytest.approx(result.expected_regret / (1.0 - result.expected_regret), abs=0.1)
    assert json.loads(json.dumps(result.to_dict()))["rows"]["b"]["bits"] == 4


def test_small_errors_change_nothing():
    result = stability(two_layers(1e-4), ONE_WIDE, samples=8)
    assert all(row.share == 1.0 and row.narrowest == row.widest == row.bits for row in result.rows.values())
    assert result.expected_regret == 0.0


def test_widths_of_one_row_share_their_draw():
    """With one draw for all widths a row's sensitivities stay proportional, and a narrower width is never the better one."""
    omega = {"a": {2: 1.0, 4: 0.9, 8: 0.8}}
    table = hawq.SensitivityTable(omega, {"a": {bits: 0.5 * value for bits, value in omega["a"].items()}}, "hessian-trace")
    result = stability(table, samples=32, generator=torch.Generator().manual_seed(0))
    assert (result.rows["a"].share, result.rows["a"].narrowest) == (1.0, 8)


def test_exact_sensitivities_are_not_drawn(monkeypatch):
    monkeypatch.setattr(sys.modules["hawq.stability"], "allocate", lambda *_: pytest.fail("solved"))
    result = stability(two_layers(0.0), ONE_WIDE)
    assert (result.exact, result.samples, result.rows, result.expected_regret) == (True, 0, {}, 0.0)


def test_ties_hold_in_every_draw():
    ties = [("a", "b")]
    result = stability(two_layers(0.5), [hawq.Budget("size", COSTS, 7)], ties, samples=16)
    assert all((row.bits, row.share) == (2, 1.0) for row in result.rows.values())


def test_the_generator_decides():
    first, second = (
        stability(two_layers(0.5), ONE_WIDE, samples=16, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert first == second
    with pytest.raises(ValueError, match="samples=0"):
        stability(two_layers(0.5), samples=0)
