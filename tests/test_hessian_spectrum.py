"""A spectrum from one run: ends, trace and density; shared products, mistakes, pictures and tables."""

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

import hessian
from hessian.estimators import quadrature
from hessian.estimators.density import spectral_density
from hessian.estimators.spectrum import spectrum
from hessian.operators.base import Dense
from tests.cases import SmoothNet, classification, seeded
from tests.spectra import CASES, Recording, outliers_and_bulk, rotated, seed

matplotlib.use("Agg")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("number", range(3))
def test_both_ends_and_the_trace_from_one_run(number, dtype):
    operator = Recording(rotated(outliers_and_bulk(300) - 0.5, number).to(dtype))
    found = spectrum(operator, 4, 40, generator=seed(number))
    eigenvalues = torch.linalg.eigvalsh(operator.matrix.double())
    for end, true in ((found.largest, eigenvalues[-1]), (found.smallest, eigenvalues[0])):
        low, high = end.interval
        assert float((eigenvalues - end.value).abs().min()) <= end.residual
        assert low <= end.value <= high
        assert float(true) == pytest.approx(end.value, abs=0.01)
    assert found.largest.residual < 1e-3
    assert float(eigenvalues[0]) <= found.smallest.value + found.smallest.residual
    samples = 300 * (operator.probes * (operator.probes @ operator.matrix.double())).sum(1)
    assert found.trace.value == pytest.approx(float(samples.mean()), rel=1e-5 if dtype == torch.float32 else 1e-12)
    t = 3.182446305284263  # 97.5% quantile of Student's t with three degrees of freedom
    assert found.trace.stderr == pytest.approx(float(samples.std()) / 2 * t / 1.96, rel=1e-4)
    assert found.num_matvecs == 160 == sum(len(block) for block in operator.blocks)


def test_residuals_bound_the_error_before_convergence():
    matrix = rotated(torch.linspace(-1, 1, 200))
    eigenvalues = torch.linalg.eigvalsh(matrix)
    for steps in (1, 2, 3, 5, 9):
        rules = quadrature.lanczos_quadrature(Dense(matrix), 3, steps, generator=seed(15))
        nearest = (rules.nodes[..., None] - eigenvalues).abs().amin(-1)
        assert (nearest <= rules.residuals).all()
        assert float(rules.residuals.max()) < 1.1  # of a spectrum from -1 to 1


def test_all_living_probes_share_a_product():
    operator = Recording(CASES["full"].double())
    found = spectral_density(operator, 10, 5, generator=seed(16))
    assert [len(block) for block in operator.blocks] == [8] * 5 + [2] * 5
    assert found.num_matvecs == 50
    # Each axis is an eigenvector: a probe on it ends after one step, the others go on.
    operator = Recording(torch.diag(torch.tensor([1.0, 2.0])).double())
    found = spectral_density(operator, 3, 2, generator=seed(16))
    assert found.num_matvecs == 6
    assert [len(block) for block in operator.blocks] == [3, 3]


def test_finished_probes_leave_the_block():
    class SomeProbes(quadrature.VectorSpace):
        def random(self, count, distribution="rademacher", generator=None):
            rows = super().random(count, distribution, generator)
            if float(rows[0, 0]) > 0:
                rows[0, 1:] = 0  # an eigenvector of the diagonal matrix below
            return rows

    class Diagonal(Recording):
        space = property(lambda _: SomeProbes(4, torch.float64, torch.device("cpu")))

    operator = Diagonal(torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])).double())
    found = spectral_density(operator, 6, 4, generator=seed(17))
    ended = int((found.weights[:, 1:] == 0).all(1).sum())
    assert 0 < ended < 6
    assert [len(block) for block in operator.blocks] == [6] + 3 * [6 - ended]
    assert found.num_matvecs == 6 + 3 * (6 - ended)


def test_a_seed_means_the_same_probes_however_they_are_grouped(monkeypatch):
    operator = Recording(CASES["full"].double())
    together = spectral_density(operator, 5, 6, generator=seed(18))
    fewer = spectral_density(operator, 2, 6, generator=seed(18))
    torch.testing.assert_close(fewer.nodes, together.nodes[:2], rtol=0, atol=1e-13)
    monkeypatch.setattr(quadrature, "_BASIS_BYTES", 2 * 6 * 50 * 8)
    operator.blocks.clear()
    grouped = spectral_density(operator, 5, 6, generator=seed(18))
    assert [len(block) for block in operator.blocks] == [2] * 12 + [1] * 6
    torch.testing.assert_close(grouped.nodes, together.nodes, rtol=0, atol=1e-13)
    operator.blocks.clear()
    spectral_density(operator, 5, 6, generator=seed(18), reorthogonalize=False)
    assert [len(block) for block in operator.blocks] == [5] * 6  # two vectors each instead of six


def test_without_a_generator_the_global_one_advances():
    operator = Dense(CASES["full"].double())
    torch.manual_seed(19)
    first, second = spectral_density(operator, 1, 4), spectral_density(operator, 1, 4)
    assert not torch.equal(first.nodes, second.nodes)
    torch.manual_seed(19)
    assert torch.equal(spectral_density(operator, 1, 4).nodes, first.nodes)


