"""Eigenpairs against dense spectra: clusters, both ends, restarts, precision, resumption, and what is called converged."""

import pytest
import torch
from torch import nn

import hessian
from hessian.operators.base import LinearOperator
from tests.cases import ConvNet, SmoothNet, classification, seeded


def matrix_with(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A dense symmetric float64 matrix with these eigenvalues."""
    size = len(values)
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return (vectors * values.double()) @ vectors.T


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def true_residuals(matrix, pairs):
    return (matrix @ pairs.vectors - pairs.vectors * pairs.values.to(pairs.vectors)).norm(dim=0)


@pytest.mark.parametrize("which", ["largest", "smallest", "both", "magnitude"])
@pytest.mark.parametrize("k", [2, 5, 40])
def test_against_a_dense_spectrum(which, k):
    values = torch.cat([torch.linspace(-1, 0.97, 150), torch.tensor([-9.0, -4.0, 5.0, 6.0, 12.0])])
    matrix = matrix_with(values)
    pairs = hessian.top_eigenpairs(hessian.Dense(matrix), k, which, tol=1e-8, max_matvecs=3000, generator=generator(0))
    ordered = torch.linalg.eigvalsh(matrix)
    expected = {
        "largest": ordered.flip(0)[:k],
        "smallest": ordered[:k],
        "both": torch.cat([ordered.flip(0)[: -(-k // 2)], ordered[: k // 2].flip(0)]),
        "magnitude": ordered[ordered.abs().argsort(descending=True)][:k],
    }[which]
    assert bool(pairs.converged.all())
    torch.testing.assert_close(pairs.values, expected, rtol=1e-10, atol=1e-10)
    residuals = true_residuals(matrix, pairs)
    assert bool((residuals <= 1e-8 * 12).all())
    assert bool((residuals <= 2 * pairs.residuals + 1e-13).all())
    torch.testing.assert_close(pairs.vectors.T @ pairs.vectors, torch.eye(k, dtype=torch.float64), atol=1e-10, rtol=0)


@pytest.mark.nightly
def test_clusters_are_complete_and_free_of_ghosts_over_100_seeds():
    """Fifty eigenvalues with clusters of up to nine equal and up to three nearly equal ones."""
    sizes = (1, 2, 5, 1, 9, 3, 1, 1, 4, 2, 1, 6, 1, 1, 7, 3, 2)
    top = torch.cat([torch.full((size,), 10.0 - 0.45 * index) for index, size in enumerate(sizes)]).double()
    top[6] += 1e-9
    top[20] -= 1e-7
    values = torch.cat([top, torch.linspace(-1, 2, 250, dtype=torch.float64)])
    expected = values.sort(descending=True).values[:50]
    matrix = matrix_with(values)
    for seed in range(100):
        pairs = hessian.top_eigenpairs(hessian.Dense(matrix), 50, tol=1e-6, generator=generator(seed), max_matvecs=2000)
        assert bool(pairs.converged.all()), seed
        torch.testing.assert_close(pairs.values, expected, rtol=0, atol=1e-5, msg=f"seed {seed}")


@pytest.mark.parametrize("copies", [2, 3, 6])
def test_equal_eigenvalues_are_all_found(copies):
    values = torch.cat([torch.full((copies,), 5.0), torch.tensor([4.0]), torch.linspace(0, 1, 200)])
    matrix = matrix_with(values)
    for seed in range(10):
        pairs = hessian.top_eigenpairs(hessian.Dense(matrix), copies + 1, generator=generator(seed))
        assert bool(pairs.converged.all())
        torch.testing.assert_close(pairs.values, values[: copies + 1].double(), rtol=1e-4, atol=0)


def test_low_rank_identity_and_zero():
    low_rank = torch.zeros(60)
    low_rank[:4] = torch.tensor([7.0, 3.0, 3.0, -2.0])
    pairs = hessian.top_eigenpairs(hessian.Dense(matrix_with(low_rank)), 8, "magnitude", generator=generator(0))
    torch.testing.assert_close(pairs.values, low_rank.double()[:8], atol=1e-3, rtol=1e-4)
    same = hessian.top_eigenpairs(hessian.Dense(torch.eye(20)), 6, generator=generator(0))
    torch.testing.assert_close(same.values, torch.ones(6, dtype=torch.float64))
    zero = hessian.top_eigenpairs(hessian.Dense(torch.zeros(9, 9)), 3, generator=generator(0))
    assert zero.values.tolist() == [0, 0, 0]
    assert bool(zero.converged.all())
    for size in (1, 2, 3):
        whole = hessian.top_eigenpairs(hessian.Dense(torch.diag(torch.arange(1.0, size + 1))), size, generator=generator(0))
        torch.testing.assert_close(whole.values, torch.arange(size, 0, -1, dtype=torch.float64))


def test_products_that_leave_nothing_but_rounding_add_no_vectors():
    """Noise that is scaled up to a unit vector is not orthogonal to the basis, unless it is made so again."""
    identity = matrix_with(torch.ones(1000))
    low_rank = matrix_with(torch.cat([torch.arange(9.0, 4.0, -1), torch.zeros(400)]))
    for seed in range(3):
        pairs = hessian.top_eigenpairs(hessian.Dense(identity), 20, tol=1e-6, generator=generator(seed))
        torch.testing.assert_close(pairs.values, torch.ones(20, dtype=torch.float64))
        assert pairs.complete
        pairs = hessian.top_eigenpairs(hessian.Dense(low_rank), 10, "smallest", tol=1e-6, generator=generator(seed))
        torch.testing.assert_close(pairs.values, torch.zeros(10, dtype=torch.float64), rtol=0, atol=1e-10)
        assert pairs.complete


def test_copies_that_could_not_be_looked_for_are_warned_of():
    values = torch.cat([torch.full((15,), 5.0), torch.full((15,), 4.5), torch.linspace(0, 4, 470)])
    operator = hessian.Dense(matrix_with(values))
    with pytest.warns(RuntimeWarning, match="copies may be missing; raise max_matvecs"):
        pairs = hessian.top_eigenpairs(operator, 30, tol=1e-6, generator=generator(2))
    assert bool(pairs.converged.all())
    assert not pairs.complete
    whole = hessian.top_eigenpairs(operator, 30, tol=1e-6, block_size=16, max_matvecs=2000, generator=generator(2))
    assert whole.complete
    torch.testing.assert_close(whole.values, values[:30].double(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12])
def test_the_scale_of_the_operator_does_not_matter(scale):
    matrix = matrix_with(torch.cat([torch.tensor([9.0, 7.0, 7.0]), torch.linspace(-1, 1, 100)]))
    plain = hessian.top_eigenpairs(hessian.Dense(matrix), 3, generator=generator(0))
    scaled = hessian.top_eigenpairs(hessian.Dense(scale * matrix), 3, generator=generator(0))
    torch.testing.assert_close(scaled.values / scale, plain.values, rtol=1e-9, atol=0)
    assert scaled.num_matvecs == plain.num_matvecs


def test_restarts_in_little_memory_lose_nothing():
    matrix = matrix_with(torch.cat([torch.tensor([3.0, 2.9, 2.8]).double(), torch.linspace(-2, 2.5, 300)]))
    pairs = hessian.top_eigenpairs(hessian.Dense(matrix), 3, tol=1e-6, max_basis=14, max_matvecs=5000, generator=generator(1))
    assert bool(pairs.converged.all())
    torch.testing.assert_close(pairs.values, torch.tensor([3.0, 2.9, 2.8]).double(), rtol=1e-9, atol=0)


def test_what_has_not_converged_says_so():
    matrix = matrix_with(torch.linspace(0, 1, 400).sqrt())
    pairs = hessian.top_eigenpairs(hessian.Dense(matrix), 4, tol=1e-10, max_matvecs=12, generator=generator(0))
    assert pairs.num_matvecs <= 12
    assert not bool(pairs.converged.any())
    torch.testing.assert_close(pairs.residuals, true_residuals(matrix, pairs), rtol=1e-6, atol=1e-12)
    few = hessian.top_eigenpairs(hessian.Dense(matrix), 4, max_matvecs=2, generator=generator(0))
    assert len(few.values) <= 2  # no more Ritz pairs than products


@pytest.mark.parametrize("tol", [1e-3, 1e-6, 1e-9])
def test_float32_converges_only_as_far_as_its_residuals_say(tol):
    exact = matrix_with(torch.cat([torch.tensor([4.0, 3.0, 2.5]), torch.linspace(-1, 1, 300)]))
    matrix = exact.float()
    pairs = hessian.top_eigenpairs(hessian.Dense(matrix), 3, tol=tol, generator=generator(0))
    assert pairs.vectors.dtype == torch.float32
    residuals = true_residuals(matrix.double(), type(pairs)(**{**vars(pairs), "vectors": pairs.vectors.double()}))
    assert bool((residuals <= 2 * pairs.residuals + 1e-6).all())
    assert bool((residuals[pairs.converged] <= 1.5 * tol * 4 + 4e-7).all())
    assert bool(pairs.converged.all()) == (tol > 1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_coarse_basis_gives_honest_residuals(dtype):
    matrix = matrix_with(torch.cat([torch.tensor([4.0, 3.0, 2.5]), torch.linspace(-1, 1, 300)]))
    pairs = hessian.top_eigenpairs(
        hessian.Dense(matrix), 3, tol=0.02, basis_dtype=dtype, basis_device="cpu", generator=generator(0)
    )
    torch.testing.assert_close(pairs.residuals, true_residuals(matrix, pairs), rtol=1e-6, atol=1e-12)
    assert bool(pairs.converged.all())
    torch.testing.assert_close(pairs.values, torch.tensor([4.0, 3.0, 2.5], dtype=torch.float64), rtol=2e-3, atol=0)


class Counting(LinearOperator):
    """A dense matrix that counts products and can be made to fail."""

    def __init__(self, matrix, fail_after=10**9):
        self.matrix, self.count, self.fail_after = matrix, 0, fail_after
        self.shape, self.dtype, self.device = tuple(matrix.shape), matrix.dtype, matrix.device

    def _matmat(self, vectors):
        self.count += vectors.shape[1]
        if self.count > self.fail_after:
            raise KeyboardInterrupt
        return self.matrix @ vectors


def test_num_matvecs_counts_products():
    operator = Counting(matrix_with(torch.linspace(0, 1, 80) ** 6))
    for options in ({"tol": 1e-3}, {"tol": 1e-13, "max_matvecs": 60}):
        operator.count = 0
        pairs = hessian.top_eigenpairs(operator, 3, generator=generator(0), **options)
        assert pairs.num_matvecs == operator.count


def test_warm_start_takes_three_products():
    matrix = matrix_with(torch.cat([torch.tensor([10.0, 6.0]), torch.linspace(-1, 1, 200)]))
    first = hessian.top_eigenpairs(hessian.Dense(matrix), 1, generator=generator(0))
    moved = matrix + 0.02 * matrix_with(torch.linspace(-1, 1, 202), seed=5)
    state = torch.get_rng_state()
    warm = hessian.top_eigenpairs(hessian.Dense(moved), 1, start=first.vectors)
    assert torch.equal(torch.get_rng_state(), state)
    assert warm.num_matvecs <= 3
    assert bool(warm.converged.all())
    assert float(warm.values[0]) == pytest.approx(float(torch.linalg.eigvalsh(moved)[-1]), rel=1e-5)


def test_resuming_repeats_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("hessian.estimators.krylov_checkpoint._SECONDS", 0.0)
    matrix = matrix_with(torch.cat([torch.tensor([3.0, 3.0, 2.0]), torch.linspace(-1, 1, 200)]))
    path = tmp_path / "krylov.safetensors"
    whole = hessian.top_eigenpairs(Counting(matrix), 3, tol=1e-6, generator=generator(7))
    stopped = Counting(matrix, fail_after=20)
    with pytest.raises(KeyboardInterrupt):
        hessian.top_eigenpairs(stopped, 3, tol=1e-6, generator=generator(7), checkpoint=path)
    rest = Counting(matrix)
    resumed = hessian.top_eigenpairs(rest, 3, tol=1e-6, generator=generator(99), checkpoint=path)
    torch.testing.assert_close(resumed.values, whole.values, rtol=1e-12, atol=0)
    assert resumed.num_matvecs == whole.num_matvecs + 1  # the one that checks the file
    assert rest.count <= whole.num_matvecs + 1 - 18
    other = Counting(matrix_with(torch.linspace(0, 1, 203)))
    with pytest.raises(ValueError, match="belongs to another operator"):
        hessian.top_eigenpairs(other, 3, tol=1e-6, checkpoint=path)
    with pytest.raises(ValueError, match="other options or for another model"):
        hessian.top_eigenpairs(Counting(matrix[:90, :90]), 3, checkpoint=path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_same_seed_same_result_and_the_global_generator_advances():
    operator = hessian.Dense(matrix_with(torch.linspace(0, 1, 80) ** 3))
    one, other = (hessian.top_eigenpairs(operator, 3, generator=generator(5)) for _ in range(2))
    assert torch.equal(one.vectors, other.vectors)
    state = torch.get_rng_state()
    hessian.top_eigenpairs(operator, 1)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("build", [ConvNet, SmoothNet])
def test_networks(build):
    model, loss = seeded(build), nn.CrossEntropyLoss()
    data = classification(12, *((1, 9, 9) if build is ConvNet else (4,)))
    operator = hessian.Hessian(model, loss, [(data[0][:8], data[1][:8]), (data[0][8:], data[1][8:])])
    expected = torch.linalg.eigvalsh(operator.to_dense()).flip(0)
    pairs = hessian.top_eigenpairs(operator, 4, tol=1e-6, max_matvecs=1000, generator=generator(0))
    assert bool(pairs.converged.all())
    torch.testing.assert_close(pairs.values, expected[:4], rtol=1e-9, atol=1e-9)


def test_the_trained_network_needs_at_most_twenty_products(resnet20):
    images, targets = (tensor[:256] for tensor in resnet20.train.tensors)
    operator = hessian.Hessian(resnet20.model, resnet20.loss, (images, targets))
    pairs = hessian.top_eigenpairs(operator, 5, generator=generator(0))
    assert bool(pairs.converged.all())
    assert pairs.num_matvecs <= 20
    assert float(true_residuals_of(operator, pairs).max()) <= 1e-3 * float(pairs.values[0])


def true_residuals_of(operator, pairs):
    return (operator @ pairs.vectors - pairs.vectors * pairs.values.to(pairs.vectors)).norm(dim=0)


class Skewed(LinearOperator):
    def __init__(self, size):
        self.shape, self.dtype, self.device = (size, size), torch.float64, torch.device("cpu")
        self.matrix = torch.randn(size, size, dtype=torch.float64, generator=generator(0))

    def _matmat(self, vectors):
        return self.matrix @ vectors


def test_bad_input():
    operator = hessian.Dense(torch.eye(6))
    for k in (0, 7):
        with pytest.raises(ValueError, match=f"k={k} eigenpairs of an operator of size 6: k must be from 1 to 6"):
            hessian.top_eigenpairs(operator, k)
    with pytest.raises(ValueError, match="'top' is none of 'largest', 'smallest', 'both', 'magnitude'"):
        hessian.top_eigenpairs(operator, 1, "top")
    with pytest.raises(ValueError, match="k must be at least 2"):
        hessian.top_eigenpairs(operator, 1, "both")
    with pytest.raises(ValueError, match="positive tolerance"):
        hessian.top_eigenpairs(operator, 1, tol=float("nan"))
    with pytest.raises(ValueError, match="the operator is not symmetric"):
        hessian.top_eigenpairs(Skewed(50), 2, generator=generator(0))
    with pytest.raises(ValueError, match="curvature is not finite"):
        hessian.top_eigenpairs(hessian.Dense(torch.full((5, 5), float("nan"))), 1)
    with pytest.raises(ValueError, match="max_basis=5 is too small"):
        hessian.top_eigenpairs(hessian.Dense(torch.eye(90)), 3, max_basis=5)
    with pytest.raises(ValueError, match=r"start has shape \(4,\)"):
        hessian.top_eigenpairs(operator, 1, start=torch.ones(4))
    with pytest.raises(ValueError, match="start is zero"):
        hessian.top_eigenpairs(operator, 1, start=torch.zeros(6))


def test_tables():
    pairs = hessian.top_eigenpairs(hessian.Dense(torch.diag(torch.tensor([3.0, 2.0, 1.0]))), 2, generator=generator(0))
    assert repr(pairs).splitlines()[0].split() == ["eigenvalue", "residual", "converged"]
    assert pairs._repr_html_().count("<tr>") == 3
    assert pairs.to_dict()["values"] == pytest.approx([3.0, 2.0])
