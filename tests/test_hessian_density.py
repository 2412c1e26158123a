"""Stochastic Lanczos quadrature against dense spectra, exact moments, and the coverage that its bands promise."""

import math

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import wasserstein_distance
from torch import nn

import hessian
from hessian.estimators import quadrature
from hessian.estimators.density import spectral_density
from hessian.estimators.spectrum import spectrum
from hessian.operators.base import Dense
from tests.cases import SmoothNet, classification, seeded

matplotlib.use("Agg")


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def rotated(eigenvalues: torch.Tensor, number: int = 0) -> torch.Tensor:
    """A dense float64 matrix with these eigenvalues and random eigenvectors."""
    basis = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64, generator=seed(number)))[0]
    matrix = (basis * eigenvalues.double()) @ basis.T
    return (matrix + matrix.T) / 2


def outliers_and_bulk(size: int = 1000) -> torch.Tensor:
    """Like a network's: a bulk around 0 (a semicircle), a tail, four outliers."""
    bulk = torch.linspace(-1, 1, size - 24, dtype=torch.float64)
    tail = torch.logspace(0, 1, 20, dtype=torch.float64)
    return torch.cat([bulk.sign() * (1 - (1 - bulk.abs()) ** 0.66), tail, torch.tensor([20.0, 35, 60, 100]).double()])


