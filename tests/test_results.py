"""What a notebook shows of results: tables and figures that hold their numbers."""

import dataclasses
import math

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

import hawq
import hessian
import parallel
from hawq.cost.latency import LatencyTable
from hessian import landscape
from hessian.colours import BLUE
from hessian.drawing import to_inline_svg, to_svg


@pytest.fixture
def operator():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 3, generator=generator).double(), torch.randn(20, 2, generator=generator).double()
    return hessian.Hessian(nn.Linear(3, 2).double(), nn.MSELoss(), (x, y))


def test_a_density_and_a_landscape_are_figures(operator):
    shown = hessian.spectral_density(operator, num_steps=4, generator=torch.Generator().manual_seed(0))._repr_html_()
    assert shown.startswith("<svg")
    assert "share of eigenvalues per unit" in shown
    line = landscape.line(operator.objective, direction=torch.ones(8), num_points=5)
    assert "quadratic model" in line._repr_html_()
    directions = torch.eye(8, dtype=torch.float64)[:, :2]
    plane = landscape.plane(operator.objective, directions=directions, num_points=5)
    assert "distance along the first direction" in plane._repr_html_()


def test_an_allocation_and_plans_are_tables():
    shown = hawq.Allocation({"conv<1>": 4, "fc": 8})
    assert "<td>conv&lt;1&gt;</td><td>4</td>" in shown._repr_html_()
    assert repr(shown).splitlines()[2].split() == ["fc", "8"]
    plans = parallel.best_plans(parallel.alexnet(), 64, 512, parallel.AlphaBeta(2e-6, 1 / 6e9))
    rows = plans.cells()
    assert [row[0] for row in rows] == ["best", "all ranks share the batch", "all share every layer"]
    assert math.isclose(float(rows[1][2]), 1e3 * plans.pure_batch.seconds, rel_tol=1e-3)
    assert plans._repr_html_().count("<tr>") == 4


def drawn(result, **options) -> Axes:
    """What `plot` drew into the axes that it was given."""
    ax = Figure().add_subplot()
    assert result.plot(ax, **options) is ax
    return ax


def bars(ax: Axes) -> list[float]:
    """Lengths of horizontal bars by their place, those of no length left out."""
    return [bar.get_width() for bar in sorted(ax.patches, key=lambda bar: bar.get_y()) if bar.get_width()]


def test_eigenpairs_are_drawn_with_their_residuals_and_what_did_not_converge(operator):
    pairs = hessian.top_eigenpairs(operator, 3, generator=torch.Generator().manual_seed(0))
    ax = drawn(pairs)
    (points,) = (line for line in ax.lines if line.get_label() == "converged")
    assert points.get_ydata() == pytest.approx(pairs.values.numpy())
    unsure = dataclasses.replace(pairs, converged=torch.tensor([True, False, True]))
    (hollow,) = (line for line in drawn(unsure).lines if line.get_label() == "not converged")
    assert list(hollow.get_ydata()) == pytest.approx([float(pairs.values[1])])
    assert hollow.get_markerfacecolor() == "white"


def test_layer_reports_and_predicted_increases_are_bars(operator):
    report = hessian.layer_report(operator.objective, eigenvalues=True, generator=torch.Generator().manual_seed(0))
    assert bars(drawn(report)) == pytest.approx([row.trace for row in report.values()])
    averages = [row.trace / row.num_params for row in report.values()]
    assert bars(drawn(report, quantity="average trace")) == pytest.approx(averages)
    largest = [row.top_eigenvalue for row in report.values()]
    assert bars(drawn(report, quantity="top eigenvalue")) == pytest.approx(largest)
    with pytest.raises(ValueError, match=r"quantity='size': choose one of trace"):
        report.plot(quantity="size")
    with pytest.raises(ValueError, match=r"layer_report\(\.\.\., eigenvalues=True\)"):
        hessian.layer_report(operator.objective).plot(quantity="top eigenvalue")
    increase = hessian.predict_increase(operator.objective, delta=torch.ones(8).double())
    assert bars(drawn(increase)) == pytest.approx([abs(part.total) for part in increase.layers.values()])


