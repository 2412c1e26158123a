"""Stochastic Lanczos quadrature against dense spectra, exact moments, and the coverage that its bands promise."""

import math

import matplotlib
import pytest
import torch
from scipy.stats import wasserstein_distance

from hessian.estimators.density import spectral_density
from hessian.estimators.spectrum import spectrum
from hessian.operators.base import Dense
from tests.spectra import CASES, Recording, outliers_and_bulk, rotated, seed

matplotlib.use("Agg")


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