class Recording(Dense):
    """Remembers the blocks it was multiplied by."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__(matrix)
        self.blocks: list[torch.Tensor] = []

    def _matmat(self, vectors: torch.Tensor) -> torch.Tensor:
        self.blocks.append(vectors.T.clone())
        return super()._matmat(vectors)

    @property
    def probes(self) -> torch.Tensor:
        return self.blocks[0].double()


CASES = {
    "one": torch.tensor([[3.0]]),
    "zero": torch.zeros(7, 7),
    "identity": torch.eye(9),
    "two": torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
    "low rank": rotated(torch.tensor([5.0, 3.0, -2.0] + [0.0] * 57)),
    "clusters": rotated(torch.tensor([1.0, 1.0, -4.0, 2.5]).repeat(20)),
    "full": rotated(torch.linspace(-1, 2, 50)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_every_probe_has_a_probability_measure_on_the_spectrum(name, reorthogonalize, dtype):
    matrix = CASES[name].to(dtype)
    found = spectral_density(Dense(matrix), 3, 20, generator=seed(1), reorthogonalize=reorthogonalize)
    assert found.nodes.shape == found.weights.shape == (3, 20)
    assert found.nodes.dtype == found.weights.dtype == torch.float64
    assert (found.weights >= 0).all()
    torch.testing.assert_close(found.weights.sum(1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-14)
    assert (found.nodes.diff(dim=1) >= 0).all()
    eigenvalues = torch.linalg.eigvalsh(matrix.double())
    slack = found.rounding[:, None]
    assert (found.nodes >= eigenvalues[0] - slack).all()
    assert (found.nodes <= eigenvalues[-1] + slack).all()
    assert float(found.rounding.max()) <= 100 * torch.finfo(dtype).eps * float(eigenvalues.abs().max())


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_moments_below_twice_the_steps_are_exact(reorthogonalize):
    operator = Recording(rotated(torch.linspace(-1, 1.5, 40)))
    found = spectral_density(operator, 2, 6, generator=seed(2), reorthogonalize=reorthogonalize)
    powers, exact = operator.probes, []
    for power in range(13):
        moments = (found.weights * found.nodes**power).sum(1)
        exact.append((operator.probes * powers).sum(1))
        if power < 12:
            torch.testing.assert_close(moments, exact[power], rtol=1e-12, atol=1e-13)
        else:  # the first moment that six nodes cannot match
            assert ((moments - exact[power]).abs() > 1e-6).all()
        powers = powers @ operator.matrix


def test_all_steps_give_the_weighted_spectrum():
    operator = Recording(rotated(torch.linspace(-3, 2, 30)))
    found = spectral_density(operator, 2, 30, generator=seed(3))
    eigenvalues, vectors = torch.linalg.eigh(operator.matrix)
    torch.testing.assert_close(found.nodes, eigenvalues.expand(2, -1), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.weights, (operator.probes @ vectors) ** 2, rtol=0, atol=1e-11)
    longer = spectral_density(operator, 2, 45, generator=seed(3))
    assert longer.nodes.shape == (2, 45)
    assert longer.num_matvecs == 60
    torch.testing.assert_close(longer.nodes[:, :30], found.nodes)
    assert torch.equal(longer.nodes[:, 30:], longer.nodes[:, 29:30].expand(-1, 15))
    assert not longer.weights[:, 30:].any()


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_wasserstein_distance_to_a_spectrum_of_outliers_and_bulk(reorthogonalize):
    eigenvalues = outliers_and_bulk()
    found = spectral_density(Dense(rotated(eigenvalues)), 10, 80, generator=seed(4), reorthogonalize=reorthogonalize)
    extent = float(eigenvalues.max() - eigenvalues.min())
    distance = wasserstein_distance(found.nodes.reshape(-1), eigenvalues, found.weights.reshape(-1) / 10)
    assert distance <= 0.01 * extent
    centre = (found.nodes * found.weights).sum(1).mean()
    collapsed = wasserstein_distance([float(centre)], eigenvalues)
    assert distance < collapsed / 5


@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize(
    ("name", "expected"),
    [("zero", [0.0]), ("identity", [1.0]), ("low rank", [-2.0, 0.0, 3.0, 5.0]), ("clusters", [-4.0, 1.0, 2.5])],
)
def test_an_exhausted_krylov_space_has_fewer_nodes(name, expected, reorthogonalize):
    operator = Recording(CASES[name].double())
    found = spectral_density(operator, 3, 15, generator=seed(5), reorthogonalize=reorthogonalize)
    assert found.num_matvecs == 3 * len(expected)
    wanted = torch.tensor(expected, dtype=torch.float64)
    padded = torch.cat([wanted, wanted[-1:].expand(15 - len(wanted))])
    torch.testing.assert_close(found.nodes, padded.expand(3, -1), rtol=0, atol=1e-13)
    assert not found.weights[:, len(wanted) :].any()
    eigenvalues, vectors = torch.linalg.eigh(operator.matrix)
    masses = (operator.probes @ vectors) ** 2
    for node, value in enumerate(expected):
        share = masses[:, (eigenvalues - value).abs() < 1e-9].sum(1)
        torch.testing.assert_close(found.weights[:, node], share, rtol=0, atol=1e-12)


def test_in_float32_a_missed_breakdown_only_makes_copies():
    matrix = rotated(torch.tensor([1.0, 1.0, -4.0, 2.5]).repeat(200)).float()
    operator = Recording(matrix)
    found = spectral_density(operator, 3, 15, generator=seed(5))
    for value, least in ((-4.0, 0.15), (1.0, 0.4), (2.5, 0.15)):
        share = (found.weights * ((found.nodes - value).abs() < 1e-5)).sum(1)
        assert (share > least).all()
    near = (found.nodes[..., None] - torch.tensor([-4.0, 1.0, 2.5])).abs().amin(-1) < 1e-5
    torch.testing.assert_close((found.weights * near).sum(1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["zero", "low rank", "full"])
@pytest.mark.parametrize("factor", [1e-12, 1e12, 2.0**-40, 2.0**40])
def test_results_scale_with_the_matrix(name, factor, dtype):
    matrix = CASES[name].to(dtype)
    plain = spectrum(Dense(matrix), 2, 8, generator=seed(6))
    scaled = spectrum(Dense(factor * matrix), 2, 8, generator=seed(6))
    reference, curve = plain.density.density(), scaled.density.density()
    if math.frexp(factor)[0] == 0.5:  # powers of two scale without rounding, so nothing else may change
        assert scaled.num_matvecs == plain.num_matvecs
        assert torch.equal(scaled.density.nodes, factor * plain.density.nodes)
        assert torch.equal(scaled.density.weights, plain.density.weights)
        assert scaled.largest.residual == pytest.approx(factor * plain.largest.residual, rel=1e-12)
    precision = torch.finfo(dtype).eps
    assert scaled.largest.value == pytest.approx(factor * plain.largest.value, rel=20 * precision)
    assert scaled.trace.value == pytest.approx(factor * plain.trace.value, rel=100 * precision)
    if name != "zero":
        tolerance = 1e4 * precision * float(reference.value.max())
        torch.testing.assert_close(factor * curve.value, reference.value, rtol=0, atol=tolerance)


def true_measure(operator: Recording, points: torch.Tensor) -> torch.Tensor:
    """The first probe's measure of (-inf, x], from all eigenvectors, for every x."""
    eigenvalues, vectors = torch.linalg.eigh(operator.matrix)
    masses = (operator.probes[0] @ vectors) ** 2
    return torch.stack([masses[eigenvalues <= point].sum() for point in points])


