"""Traces by sampling: against dense matrices, the estimators' definitions, and their own claims of accuracy."""

import json
from functools import cache

import pytest
import torch
from scipy import stats

from hessian.estimators import trace as trace_module
from hessian.estimators.leave_one_out import RangeBasis
from hessian.estimators.trace import Trace, trace
from hessian.operators.base import Dense, LinearOperator, NotExactError

SIZE = 120
NUM_SEEDS = 300
SAMPLING = ("hutchinson", "hutch++", "xtrace", "auto")


def symmetric(eigenvalues: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A dense float64 matrix with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64, generator=generator)
    vectors = torch.linalg.qr(square).Q
    return (vectors * eigenvalues.double()) @ vectors.T


def decaying() -> torch.Tensor:
    """Three outliers, then fast decay with negative eigenvalues between positive ones."""
    index = torch.arange(SIZE)
    eigenvalues = torch.where(index % 5 == 3, -0.3, 1.0) * torch.exp(-index / 6)
    eigenvalues[:3] = torch.tensor([30.0, 12.0, 8.0])
    return symmetric(eigenvalues)


def indefinite() -> torch.Tensor:
    """Eigenvalues of both signs; the trace is a fourteenth of the Frobenius norm."""
    return symmetric(torch.linspace(-1, 1.018, SIZE) * 15)


CASES = {
    "decaying": decaying(),
    "flat": symmetric(torch.linspace(1, 2, SIZE)),
    "indefinite": indefinite(),
    "low rank": symmetric(torch.arange(SIZE).sub(10).neg().clamp(min=0)),
}


class Recording(LinearOperator):
    """A dense matrix that offers nothing exact and remembers what it was multiplied by, as rows."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix, self.multiplied = matrix, []
        self.shape, self.dtype, self.device = tuple(matrix.shape), matrix.dtype, matrix.device

    def _matmat(self, vectors: torch.Tensor) -> torch.Tensor:
        self.multiplied.append(vectors.T.clone())
        return self.matrix @ vectors

    @property
    def num_matvecs(self) -> int:
        return sum(len(rows) for rows in self.multiplied)


class Knowing(Dense):
    """A matrix that offers its trace and diagonal."""

    def exact_trace(self) -> float:
        return float(self.matrix.trace())

    def exact_diagonal(self) -> torch.Tensor:
        return self.matrix.diagonal()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def runs(name: str, method: str, rtol: float, max_matvecs: int) -> list[Trace]:
    operator = Dense(CASES[name])
    return [trace(operator, rtol, method, max_matvecs=max_matvecs, generator=seeded(seed)) for seed in range(NUM_SEEDS)]


def is_covered(result: Trace, truth: float) -> bool:
    """Whether the truth is in the interval; an exact trace is right to rounding."""
    low, high = result.interval
    return low <= truth <= high or (result.method == "exact" and result.value == pytest.approx(truth, rel=1e-12))


def _nightly(*names):
    """Three hundred runs of each take seconds."""
    return [pytest.param(name, marks=pytest.mark.nightly) for name in names]


@pytest.mark.parametrize("name", CASES)
def test_exact_by_the_identity_equals_the_dense_trace(name):
    operator = Recording(CASES[name])
    result = trace(operator, method="exact")
    assert result.value == pytest.approx(float(CASES[name].trace()), rel=1e-13)
    assert (result.stderr, result.num_matvecs, result.method, result.converged) == (0.0, SIZE, "exact", True)
    assert operator.num_matvecs == SIZE


@pytest.mark.parametrize("method", ["exact", "auto"])
def test_an_operator_that_knows_its_trace_is_asked_first(method):
    result = trace(Knowing(CASES["decaying"]), method=method)
    assert result == Trace(float(CASES["decaying"].trace()), 0.0, 0, "exact", True)


def test_operators_know_nothing_exact_by_default():
    with pytest.raises(NotExactError, match="no exact trace"):
        Dense(torch.eye(2)).exact_trace()
    with pytest.raises(NotExactError, match="no exact diagonal"):
        Dense(torch.eye(2)).exact_diagonal()


@pytest.mark.parametrize("name", ["indefinite", "low rank", *_nightly("decaying", "flat")])
@pytest.mark.parametrize(("method", "max_matvecs"), [("hutchinson", 40), ("hutch++", 48), ("xtrace", 24)])
def test_unbiased_and_honest_with_a_fixed_number_of_products(method, max_matvecs, name):
    """rtol=0 stops for nothing but the budget, or once the range of a matrix of low rank is complete."""
    truth = float(CASES[name].trace())
    results = runs(name, method, 0.0, max_matvecs)
    errors = torch.tensor([result.value - truth for result in results], dtype=torch.float64)
    assert abs(errors.mean()) <= 4 * errors.std() / NUM_SEEDS**0.5 + 1e-12 * abs(truth)
    assert sum(is_covered(result, truth) for result in results) >= 0.93 * NUM_SEEDS
    complete = name == "low rank" and method != "hutchinson"
    assert all(result.num_matvecs <= max_matvecs and (result.num_matvecs == max_matvecs or complete) for result in results)


@pytest.mark.parametrize(("method", "rtol"), [("hutchinson", 0.1), ("hutch++", 0.01), ("xtrace", 0.01), ("auto", 0.01)])
@pytest.mark.parametrize("name", ["indefinite", *_nightly("decaying", "flat", "low rank")])
def test_honest_at_the_stopping_time(method, rtol, name):
    truth = float(CASES[name].trace())
    results = runs(name, method, rtol, 64)
    assert sum(is_covered(result, truth) for result in results) >= 0.93 * NUM_SEEDS
    for result in results:
        assert result.converged == (result.stderr <= rtol * abs(result.value))
        assert result.num_matvecs <= 64


def test_standard_errors_are_not_larger_than_honesty_takes():
    """Independent samples: within a quarter of the true scatter. XTrace's jackknife: within a factor of 2."""
    for method, max_matvecs, factor in (("hutchinson", 40, 1.25), ("hutch++", 48, 1.25), ("xtrace", 24, 2.0)):
        results = runs("indefinite", method, 0.0, max_matvecs)
        scatter = float(torch.tensor([result.value for result in results], dtype=torch.float64).std())
        reported = float(torch.tensor([result.stderr for result in results], dtype=torch.float64).square().mean().sqrt())
        assert scatter * 0.95 <= reported <= factor * scatter


