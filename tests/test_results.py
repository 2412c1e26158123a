"""What a notebook shows of results: tables and figures that hold their numbers."""

import math

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import hessian
import parallel
from hawq import Allocation
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
    shown = Allocation({"conv<1>": 4, "fc": 8})
    assert "<td>conv&lt;1&gt;</td><td>4</td>" in shown._repr_html_()
    assert repr(shown).splitlines()[2].split() == ["fc", "8"]
    plans = parallel.best_plans(parallel.alexnet(), 64, 512, parallel.AlphaBeta(2e-6, 1 / 6e9))
    rows = plans.cells()
    assert [row[0] for row in rows] == ["best", "all ranks share the batch", "all share every layer"]
    assert math.isclose(float(rows[1][2]), 1e3 * plans.pure_batch.seconds, rel_tol=1e-3)
    assert plans._repr_html_().count("<tr>") == 4


def test_pages_say_which_colours_figures_have():
    figure = Figure()
    figure.add_subplot().plot([0, 1], [0, 1], color=BLUE)
    assert f"stroke: {BLUE}" in to_svg(figure)
    assert "stroke: var(--blue)" in to_inline_svg(figure)
    assert BLUE not in to_inline_svg(figure)
