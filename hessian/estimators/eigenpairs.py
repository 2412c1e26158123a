"""Eigenvalues and eigenvectors at the ends of a spectrum, each with its residual."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from hessian.colours import BLUE, GREY
from hessian.drawn import new_axes
from hessian.estimators.krylov_checkpoint import KrylovCheckpoint
from hessian.estimators.lanczos import KrylovBasis
from hessian.memory import available_bytes
from hessian.operators.base import LinearOperator
from hessian.progress import up_to
from hessian.space import VectorSpace
from hessian.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Which = Literal["largest", "smallest", "both", "magnitude"]

_BASIS_SHARE = 0.25  # of the free memory
_DOMINANT = 0.1  # of the largest |Ritz value|: below, a small residual may be that of a pair from the bulk
_QUIET_STEPS = 5  # and a third of all steps: how long such a pair must not have moved
_DISTINCT = 1e3  # times the rounding error: eigenvalues nearer than that, relative to the largest, may be one


@dataclass(frozen=True, repr=False)
class Eigenpairs(Table):
    """Eigenvalues with their vectors, and how well each pair is known.

    values: (k,) float64, sorted as asked for. vectors: (P, k), orthonormal columns. residuals: (k,), |A v - lambda v|: an
    eigenvalue lies within this distance of the value. converged: (k,), whether the residual is at most tol times the
    largest |Ritz value|. complete: whether every cluster of equal values has fewer members than there were independent
    starting vectors, so that no copy is missing; False after `start`, which is not checked. num_matvecs: products spent.
    """

    values: torch.Tensor
    vectors: torch.Tensor
    residuals: torch.Tensor
    converged: torch.Tensor
    complete: bool
    num_matvecs: int
    space: VectorSpace

    def full_vectors(self) -> torch.Tensor:
        """The whole vectors, (P, k), where processes hold parts of them, all of which must call this."""
        return self.space.whole(self.vectors.T).T

    def header(self) -> list[str]:
        return ["eigenvalue", "residual", "converged"]

    def cells(self) -> list[list[str]]:
        rows = zip(self.values.tolist(), self.residuals.tolist(), self.converged.tolist(), strict=True)
        return [[f"{value:.6g}", f"{residual:.1e}", "yes" if fine else "NO"] for value, residual, fine in rows]

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the values in their order with residuals as error bars, hollow where one has not converged.

        `ax=None` makes a new figure.
        """
        ax = new_axes() if ax is None else ax
        values, numbers = self.values.numpy(), torch.arange(1, len(self.values) + 1)
        ax.vlines(numbers, 0, values, color=BLUE, linewidth=2)
        ax.errorbar(numbers, values, yerr=self.residuals.numpy(), fmt="none", ecolor=GREY, capsize=4)
        for chosen, inside, label in ((self.converged, BLUE, "converged"), (~self.converged, "white", "not converged")):
            if chosen.any():
                ax.plot(numbers[chosen], values[chosen.numpy()], "o", color=BLUE, markerfacecolor=inside, label=label)
        if not self.converged.all():
            ax.legend()
        ax.axhline(0, color=GREY, linewidth=0.6)
        ax.set_xticks(numbers[:: max(1, len(numbers) // 20)].tolist())
        ax.set(xlabel="number of the eigenvalue", ylabel="eigenvalue")
        return ax

    def to_dict(self) -> dict[str, Any]:
        """Everything but the vectors, for JSON."""
        return {
            "values": self.values.tolist(),
            "residuals": self.residuals.tolist(),
            "converged": self.converged.tolist(),
            "complete": self.complete,
            "num_matvecs": self.num_matvecs,
        }


def top_eigenpairs(
    A: LinearOperator,
    k: int = 1,
    which: Which = "largest",
    *,
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    start: torch.Tensor | None = None,
    block_size: int | None = None,
    max_basis: int | None = None,
    basis_dtype: torch.dtype | None = None,
    basis_device: torch.device | str | None = None,
    checkpoint: str | Path | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Eigenpairs:
    r"""`k` eigenpairs of a symmetric operator by thick-restart block Lanczos with full reorthogonalisation.

    `which`: the largest eigenvalues (in descending order), the smallest (ascending), both ends (the larger half from the
    upper end; descending), or the largest in magnitude (descending in it). A pair has converged when its residual
    :math:`\|A v - \lambda v\|` is at most `tol` times the largest |Ritz value|; what has not after `max_matvecs` products
    (default 100 + 20 k) says so.

    Multiple eigenvalues: m independent random starting vectors show up to m copies of one. As long as a cluster among the
    results has as many members as there were starts, another start is added and given as many steps as the first ones
    needed; a RuntimeWarning where products or memory end before that (`complete` is then False). `block_size` is the number
    of starts to begin with (default 2, more for k > 8).

    `start` (P, j): approximate eigenvectors to begin from instead of random vectors: cheap when they are good. That no
    copy of a multiple eigenvalue is missing is then not checked. `max_basis`: rows of the Krylov basis, P numbers each,
    before a restart (default 3 k + 2 block_size + 8, less where a quarter of the free memory does not hold that).
    `basis_dtype`, `basis_device`: keep the basis in another precision (torch.bfloat16) or place ("cpu"); residuals are then
    computed by k more products. `checkpoint`: a file to which the state is written every 30 seconds and at the end; where it
    exists, the search goes on from it.

    Raises ValueError for k outside 1..P, for an operator that is not symmetric and for curvature that is not finite.
    Sources: Wu & Simon (2000), "Thick-restart Lanczos method"; Golub & Underwood (1977) for blocks.

    >>> import torch, hessian
    >>> A = hessian.Dense(torch.diag(torch.tensor([5.0, 1.0, -4.0]).double()))
    >>> pairs = hessian.top_eigenpairs(A, 2, "both")
    >>> [round(value, 6) for value in pairs.values.tolist()], bool(pairs.converged.all())
    ([5.0, -4.0], True)
    """
    _check(A, k, which, tol)
    vectors = None if start is None else _starting_rows(A, start)
    block = min(block_size or min(max(2, k // 4), 8), A.shape[0]) if vectors is None else len(vectors)
    basis = KrylovBasis(A, _capacity(A, k, block, max_basis, basis_dtype, basis_device), basis_dtype, basis_device)
    search = _Search(basis, k, which, tol, generator)
    file = None if checkpoint is None else KrylovCheckpoint(Path(checkpoint), basis, generator)
    if file is not None and file.exists():
        search.resume(file.load())
    else:
        search.begin(block, vectors)
    budget = 100 + 20 * k if max_matvecs is None else max_matvecs
    with up_to(budget, "eigenvalues", "product", progress=progress) as bar:
        while not search.is_over() and basis.num_matvecs < budget:
            before = basis.num_matvecs
            search.step(budget - before)
            bar.update(basis.num_matvecs - before)
            bar.set_postfix_str(f"largest residual {search.largest_residual:.1e}")
            if file is not None:
                file.save_now_and_then(search.counters())
    if file is not None:
        file.save(search.counters())
    search.warn_if_incomplete()
    return search.result(verify=basis.rows.dtype != A.dtype or tol < 100 * basis.rounding)


class _Search:
    """One search: which Ritz pairs are wanted, whether they have converged, whether another start is due."""

    def __init__(self, basis: KrylovBasis, k: int, which: Which, tol: float, generator: torch.Generator | None) -> None:
        self.basis, self.k, self.which, self.tol, self.generator = basis, k, which, tol, generator
        self.num_starts = 0  # independent random vectors so far
        self.checks_multiplicity = True
        self.first_steps = 0  # steps that each start had when the wanted pairs first converged
        self.owed = 0  # steps that the newest start is yet to be given
        self.values = torch.zeros(0, dtype=torch.float64)
        self.coefficients = torch.zeros(0, 0, dtype=torch.float64)
        self.residuals = torch.zeros(0, dtype=torch.float64)
        self.trail: list[torch.Tensor] = []  # the wanted values after each step
        self.over = self.complete = False
        self.spent_otherwise = 0  # products that added nothing to the basis

    def begin(self, block: int, vectors: torch.Tensor | None) -> None:
        """Queue random vectors, or those given."""
        self.checks_multiplicity = vectors is None
        self.num_starts = self.basis.add(self._random(block) if vectors is None else vectors)

    def counters(self) -> dict[str, int]:
        return {
            "num_starts": self.num_starts,
            "first_steps": self.first_steps,
            "owed": self.owed,
            "checks": int(self.checks_multiplicity),
        }

    def resume(self, counters: dict[str, int]) -> None:
        """Go on from a basis that was read from a file and what `counters` had said."""
        self.num_starts, self.first_steps, self.owed = (counters[name] for name in ("num_starts", "first_steps", "owed"))
        self.checks_multiplicity = bool(counters["checks"])
        self.spent_otherwise = 1  # the file was checked against the operator
        if self.basis.num_applied:
            self._look()
            self._decide()

    def is_over(self) -> bool:
        return self.over

    @property
    def largest_residual(self) -> float:
        """Of the wanted pairs, relative to the largest |Ritz value|."""
        if len(self.values) < self.k:
            return float("inf")
        scale = float(self.values.abs().max())
        return float(self.residuals[self._wanted()].max()) / scale if scale else 0.0

    def step(self, budget: int) -> None:
        """Multiply a block (while a start is owed steps: its newest vector), then see what is known."""
        basis = self.basis
        if basis.num_waiting == 0:  # an invariant subspace: what lies outside it is still unseen
            self._new_start()
            return
        if self.owed:
            basis.newest_first()
            self.owed -= 1
        count = min(1 if self.owed else basis.num_waiting, budget)
        if basis.num_rows + count > basis.capacity and basis.capacity < basis.space.size:
            self._restart()
        basis.advance(count)
        self._look()
        self._decide()

    def _look(self) -> None:
        self.values, self.coefficients, self.residuals = self.basis.ritz()

    def _decide(self) -> None:
        """Is the search over? If the wanted pairs are there, is each cluster surely complete?"""
        if len(self.values) < self.k or self.owed:
            return
        if self.basis.num_applied == self.basis.space.size:
            self.over = self.complete = True
            return
        self.trail.append(self.values[self._wanted()])
        if not bool((self.residuals[self._wanted()] <= self.tol * self.values.abs().max()).all()) or not self._is_quiet():
            return
        self.complete = self.checks_multiplicity and self._largest_cluster() < self.num_starts
        if self.complete or not self.checks_multiplicity:
            self.over = True
            return
        if not self.first_steps:
            self.first_steps = -(-self.basis.num_matvecs // self.num_starts)
        self._new_start()

    def _is_quiet(self) -> bool:
        """Whether the wanted values that are small beside the largest have stopped moving.

        Their residual is small beside the largest from the start, as a random vector's Rayleigh quotient lies in the bulk.
        """
        now, largest = self.trail[-1], self.values.abs().max()
        small = now.abs() < _DOMINANT * largest
        steps = max(_QUIET_STEPS, len(self.trail) // 3)
        if not bool(small.any()) or self.basis.num_waiting == 0:
            return True
        if len(self.trail) <= steps:
            return False
        return bool(((now - self.trail[-1 - steps]).abs()[small] <= self.tol * largest).all())

    def _new_start(self) -> None:
        """One more random vector, with as many steps owed to it as the first ones had; the end if there is no room for it."""
        if self.basis.capacity < self.basis.space.size and self.basis.capacity < self.k + 2 * self.basis.num_waiting + 4:
            self.over = True
            return
        if self.basis.num_rows + 1 >= self.basis.capacity and self.basis.capacity < self.basis.space.size:
            self._restart()
        added = self.basis.add(self._random(1))
        self.num_starts += added
        self.owed = self.first_steps if added else 0
        if not added:  # the basis spans the whole space
            self.over = self.complete = True

    def _random(self, count: int) -> torch.Tensor:
        return self.basis.space.random(count, "normal", self.generator)

    def _restart(self) -> None:
        """Make room: keep the wanted Ritz vectors and, of the rest, those nearest to them in the spectrum."""
        self._look()
        room = self.basis.capacity - self.basis.num_waiting
        kept = min(max(self.k + (room - self.k) // 3, self.k), room - self.basis.num_waiting - 1, len(self.values))
        chosen = self._ranked()[:kept]
        self.basis.restart(self.coefficients[:, chosen], self.values[chosen])
        self._look()

    def _ranked(self) -> torch.Tensor:
        """All Ritz pairs, the wanted ones first, then by how near to being wanted."""
        ascending = torch.arange(len(self.values))
        match self.which:
            case "largest":
                return ascending.flip(0)
            case "smallest":
                return ascending
            case "magnitude":
                return self.values.abs().argsort(descending=True, stable=True)
        lower, upper = ascending[: len(ascending) // 2], ascending[len(ascending) // 2 :].flip(0)
        mixed = torch.stack([upper[: len(lower)], lower], dim=1).reshape(-1)
        return torch.cat([mixed, upper[len(lower) :]])

    def _wanted(self) -> torch.Tensor:
        """Indices of the wanted pairs, in the order of the result."""
        chosen = self._ranked()[: self.k]
        if self.which == "both":
            return chosen[self.values[chosen].argsort(descending=True)]
        return chosen

    def _largest_cluster(self) -> int:
        """The most wanted Ritz values in a row that are one within what is known of them."""
        chosen = self._wanted().sort().values
        values, residuals = self.values[chosen], self.residuals[chosen]
        resolution = _DISTINCT * self.basis.rounding * float(self.values.abs().max())
        longest = length = 1
        for index in range(1, len(values)):
            window = max(float(residuals[index - 1 : index + 1].max()), resolution)
            adjacent = int(chosen[index] - chosen[index - 1]) == 1
            length = length + 1 if adjacent and float(values[index] - values[index - 1]) <= window else 1
            longest = max(longest, length)
        return longest

    def warn_if_incomplete(self) -> None:
        """RuntimeWarning where all wanted pairs have converged but copies of multiple eigenvalues may be missing."""
        if self.complete or not self.checks_multiplicity or not self.largest_residual <= self.tol:
            return
        warnings.warn(
            f"{self._largest_cluster()} equal eigenvalues were found from {self.num_starts} starting vectors: copies may be "
            "missing; raise max_matvecs, max_basis or block_size",
            RuntimeWarning,
            stacklevel=3,
        )

    def result(self, *, verify: bool) -> Eigenpairs:
        """The wanted pairs as they are known; `verify`: with residuals from further products."""
        chosen = self._wanted()
        basis = self.basis
        values, residuals = self.values[chosen], self.residuals[chosen]
        rows = basis.combine(self.coefficients[:, chosen].T).to(basis.operator.device, basis.operator.dtype)
        spent = basis.num_matvecs + self.spent_otherwise
        if verify and len(chosen):
            rows = rows / basis.space.norms(rows).to(rows)[:, None]
            images = basis.operator.rows(rows)
            spent += len(chosen)
            values = basis.space.inner(rows, images)
            residuals = basis.space.norms(images - values.to(rows)[:, None] * rows)
        residuals = residuals.clamp(min=torch.finfo(basis.operator.dtype).eps * basis.scale)  # of the products themselves
        largest = self.values.abs().max() if len(self.values) else torch.tensor(0.0)
        return Eigenpairs(values, rows.T, residuals, residuals <= self.tol * largest, self.complete, spent, self.basis.space)


def _check(A: LinearOperator, k: int, which: str, tol: float) -> None:
    if A.shape[0] != A.shape[1]:
        raise ValueError(f"an operator of shape {A.shape} has no eigenvalues: pass a square one")
    if not 1 <= k <= A.shape[0]:
        raise ValueError(f"k={k} eigenpairs of an operator of size {A.shape[0]}: k must be from 1 to {A.shape[0]}")
    if which not in get_args(Which):
        raise ValueError(f"which={which!r} is none of {', '.join(map(repr, get_args(Which)))}")
    if which == "both" and k < 2:
        raise ValueError("which='both' takes pairs from both ends: k must be at least 2")
    if not tol > 0:
        raise ValueError(f"tol={tol}: give a positive tolerance, relative to the largest |eigenvalue|")


def _starting_rows(A: LinearOperator, start: torch.Tensor) -> torch.Tensor:
    """The given vectors as rows; ValueError if they do not fit."""
    rows = start.reshape(-1, 1).T if start.dim() == 1 else start.T
    if rows.dim() != 2 or rows.shape[1] != A.space.local_size or not len(rows):
        raise ValueError(f"start has shape {tuple(start.shape)}: pass (P,) or (P, j) with P = {A.space.local_size}")
    if not torch.isfinite(rows).all() or not bool(rows.any()):
        raise ValueError("start is zero or not finite: pass approximate eigenvectors, or leave it out")
    return rows


def _capacity(
    A: LinearOperator,
    k: int,
    block: int,
    max_basis: int | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> int:
    """Rows that the basis may have."""
    least = k + 3 * block + 2
    if max_basis is not None:
        if max_basis < min(least, A.shape[0]):
            raise ValueError(f"max_basis={max_basis} is too small: {k} pairs from {block} starts need {least} rows")
        return min(max_basis, A.shape[0])
    wanted = 3 * k + 2 * block + 8
    free = available_bytes(torch.device(device or A.device))
    if free is not None:
        bytes_of_row = A.space.local_size * torch.empty(0, dtype=dtype or A.dtype).element_size()
        wanted = min(wanted, int(A.space.least(_BASIS_SHARE * free // bytes_of_row)))
    return min(max(wanted, least), A.shape[0])
