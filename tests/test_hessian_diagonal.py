"""Diagonals by sampling: against dense matrices, the estimators' definitions, and their own claims of accuracy."""

from functools import cache

import pytest
import torch
from scipy import stats

from hessian.estimators import diagonal as diagonal_module
from hessian.estimators.diagonal import Diagonal, diagonal
from hessian.operators.base import Dense
from tests.test_hessian_trace import CASES, SIZE, Knowing, Recording, seeded, symmetric

NUM_SEEDS = 100  # of 120 entries each
SAMPLING = ("hutchinson", "xdiag", "auto")


@cache
def runs(name: str, method: str, rtol: float, max_matvecs: int) -> list[Diagonal]:
    operator = Dense(CASES[name])
    return [diagonal(operator, rtol, method, max_matvecs=max_matvecs, generator=seeded(seed)) for seed in range(NUM_SEEDS)]


def coverage(results: list[Diagonal], truth: torch.Tensor) -> float:
    """The share of entries, over all results, whose interval has the truth in it; exact ones are right to rounding."""
    shares = []
    for result in results:
        allowed = 1.96 * result.stderr if result.method != "exact" else 1e-12 * truth.norm()
        shares.append(((result.value - truth).abs() <= allowed).double().mean())
    return float(torch.stack(shares).mean())


@pytest.mark.parametrize("name", CASES)
def test_exact_by_the_identity_equals_the_dense_diagonal(name):
    operator = Recording(CASES[name])
    result = diagonal(operator, method="exact")
    torch.testing.assert_close(result.value, CASES[name].diagonal(), rtol=1e-13, atol=1e-15)
    assert not result.stderr.any()
    assert (result.num_matvecs, result.method, result.converged) == (SIZE, "exact", True)
    assert operator.num_matvecs == SIZE


@pytest.mark.parametrize("method", ["exact", "auto"])
def test_an_operator_that_knows_its_diagonal_is_asked_first(method):
    result = diagonal(Knowing(CASES["decaying"]), method=method)
    assert torch.equal(result.value, CASES["decaying"].diagonal())
    assert (result.num_matvecs, result.method, result.converged) == (0, "exact", True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("method", "max_matvecs"), [("hutchinson", 8), ("hutchinson", 24), ("xdiag", 16), ("xdiag", 40)])
def test_unbiased_and_honest_with_a_fixed_number_of_products(method, max_matvecs, name):
    """rtol=0 stops for nothing but the budget, or once the range of a matrix of low rank is complete."""
    truth, results = CASES[name].diagonal(), runs(name, method, 0.0, max_matvecs)
    values = torch.stack([result.value for result in results])
    deviations = (values.mean(0) - truth) / (values.std(0) / NUM_SEEDS**0.5 + 1e-14 * truth.norm())
    assert deviations.square().mean() < 1.5  # 1 on average; its entries depend on each other
    assert coverage(results, truth) >= 0.93


@pytest.mark.parametrize("method", SAMPLING)
@pytest.mark.parametrize("name", CASES)
def test_honest_at_the_stopping_time(method, name):
    truth, results = CASES[name].diagonal(), runs(name, method, 0.15, 64)
    assert coverage(results, truth) >= 0.93
    for result in results:
        assert result.converged == bool(result.stderr.norm() <= 0.15 * result.value.norm())
        assert result.num_matvecs <= 64 or result.method == "exact"


def test_standard_errors_are_not_larger_than_honesty_takes():
    """Independent samples: within a quarter of the true error. XDiag's jackknife: conservative, but within a factor of 2."""
    for method, max_matvecs, factor in (("hutchinson", 24, 1.25), ("xdiag", 40, 2.0)):
        results = runs("indefinite", method, 0.0, max_matvecs)
        errors = torch.stack([result.value for result in results]) - CASES["indefinite"].diagonal()
        reported = torch.stack([result.stderr for result in results])
        assert 0.95 * errors.norm() <= reported.norm() <= factor * errors.norm()


def left_out_diagonals(matrix: torch.Tensor, probes: torch.Tensor) -> torch.Tensor:
    """XDiag's samples by their definition: a basis of its own for every probe."""
    samples = []
    for index in range(len(probes)):
        others = torch.cat([probes[:index], probes[index + 1 :]])
        Q = torch.linalg.qr(matrix @ others.T).Q
        inside = Q @ (Q.T @ matrix)
        samples.append(inside.diagonal() + probes[index] * ((matrix - inside) @ probes[index]))
    return torch.stack(samples)