def test_progress_counts_products_and_is_off_by_default(capsys):
    operator = Dense(CASES["full"].double())
    spectral_density(operator, 2, 7, generator=seed(19))
    assert capsys.readouterr() == ("", "")
    spectral_density(operator, 2, 7, generator=seed(19), progress=True)
    assert "14/14" in capsys.readouterr().err


def test_the_hessian_of_a_network():
    model, data = seeded(SmoothNet), classification(7, 4)
    operator = hessian.Hessian(model, nn.CrossEntropyLoss(), data)
    eigenvalues = torch.linalg.eigvalsh(operator.to_dense())
    found = spectrum(operator, 8, operator.shape[0], generator=seed(20))
    assert found.largest.value == pytest.approx(float(eigenvalues[-1]), rel=1e-8)
    assert found.smallest.value == pytest.approx(float(eigenvalues[0]), rel=1e-8)
    squares = found.density.trace_of(torch.square)
    assert abs(squares.value - float(eigenvalues.square().sum())) <= 3 * squares.stderr
    assert abs(found.trace.value - float(eigenvalues.sum())) <= 3 * found.trace.stderr


@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_matrix_that_is_not_symmetric_is_refused(dtype, reorthogonalize):
    skew = torch.randn(40, 40, dtype=torch.float64, generator=seed(21))
    matrix = rotated(torch.linspace(-1, 1, 40)) + 0.01 * (skew - skew.T)
    with pytest.raises(ValueError, match=r"not symmetric .* run hessian.verify\(A\)"):
        spectral_density(Dense(matrix.to(dtype)), 2, 20, generator=seed(21), reorthogonalize=reorthogonalize)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_products_that_are_not_finite_are_refused(bad):
    matrix = torch.eye(5)
    matrix[2, 2] = bad
    with pytest.raises(ValueError, match="the curvature is not finite"):
        spectral_density(Dense(matrix), generator=seed(22))
    with pytest.raises(ValueError, match="the curvature is not finite"):
        spectrum(Dense(matrix), generator=seed(22))


def test_mistakes_are_named():
    operator = Dense(CASES["full"])
    for function in (spectral_density, spectrum):
        with pytest.raises(ValueError, match="num_probes=0: give at least 1"):
            function(operator, 0, 5)
        with pytest.raises(ValueError, match="num_steps=-2: give at least 1"):
            function(operator, 1, -2)
    found = spectral_density(operator, 1, 5, generator=seed(23))
    with pytest.raises(ValueError, match=r"sigma=-0.5: give a positive width"):
        found.density(sigma=-0.5)
    with pytest.raises(ValueError, match="scale 'cubic'"):
        found.density(scale="cubic")
    with pytest.raises(ValueError, match="magnitudes above 0"):
        found.density([-1.0, 1.0], scale="log")
    with pytest.raises(ValueError, match="one-dimensional"):
        found.cdf(np.zeros((2, 2)))


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("name", CASES)
def test_plots_have_labels_and_show_the_density(name, scale):
    figure = Figure()
    ax = figure.subplots()
    found = spectral_density(Dense(CASES[name].double()), 2, 6, generator=seed(24))
    assert found.plot(ax, scale=scale) is ax
    assert "eigenvalue" in ax.get_xlabel()
    assert "share of eigenvalues per" in ax.get_ylabel()
    assert ax.get_yscale() == "log"
    assert len(ax.collections) == len(ax.lines) == (1 if scale == "linear" else 2)
    curve = found.density(scale=scale)
    bottom, top = ax.get_ylim()
    assert bottom > 0
    assert float(curve.value.max()) < top
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), curve.value.reshape(-1, len(curve.grid))[0].numpy())
    figure.savefig("/dev/null", format="png")  # draws without a warning, which pytest would turn into an error


def test_a_plot_of_its_own_and_the_ends():
    from matplotlib import pyplot

    found = spectrum(Dense(CASES["full"].double()), 1, 10, generator=seed(25))
    before = pyplot.get_fignums()
    ax = found.plot()
    assert isinstance(ax, Axes)
    assert len(pyplot.get_fignums()) == len(before) + 1
    assert [line.get_xdata()[0] for line in ax.lines[1:]] == [found.smallest.value, found.largest.value]
    assert not ax.collections  # one probe has no band
    pyplot.close(ax.figure)
    found.plot(Figure().subplots())
    assert pyplot.get_fignums() == before


def test_tables():
    found = spectrum(Dense(2 * torch.eye(4).double()), 3, 5, generator=seed(26))
    assert "largest eigenvalue" in repr(found)
    assert "4 eigenvalues, 3 products" in repr(found)
    table = found._repr_html_()
    assert "<td>trace</td><td>8</td>" in table
    assert table.count("<tr>") == 4
    assert "3 x 5 nodes, 2 to 2, 4 eigenvalues, 3 products" in repr(found.density)