def left_out_traces(matrix: torch.Tensor, probes: torch.Tensor) -> torch.Tensor:
    """XTrace's samples by their definition: a basis of its own for every probe."""
    samples = []
    for index in range(len(probes)):
        others = torch.cat([probes[:index], probes[index + 1 :]])
        Q = torch.linalg.qr(matrix @ others.T).Q
        rest = probes[index] - Q @ (Q.T @ probes[index])
        samples.append((Q.T @ matrix @ Q).trace() + (SIZE - len(others)) / (rest @ rest) * (rest @ matrix @ rest))
    return torch.stack(samples)


@pytest.mark.parametrize("name", ["decaying", "flat", "indefinite"])
def test_xtrace_and_its_jackknife_are_what_they_are_defined_to_be(name):
    matrix = CASES[name]
    operator = Recording(matrix)
    result = trace(operator, 0.0, "xtrace", max_matvecs=16, generator=seeded(3))
    probes = operator.multiplied[0]
    assert result.value == pytest.approx(float(left_out_traces(matrix, probes).mean()), rel=1e-9)
    replicates = [left_out_traces(matrix, torch.cat([probes[:i], probes[i + 1 :]])).mean() for i in range(8)]
    jackknife = float(torch.stack(replicates).var(correction=0).mul(8).sqrt())
    assert result.stderr == pytest.approx(jackknife * stats.t.ppf(0.975, 7) / stats.norm.ppf(0.975), rel=1e-6)


def test_xtrace_takes_far_fewer_products_where_eigenvalues_decay():
    counts = {}
    for method in ("hutchinson", "xtrace", "auto"):
        results = [trace(Dense(CASES["decaying"]), 0.05, method, max_matvecs=8192, generator=seeded(i)) for i in range(20)]
        assert all(result.converged for result in results)
        counts[method] = sum(result.num_matvecs for result in results)
    assert 10 * counts["xtrace"] < counts["hutchinson"]
    assert 10 * counts["auto"] < counts["hutchinson"]


def test_auto_leaves_xtrace_where_eigenvalues_do_not_decay():
    matrix, counts = symmetric(torch.linspace(1, 2, 500)), {}
    for method in ("auto", "xtrace"):
        results = [trace(Dense(matrix), 0.002, method, max_matvecs=490, generator=seeded(seed)) for seed in range(20)]
        assert all(result.converged for result in results)
        counts[method] = sum(result.num_matvecs for result in results)
    assert counts["auto"] < 0.7 * counts["xtrace"]