def test_sensitivities_and_widths_are_drawn_by_row():
    omega = {"conv": {2: 4.0, 8: 0.5}, "fc": {2: 1.0, 8: -0.1}}
    table = hawq.SensitivityTable(omega, {name: dict.fromkeys(row, 0.1) for name, row in omega.items()}, "kl")
    ax = drawn(table)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["2 bits", "8 bits, 1 not positive"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["conv", "fc"]
    assert len(drawn(hawq.SensitivityTable({"conv": {16: 1.0}}, {"conv": {16: 0.0}}, "own")).containers) == 1
    ax = drawn(hawq.Allocation({"conv": 4, "activation:x": 8, "fc": 2}))
    assert [bar.get_height() for bar in ax.patches] == [4, 2, 8]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["conv", "fc", "x"]


def test_stability_frontier_and_audit_are_tables():
    omega = {"conv": {2: 4.0, 8: 0.5}, "fc": {2: 1.0, 8: 0.1}}
    table = hawq.SensitivityTable(omega, {name: dict.fromkeys(row, 0.1) for name, row in omega.items()}, "kl", predicts=0.5)
    model = nn.ModuleDict({"conv": nn.Linear(10, 1), "fc": nn.Linear(20, 1)})
    counts = hawq.num_params(table, model)
    assert counts == {"conv": 10, "fc": 20}
    budget = hawq.average_bits(table, model, 4)
    assert (budget.limit, budget.costs["fc"]) == (120, {2: 40, 8: 160})
    with pytest.raises(ValueError, match=r"a layer 'other', of which the model has no weight"):
        hawq.average_bits({"other": {2: 1.0}}, model, 4)
    held = hawq.stability(table, [budget], samples=10, generator=torch.Generator().manual_seed(0))
    assert [row[:2] for row in held.cells()] == [["conv", "8"], ["fc", "2"]]

    def measure(allocation):
        return hawq.Outcome(int(sum(allocation.bits.values())), allocation.objective, 0.9)

    frontier = hawq.frontier(table, counts, measure, predicts=table.predicts, averages=(2, 4, 8))
    assert [row[0] for row in frontier.cells()] == ["2", "4", "8"]
    assert frontier.cells()[0][1:] == ["4", "90.00%", "+5", "+2.5", ""]
    (measured,) = (line for line in drawn(frontier).lines if line.get_label() == "measured on the evaluation data")
    assert list(measured.get_ydata()) == [5.0, 1.5, 0.6]
    assert len(drawn(hawq.Frontier()).get_legend().get_texts()) == 2  # where none was measured
    chosen = {"this": (hawq.Allocation({"conv": 8, "fc": 2}), 0.75)}
    audit = hawq.audit(table, chosen, measure_layer=lambda name, bits: omega[name][bits] / 2)
    assert [row[0] for row in audit.cells()] == ["allocations", "single layers", "all together over sum of singles"]
    assert audit.cells()[0][3] == "1"


def test_latencies_are_a_table_in_microseconds():
    table = LatencyTable({"conv": {8: (2e-6, 1e-7)}}, cpu="any", runtime="1", threads=1, batch=4, activations=8)
    assert repr(table).splitlines()[1].split() == ["conv", "2", "±", "0.1"]


def test_plans_are_drawn_by_layout_and_by_ranks():
    network = parallel.AlphaBeta(2e-6, 1 / 6e9)
    plans = {ranks: parallel.best_plans(parallel.alexnet(), ranks, 512, network) for ranks in (2, 64, 1024)}
    best = plans[64].best
    assert bars(drawn(best)) == pytest.approx([1e3 * layer.seconds for layer in best.layers if layer.seconds])
    ax = Figure().add_subplot()
    assert parallel.plot_by_ranks(plans, ax) is ax
    shown = {line.get_label(): list(line.get_ydata()) for line in ax.lines}
    assert shown["best"] == [found.best.seconds for found in plans.values()]
    assert "cannot run" in shown  # 1,024 ranks and 512 examples
    with pytest.raises(ValueError, match="no plans to draw"):
        parallel.plot_by_ranks({})


def test_pages_say_which_colours_figures_have():
    figure = Figure()
    figure.add_subplot().plot([0, 1], [0, 1], color=BLUE)
    assert f"stroke: {BLUE}" in to_svg(figure)
    assert "stroke: var(--blue)" in to_inline_svg(figure)
    assert BLUE not in to_inline_svg(figure)