@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("name", ["outliers", "uniform", "clusters", "low rank", "one", "identity"])
def test_the_cdf_bounds_hold_for_every_x(name, reorthogonalize):
    spectra = {"outliers": rotated(outliers_and_bulk(200)), "uniform": rotated(torch.linspace(-1, 1, 150))}
    operator = Recording(spectra.get(name, CASES.get(name)).double())
    found = spectral_density(operator, 1, 60, generator=seed(7), reorthogonalize=reorthogonalize)
    eigenvalues = torch.linalg.eigvalsh(operator.matrix)
    steps = torch.cat([eigenvalues, found.nodes[0]]).sort().values  # the measure and its bounds change nowhere else
    tiny = torch.tensor(1e-14)
    points = torch.cat([steps, steps - tiny, steps + tiny, (steps[1:] + steps[:-1]) / 2, steps[:1] - 1, steps[-1:] + 1])
    curve = found.cdf(points)
    truth = true_measure(operator, points)
    assert (curve.lower <= truth + 1e-12).all()
    assert (truth <= curve.upper + 1e-12).all()
    assert (curve.lower <= curve.value).all()
    assert (curve.value <= curve.upper).all()
    if name == "uniform":  # not only true but tight: at most three nodes are in doubt
        assert float((curve.upper - curve.lower).max()) <= 3 * float(found.weights.max()) + 1e-12
    if name == "outliers" and not reorthogonalize:
        assert int(((found.nodes - 100).abs() < 1e-9).sum()) > 1  # copies are there, and do no harm


def test_cdf_bounds_at_and_between_nodes():
    found = spectral_density(Dense(rotated(torch.linspace(0, 1, 20))), 1, 4, generator=seed(8))
    (a, b, c, d), cumulative = found.nodes[0], found.weights[0].cumsum(0).tolist()
    curve = found.cdf(torch.stack([a - 1, a, (a + b) / 2, b, (b + c) / 2, d, d + 1]))
    one, two, three, _ = cumulative
    assert curve.value.tolist() == pytest.approx([0, one, one, two, two, 1, 1])
    # rounding widens the bounds at the nodes themselves to those on either side
    assert curve.lower.tolist() == pytest.approx([0, 0, 0, 0, one, two, three])
    assert curve.upper.tolist() == pytest.approx([one, two, two, three, three, 1, 1])


def test_bands_and_standard_errors_cover_what_they_promise():
    """Each 95% interval misses in 5% of 300 runs, give or take three standard errors of that share."""
    eigenvalues = torch.linspace(-1, 1, 40, dtype=torch.float64) ** 3 + 1.5
    operator = Dense(rotated(eigenvalues))
    sigma, grid = 0.2, torch.tensor([1.4], dtype=torch.float64)
    density = torch.exp(-0.5 * ((grid - eigenvalues) / sigma) ** 2).mean() / (sigma * math.sqrt(2 * math.pi))
    hits = torch.zeros(3)
    runs = 300
    generator = seed(9)
    for _ in range(runs):
        found = spectral_density(operator, 4, 16, generator=generator)
        band = found.density(grid, sigma)
        logarithm = found.trace_of(torch.log)
        trace = found.trace_of(lambda nodes: nodes)
        hits += torch.tensor(
            [
                float(band.lower) <= density <= float(band.upper),
                abs(logarithm.value - float(eigenvalues.log().sum())) <= 1.96 * logarithm.stderr,
                abs(trace.value - float(eigenvalues.sum())) <= 1.96 * trace.stderr,
            ]
        )
    tolerance = 3 * math.sqrt(0.05 * 0.95 / runs)
    assert (hits / runs >= 0.95 - tolerance).all()
    assert (hits[1:] / runs <= 0.95 + tolerance).all()  # too wide were as wrong