@pytest.mark.parametrize("chunk", [2**22, 100])
@pytest.mark.parametrize("name", ["decaying", "flat", "indefinite"])
def test_xdiag_and_its_jackknife_are_what_they_are_defined_to_be(name, chunk, monkeypatch):
    monkeypatch.setattr(diagonal_module, "_CHUNK", chunk)
    matrix = CASES[name]
    operator = Recording(matrix)
    result = diagonal(operator, 0.0, "xdiag", max_matvecs=16, generator=seeded(3))
    probes = operator.multiplied[0]
    torch.testing.assert_close(result.value, left_out_diagonals(matrix, probes).mean(0), rtol=1e-9, atol=1e-10)
    replicates = [left_out_diagonals(matrix, torch.cat([probes[:i], probes[i + 1 :]])).mean(0) for i in range(8)]
    jackknife = torch.stack(replicates).var(0, correction=0).mul(8).sqrt()
    expected = jackknife * float(stats.t.ppf(0.975, 7) / stats.norm.ppf(0.975))
    torch.testing.assert_close(result.stderr, expected, rtol=1e-6, atol=1e-10)


def test_hutchinson_is_what_it_is_defined_to_be():
    """Of a diagonal matrix it knows all from any probe; of others, samples are taken in blocks and merged."""
    exact = diagonal(Dense(torch.diag(torch.arange(50.0).double())), 0.1, "hutchinson")
    torch.testing.assert_close(exact.value, torch.arange(50.0).double())
    assert exact.num_matvecs == 8
    assert 0 < exact.stderr.norm() < 1e-12
    operator = Recording(CASES["indefinite"])
    result = diagonal(operator, 0.0, "hutchinson", max_matvecs=30)
    probes = torch.cat(operator.multiplied)
    samples = probes * (probes @ CASES["indefinite"])
    torch.testing.assert_close(result.value, samples.mean(0))
    torch.testing.assert_close(result.stderr, samples.std(0) / 30**0.5 * float(stats.t.ppf(0.975, 29) / stats.norm.ppf(0.975)))


def test_xdiag_takes_far_fewer_products_where_eigenvalues_decay():
    operator = Dense(CASES["decaying"])
    for seed in range(20):
        plain = diagonal(operator, 0.2, "hutchinson", max_matvecs=8192, generator=seeded(seed))
        for method in ("xdiag", "auto"):
            result = diagonal(operator, 0.2, method, generator=seeded(seed))
            assert result.converged
            assert result.method == "xdiag"
            assert 10 * result.num_matvecs < plain.num_matvecs


def test_auto_samples_plainly_where_eigenvalues_do_not_decay():
    matrix = symmetric(torch.linspace(1, 2, 300))
    for seed in range(20):
        result = diagonal(Dense(matrix), 0.05, max_matvecs=256, generator=seeded(seed))
        assert result.converged
        assert result.method == "hutchinson"
        assert not diagonal(Dense(matrix), 0.05, "xdiag", max_matvecs=4 * result.num_matvecs, generator=seeded(seed)).converged


def test_auto_keeps_no_more_probes_than_it_may(monkeypatch):
    """Then the basis stays, and fresh probes sample what it leaves over."""
    monkeypatch.setattr(diagonal_module, "_MAX_PROBES", 16)
    matrix = symmetric(torch.arange(1, 301) ** -1.5)
    results = [diagonal(Dense(matrix), 0.06, generator=seeded(seed)) for seed in range(40)]
    assert all(result.converged and result.method == "diag++" for result in results)
    assert 0.94 <= coverage(results, matrix.diagonal()) <= 0.97
    plain = diagonal(Dense(matrix), 0.06, "hutchinson", max_matvecs=8192, generator=seeded(0))
    assert max(result.num_matvecs for result in results) < plain.num_matvecs / 4


def test_auto_multiplies_by_the_identity_before_it_samples_for_longer():
    result = diagonal(Dense(CASES["indefinite"]), 0.05, generator=seeded(0))
    assert result.method == "exact"
    torch.testing.assert_close(result.value, CASES["indefinite"].diagonal())
    assert SIZE < result.num_matvecs <= 2 * SIZE


@pytest.mark.parametrize("rtol", [0.5, 0.2, 0.05])
@pytest.mark.parametrize("method", SAMPLING)
def test_probes_grow_until_the_tolerance_is_met(method, rtol):
    operator = Recording(CASES["flat"] + CASES["decaying"] / 10)
    result = diagonal(operator, rtol, method, max_matvecs=4096, generator=seeded(1))
    assert result.converged
    assert result.stderr.norm() <= rtol * result.value.norm()
    assert (result.value - operator.matrix.diagonal()).norm() <= 1.5 * rtol * result.value.norm()
    assert result.num_matvecs == operator.num_matvecs


@pytest.mark.parametrize("method", SAMPLING)
def test_a_spent_budget_is_said(method):
    operator = Recording(symmetric(torch.linspace(-1, 1.01, 200)))
    result = diagonal(operator, 0.01, method, max_matvecs=100, generator=seeded(0))
    assert not result.converged
    assert 90 < result.num_matvecs == operator.num_matvecs <= 100


