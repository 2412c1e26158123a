"""The audit of predictions, on increases that are known in closed form."""

import json
import math

import pytest
from matplotlib.figure import Figure

import hawq
from hawq.audit import Comparison, audit

TABLE = {"a": {2: 0.8, 4: 0.2}, "b": {2: 0.4, 4: 0.02}}


def measured(curvature: float = 1.0, coupling: float = 0.0) -> dict[str, tuple[hawq.Allocation, float]]:
    """Increases of a quadratic loss: curvature times the prediction, and an interaction of the two layers."""
    found = {}
    for a in (2, 4):
        for b in (2, 4):
            increase = curvature * (TABLE["a"][a] + TABLE["b"][b]) / 2 + coupling
            found[f"{a}, {b}"] = (hawq.Allocation({"a": a, "b": b}), increase)
    return found


def test_a_quadratic_loss_is_predicted_exactly():
    result = audit(TABLE, measured(), measure_layer=lambda name, bits: TABLE[name][bits] / 2)
    for part in (result.frontier, result.layers, result.interaction):
        assert part is not None
        assert (part.num_points, part.spearman, part.not_positive) == (4, pytest.approx(1.0), 0)
        assert part.ratio == pytest.approx(1.0)
    assert result.layers is not None
    assert result.layers.labels == ("a at 2", "a at 4", "b at 2", "b at 4")


def test_curvature_and_interaction_show_in_their_own_parts():
    result = audit(TABLE, measured(3.0, coupling=0.6), measure_layer=lambda name, bits: 3.0 * TABLE[name][bits] / 2)
    predicted = 2 * sum(sum(row.values()) / 2 for row in TABLE.values())  # each width of each layer twice
    assert result.frontier.ratio == pytest.approx((3.0 * predicted + 4 * 0.6) / predicted)
    assert result.layers is not None
    assert result.layers.ratio == pytest.approx(3.0)
    assert result.interaction is not None
    assert result.interaction.ratio == pytest.approx(1.0 + 4 * 0.6 / (3.0 * predicted))


def test_each_single_layer_is_measured_once():
    calls = []
    chosen = {key: value for key, value in measured().items() if key in ("2, 4", "4, 4")}
    audit(TABLE, chosen, measure_layer=lambda name, bits: calls.append((name, bits)) or 1.0)
    assert calls == [("a", 2), ("a", 4), ("b", 4)]
    assert audit(TABLE, chosen).layers is None


def test_rank_correlation_by_its_definition():
    """1 - 6 sum d^2 / (n (n^2 - 1)) without equal ranks; increases that are not positive rank lowest and count in totals."""
    part = Comparison.of("pqrs", [1.0, 2.0, 3.0, 4.0], [0.5, -0.5, 0.0, 2.0])
    assert part.spearman == pytest.approx(1 - 6 * (2**2 + 1 + 1) / (4 * 15))
    assert part.ratio == pytest.approx(0.2)
    assert part.not_positive == 2


def test_what_cannot_be_told_is_none():
    assert Comparison.of("pq", [1.0, 2.0], [1.0, 2.0]).spearman is None
    assert Comparison.of("pqr", [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).spearman is None
    assert Comparison.of("pq", [-1.0, 0.5], [1.0, 2.0]).ratio is None
    other_units = audit(TABLE, measured(), measure_layer=lambda name, bits: TABLE[name][bits], predicts_loss=False)
    assert (other_units.frontier.ratio, other_units.frontier.spearman) == (None, pytest.approx(1.0))
    assert other_units.interaction is not None
    assert other_units.interaction.ratio == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"q: predicted 2.0 and measured nan"):
        Comparison.of("pq", [1.0, 2.0], [1.0, math.nan])
    document = json.loads(json.dumps(audit(TABLE, measured()).to_dict()))
    assert document["layers"] is None
    assert document["frontier"]["num_points"] == 4


def test_the_plot_shows_every_point_and_counts_those_off_the_axes():
    increases = {("a", 2): 0.5, ("a", 4): -0.1, ("b", 2): 0.2, ("b", 4): 0.0}
    result = audit(TABLE, measured(), measure_layer=lambda name, bits: increases[name, bits])
    ax = Figure().add_subplot()
    assert result.plot(ax) is ax
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert any(text.startswith("single layers: 4") for text in texts)
    assert any(text.endswith("not positive: 2") for text in texts)
    assert sum(len(points.get_offsets()) for points in ax.collections) == 12
    low, high = ax.get_ylim()
    assert all(low <= y <= high for points in ax.collections for _, y in points.get_offsets())
    assert {text.get_text() for text in ax.texts} >= {"2, 4", "a at 4"}


def test_a_plot_without_any_positive_increase():
    result = audit(TABLE, {label: (allocation, -1.0) for label, (allocation, _) in measured().items()})
    assert result.plot().get_legend() is not None