def test_cdf_bounds_of_several_probes_cover_the_matrix():
    eigenvalues = outliers_and_bulk(300)
    operator = Dense(rotated(eigenvalues))
    points = torch.tensor([-0.5, 0.0, 0.7, 15.0, 50.0], dtype=torch.float64)
    truth = torch.stack([(eigenvalues <= point).double().mean() for point in points])
    generator, hits, widths, runs = seed(10), torch.zeros(5), torch.zeros(5), 40
    for _ in range(runs):
        curve = spectral_density(operator, 6, 30, generator=generator).cdf(points)
        hits += (curve.lower <= truth) & (truth <= curve.upper)
        widths += curve.upper - curve.lower
    assert (widths / runs < 0.4).all()
    assert (hits / runs >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / runs)).all()


def test_one_probe_has_no_standard_error():
    found = spectral_density(Dense(CASES["full"]), 1, 10, generator=seed(11))
    assert math.isnan(found.trace_of(torch.exp).stderr)
    curve = found.density()
    assert curve.lower.isnan().all()
    assert curve.upper.isnan().all()
    assert curve.value.isfinite().all()


def test_traces_of_functions_leave_out_repeated_nodes():
    found = spectral_density(Dense(-torch.eye(3).double()), 2, 9, generator=seed(12))
    assert found.trace_of(torch.log1p).value == -math.inf  # not the NaN of inf * 0
    assert found.trace_of(lambda nodes: nodes.abs().sqrt()) == pytest.approx((3.0, 0.0), abs=1e-13)


def test_densities_equal_the_smoothed_spectrum():
    eigenvalues = torch.cat([torch.logspace(-4, 1, 12), -torch.logspace(-3, 0, 8)]).double()
    operator = Recording(rotated(eigenvalues))
    found = spectral_density(operator, 1, 20, generator=seed(13))
    values, vectors = torch.linalg.eigh(operator.matrix)
    masses = ((operator.probes @ vectors) ** 2)[0]

    def smoothed(points, nodes, weights, sigma):
        return torch.stack([(weights * torch.exp(-0.5 * ((x - nodes) / sigma) ** 2)).sum() for x in points]) / (
            sigma * math.sqrt(2 * math.pi)
        )

    grid = torch.linspace(-2, 11, 57, dtype=torch.float64)
    torch.testing.assert_close(found.density(grid, 0.3).value, smoothed(grid, values, masses, 0.3), rtol=1e-9, atol=1e-12)
    grid = torch.logspace(-5, 2, 57, dtype=torch.float64)
    curve = found.density(grid, 0.2, scale="log")
    for row, sign in enumerate((values > 0, values < 0)):
        wanted = smoothed(grid.log10(), values[sign].abs().log10(), masses[sign], 0.2)
        torch.testing.assert_close(curve.value[row], wanted, rtol=1e-6, atol=1e-9)
    curve = found.density()
    assert float(torch.trapezoid(curve.value, curve.grid)) == pytest.approx(1, abs=1e-4)
    curve = found.density(scale="log")
    areas = torch.trapezoid(curve.value, curve.grid.log10())
    wanted = torch.stack([masses[values > 0].sum(), masses[values < 0].sum()])
    torch.testing.assert_close(areas, wanted, rtol=0, atol=1e-4)


def test_the_default_smoothing_follows_the_range():
    found = spectral_density(Dense(torch.diag(torch.tensor([0.0, 50.0])).double()), 1, 2, generator=seed(14))
    peak = found.density(torch.tensor([0.0, 50.0])).value
    torch.testing.assert_close(peak, found.weights[0] / (0.5 * math.sqrt(2 * math.pi)))
    same = spectral_density(Dense(7 * torch.eye(6).double()), 2, 4, generator=seed(14))
    assert float(same.density(torch.tensor([7.0])).value) == pytest.approx(1 / (0.07 * math.sqrt(2 * math.pi)))


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