@pytest.mark.parametrize("method", SAMPLING)
def test_a_generator_makes_runs_repeatable_and_the_global_one_moves_on(method):
    operator = Dense(CASES["decaying"])
    values = [diagonal(operator, method=method, max_matvecs=32, generator=seeded(seed)).value for seed in (5, 5, 6)]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
    torch.manual_seed(5)
    by_global = [diagonal(operator, method=method, max_matvecs=32).value for _ in range(2)]
    assert not torch.equal(by_global[0], by_global[1])
    torch.manual_seed(5)
    assert torch.equal(diagonal(operator, method=method, max_matvecs=32).value, by_global[0])


@pytest.mark.parametrize("method", SAMPLING)
def test_single_precision(method):
    matrix = CASES["decaying"]
    results = [diagonal(Dense(matrix.float()), 0.5, method, generator=seeded(seed)) for seed in range(40)]
    assert all(result.value.dtype == result.stderr.dtype == torch.float32 and result.converged for result in results)
    assert coverage(results, matrix.diagonal()) >= 0.93


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["xdiag", "auto"])
def test_low_rank_ends_at_rounding(method, dtype):
    matrix, epsilon = CASES["low rank"], torch.finfo(dtype).eps
    results = []
    for seed in range(50):
        operator = Recording(matrix.to(dtype))
        results.append(diagonal(operator, 1e-4, method, generator=seeded(seed)))
        assert results[-1].converged
        assert results[-1].num_matvecs == operator.num_matvecs < 60
        assert epsilon / 10 < results[-1].stderr.norm() / matrix.diagonal().norm() < 30 * epsilon
    assert coverage(results, matrix.diagonal()) >= 0.93


@pytest.mark.parametrize("method", [*SAMPLING, "exact"])
def test_a_zero_matrix_is_known_at_once(method):
    result = diagonal(Dense(torch.zeros(SIZE, SIZE)), method=method, generator=seeded(0))
    assert not result.value.any()
    assert not result.stderr.any()
    assert result.converged


@pytest.mark.parametrize("method", [*SAMPLING, "exact"])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_tiny_matrices_are_multiplied_by_the_identity(method, size):
    matrix = symmetric(torch.arange(size) - 3.0)
    result = diagonal(Dense(matrix), method=method)
    assert (result.method, result.num_matvecs) == ("exact", size)
    assert not result.stderr.any()
    torch.testing.assert_close(result.value, matrix.diagonal())


def test_more_probes_than_dimensions():
    matrix = symmetric(torch.linspace(-1, 2, 60))
    result = diagonal(Dense(matrix), 0.0, "xdiag", max_matvecs=1000, generator=seeded(0))
    torch.testing.assert_close(result.value, matrix.diagonal(), rtol=1e-11, atol=1e-12)
    assert 0 < result.stderr.norm() < 1e-12


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", [*SAMPLING, "exact"])
def test_infinite_curvature_is_an_error(method, bad):
    matrix = torch.eye(SIZE)
    matrix[3, 3] = bad
    with pytest.raises(ValueError, match="the curvature is not finite"):
        diagonal(Dense(matrix), method=method)
    with pytest.raises(ValueError, match="the curvature is not finite"):
        diagonal(Knowing(matrix))


def test_bad_requests_name_the_remedy():
    operator = Dense(CASES["flat"])
    with pytest.raises(TypeError, match="wrap a matrix in"):
        diagonal(CASES["flat"])
    for rtol in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="relative tolerance of at least 0"):
            diagonal(operator, rtol)
    with pytest.raises(ValueError, match="'xtrace' is none of 'auto', 'exact', 'xdiag', 'hutchinson'"):
        diagonal(operator, method="xtrace")
    for method, minimum in (("hutchinson", 8), ("xdiag", 16), ("auto", 16)):
        with pytest.raises(ValueError, match=f"at least {minimum} products"):
            diagonal(operator, method=method, max_matvecs=minimum - 1)
        assert diagonal(operator, method=method, max_matvecs=minimum).num_matvecs == minimum
    with pytest.raises(ValueError, match="knows no exact diagonal, and the identity takes 120 products"):
        diagonal(operator, method="exact", max_matvecs=100)


def test_results_are_for_eyes():
    result = diagonal(Dense(CASES["low rank"]), 0.01, "hutchinson", generator=seeded(0), max_matvecs=32)
    assert f"<td>{float(result.value.sum()):.6g}</td>" in result._repr_html_()
    assert "<td>NO</td>" in result._repr_html_()
    assert "method='hutchinson'" in repr(result)


def test_progress_counts_products(capsys):
    diagonal(Dense(CASES["decaying"]), 0.0, "xdiag", max_matvecs=32, progress=True)
    assert "32/32" in capsys.readouterr().err
    diagonal(Dense(CASES["decaying"]), 0.0, "xdiag", max_matvecs=32)
    assert not capsys.readouterr().err