def test_auto_keeps_no_more_probes_than_it_may(monkeypatch):
    monkeypatch.setattr(trace_module, "_MAX_PROBES", 8)
    eigenvalues = torch.arange(1, 301) ** -1.0
    results = [trace(Dense(symmetric(eigenvalues)), 0.03, generator=seeded(seed)) for seed in range(100)]
    assert all(result.converged and result.method == "hutch++" for result in results if result.num_matvecs > 16)
    assert sum(result.num_matvecs > 16 for result in results) > 50
    assert sum(is_covered(result, float(eigenvalues.sum())) for result in results) >= 90


@pytest.mark.parametrize("rtol", [0.2, 0.05, 0.01])
@pytest.mark.parametrize("method", SAMPLING)
def test_probes_grow_until_the_tolerance_is_met(method, rtol):
    operator = Recording(CASES["flat"] + CASES["decaying"])
    result = trace(operator, rtol, method, max_matvecs=4096, generator=seeded(1))
    assert result.converged
    assert result.stderr <= rtol * abs(result.value)
    assert result.num_matvecs == operator.num_matvecs


def test_finer_tolerances_cost_more_and_reuse_what_was_paid_for():
    """Each probe's product and each basis vector's is bought once: two products a probe, all basis vectors orthogonal."""
    coarse, fine = Recording(CASES["decaying"]), Recording(CASES["decaying"])
    few = trace(coarse, 0.1, "xtrace", generator=seeded(2))
    many = trace(fine, 1e-4, "xtrace", generator=seeded(2))
    assert many.num_matvecs > few.num_matvecs
    for one, other in zip(coarse.multiplied, fine.multiplied, strict=False):
        torch.testing.assert_close(one, other)
    basis = torch.cat(fine.multiplied[1::2])
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", SAMPLING)
def test_a_spent_budget_is_said(method):
    operator = Recording(symmetric(torch.linspace(-1, 1.01, 200)))
    result = trace(operator, 0.01, method, max_matvecs=100, generator=seeded(0))
    assert not result.converged
    assert result.stderr > 0.01 * abs(result.value)
    assert 90 < result.num_matvecs == operator.num_matvecs <= 100


def test_auto_multiplies_by_the_identity_before_it_samples_for_longer():
    result = trace(Dense(CASES["indefinite"]), 0.01, generator=seeded(0))
    assert result.method == "exact"
    assert result.value == pytest.approx(float(CASES["indefinite"].trace()), rel=1e-12)
    assert SIZE < result.num_matvecs <= 2 * SIZE


@pytest.mark.parametrize("method", SAMPLING)
def test_a_generator_makes_runs_repeatable_and_the_global_one_moves_on(method):
    operator = Dense(CASES["decaying"])
    first, again, other = (trace(operator, method=method, max_matvecs=64, generator=seeded(seed)) for seed in (5, 5, 6))
    assert first == again
    assert first.value != other.value
    torch.manual_seed(5)
    by_global = trace(operator, method=method, max_matvecs=64)
    assert trace(operator, method=method, max_matvecs=64).value != by_global.value
    torch.manual_seed(5)
    assert trace(operator, method=method, max_matvecs=64) == by_global


@pytest.mark.parametrize("method", SAMPLING)
def test_single_precision(method):
    matrix = CASES["decaying"]
    results = [trace(Dense(matrix.float()), 0.1, method, generator=seeded(seed)) for seed in range(40)]
    assert sum(is_covered(result, float(matrix.trace())) for result in results) >= 35
    assert all(result.converged for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_low_rank_ends_at_rounding(method, dtype):
    """The basis stops growing at the rank; the error that is left is rounding, and is neither 0 nor larger than that."""
    matrix, epsilon = CASES["low rank"], torch.finfo(dtype).eps
    truth, outcomes = float(matrix.trace()), []
    for seed in range(50):
        operator = Recording(matrix.to(dtype))
        result = trace(operator, 1e-4, method, generator=seeded(seed))
        assert result.converged
        assert result.num_matvecs == operator.num_matvecs < 60
        assert epsilon * truth / 10 < result.stderr < 30 * epsilon * truth
        outcomes.append(is_covered(result, truth))
    assert sum(outcomes) >= 47


def test_auto_mostly_finds_a_low_rank():
    """Now and then eight probes look as if their basis gained nothing."""
    counts = [trace(Dense(CASES["low rank"]), 1e-4, generator=seeded(seed)).num_matvecs for seed in range(100)]
    assert sum(count < 30 for count in counts) >= 95


@pytest.mark.parametrize("method", [*SAMPLING, "exact"])
def test_a_zero_matrix_is_known_at_once(method):
    result = trace(Dense(torch.zeros(SIZE, SIZE)), method=method, generator=seeded(0))
    assert (result.value, result.stderr, result.converged) == (0.0, 0.0, True)
    assert result.interval == (0.0, 0.0)


@pytest.mark.parametrize("method", [*SAMPLING, "exact"])
@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_tiny_matrices_are_multiplied_by_the_identity(method, size):
    matrix = symmetric(torch.arange(size) - 3.0)
    result = trace(Dense(matrix), method=method)
    assert (result.method, result.num_matvecs, result.stderr) == ("exact", size, 0.0)
    assert result.value == pytest.approx(float(matrix.trace()), abs=1e-12)


@pytest.mark.parametrize("method", ["xtrace", "hutch++"])
def test_more_probes_than_dimensions(method):
    """Of a full-rank matrix the basis becomes the whole space, and the trace exact."""
    matrix = symmetric(torch.linspace(-1, 2, 60))
    result = trace(Dense(matrix), 0.0, method, max_matvecs=1000, generator=seeded(0))
    assert result.value == pytest.approx(float(matrix.trace()), rel=1e-12)
    assert 0 < result.stderr < 1e-12


def test_dependent_rows_are_dropped_and_the_basis_stays_orthonormal():
    """Nearly parallel rows, copies, zeros, in single precision."""
    generator = seeded(0)
    rows = torch.randn(6, 50, generator=generator)
    rows = torch.cat([rows, rows[:1] + 1e-4 * torch.randn(1, 50, generator=generator), torch.zeros(1, 50)])
    basis = RangeBasis(Dense(torch.eye(50)).space)
    new, coordinates = basis.extend(rows)
    torch.testing.assert_close(coordinates.T.float() @ new, rows, rtol=1e-4, atol=1e-5)
    assert len(new) == basis.rank == 7
    more = torch.cat([rows[:3] @ torch.ones(50, 50), 2 * rows[3:5], torch.randn(2, 50, generator=generator)])
    assert len(basis.extend(more)[0]) == 3
    everything = torch.cat(basis.blocks)
    torch.testing.assert_close(everything @ everything.T, torch.eye(10), rtol=0, atol=2e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", [*SAMPLING, "exact"])
def test_infinite_curvature_is_an_error(method, bad):
    matrix = torch.eye(SIZE)
    matrix[3, 3] = bad
    with pytest.raises(ValueError, match="the curvature is not finite"):
        trace(Dense(matrix), method=method)
    with pytest.raises(ValueError, match="the curvature is not finite"):
        trace(Knowing(matrix))


def test_bad_requests_name_the_remedy():
    operator = Dense(CASES["flat"])
    with pytest.raises(TypeError, match="wrap a matrix in"):
        trace(CASES["flat"])
    for rtol in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="relative tolerance of at least 0"):
            trace(operator, rtol)
    with pytest.raises(ValueError, match=r"'hutch' is none of 'auto', 'exact', 'hutchinson', 'hutch\+\+', 'xtrace'"):
        trace(operator, method="hutch")
    for method, minimum in (("hutchinson", 32), ("hutch++", 48), ("xtrace", 16), ("auto", 16)):
        with pytest.raises(ValueError, match=f"at least {minimum} products"):
            trace(operator, method=method, max_matvecs=minimum - 1)
        assert trace(operator, method=method, max_matvecs=minimum).num_matvecs == minimum
    with pytest.raises(ValueError, match="knows no exact trace, and the identity takes 120 products"):
        trace(operator, method="exact", max_matvecs=100)
    with pytest.raises(ValueError, match="at least 3 products"):
        trace(Dense(torch.eye(3)), max_matvecs=2)


def test_results_are_for_eyes_and_for_json():
    result = trace(Dense(CASES["low rank"]), 0.05, "hutchinson", generator=seeded(0), max_matvecs=32)
    low, high = result.interval
    assert (high + low) / 2 == pytest.approx(result.value)
    assert (high - low) / 2 == pytest.approx(1.959964 * result.stderr)
    assert Trace(**json.loads(json.dumps(result.to_dict()))) == result
    assert f"<td>{result.value:.6g}</td>" in result._repr_html_()
    assert "<td>NO</td>" in result._repr_html_()


def test_progress_counts_products(capsys):
    trace(Dense(CASES["decaying"]), 0.0, "xtrace", max_matvecs=32, progress=True)
    assert "32/32" in capsys.readouterr().err
    trace(Dense(CASES["decaying"]), 0.0, "xtrace", max_matvecs=32)
    assert not capsys.readouterr().err
