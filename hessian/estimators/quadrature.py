r"""The Lanczos quadrature: for each random probe a Gauss rule of its spectral measure.

A unit vector z gives a symmetric matrix A the measure with mass (u_i . z)^2 at each eigenvalue lambda_i, so that z . f(A) z
is the integral of f. After m products Lanczos has the tridiagonal T = Q^T A Q; its eigenvalues and the squared first
components of its eigenvectors are the m nodes and weights of the Gauss rule of that measure, exact for polynomials of degree
below 2 m (Golub and Welsch 1969; Golub and Meurant, Matrices, Moments and Quadrature with Applications, 2010, chapter 6).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import hypot, isfinite

import torch
from scipy.linalg import eigh_tridiagonal

from hessian.operators.base import LinearOperator
from hessian.progress import up_to
from hessian.space import VectorSpace

_PROBES_AT_ONCE = 8  # vectors in one product: one pass over the data serves them all
_BASIS_BYTES = 4 * 2**30  # the bases of all probes that advance together, unless one alone is larger
_ROUNDING = 4  # units of rounding, relative to its norm, that an orthogonalised product may be off
_ASYMMETRY = 10 * 2**-11  # relative to the norm of A, in float32: GPUs convolve in TF32, which rounds to 11 bits
_ASYMMETRY_IN_DOUBLE = 1e-5  # finite differences, which stand in for missing derivatives, err by 1e-6
_NEGLIGIBLE = 1e-13  # relative to the norm of A: rounding of long inner products in float64, far below that of float32


@dataclass(frozen=True, eq=False)
class Quadrature:
    """Gauss rules of K probes, m nodes each.

    nodes: (K, m) float64, ascending; a rule that ended early repeats its last node. weights: (K, m) float64, rows sum to 1,
    0 where a node is repeated. residuals: (K, m) float64, bounds on |A y - theta y| for the nodes theta and their unit Ritz
    vectors y, rounding included. rounding: (K,) float64, how far off rounding may have moved nodes, in their units.
    size: P of the operator. num_matvecs: products spent.
    """

    nodes: torch.Tensor
    weights: torch.Tensor
    residuals: torch.Tensor
    rounding: torch.Tensor
    size: int
    num_matvecs: int


def lanczos_quadrature(
    operator: LinearOperator,
    num_probes: int,
    num_steps: int,
    *,
    generator: torch.Generator | None = None,
    reorthogonalize: bool = True,
    progress: bool = False,
) -> Quadrature:
    """Gauss rules of `num_steps` nodes for `num_probes` probes of random signs, scaled to unit length.

    A rule ends early when its Krylov space is exhausted, after P steps at the latest. Probes advance together, one product
    for all, eight at a time, or fewer where their bases of (num_steps, P) would exceed 4 GiB.

    `reorthogonalize=False` keeps two vectors of each probe and the product instead of a basis. Converged nodes then come in
    copies that share their weight; the rule still is a Gauss rule of the probe's measure up to rounding: A. Greenbaum,
    Behavior of slightly perturbed Lanczos and conjugate-gradient recurrences, 1989; L. Knizhnerman, The simple Lanczos
    procedure: estimates of the error of the Gauss quadrature formula and their applications, 1996.

    Raises ValueError for fewer than one probe or step, for products that are not finite, and where A shows not to be
    symmetric.
    """
    if num_probes < 1:
        raise ValueError(f"num_probes={num_probes}: give at least 1 random probe")
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: give at least 1 Lanczos step; 50 to 100 resolve most densities")
    space = operator.space
    steps = min(num_steps, space.size)
    kept = steps if reorthogonalize else min(2, steps)
    together = max(1, min(_PROBES_AT_ONCE, _BASIS_BYTES // (kept * space.size * space.dtype.itemsize)))
    recurrences: list[_Recurrence] = []
    with up_to(num_probes * steps, "Lanczos quadrature", "product", progress=progress) as bar:
        while len(recurrences) < num_probes:
            count = min(together, num_probes - len(recurrences))
            # one draw for each, so that a seed means the same probes however many advance together
            group = [_Recurrence(space, steps, kept, space.random(1, "rademacher", generator)) for _ in range(count)]
            _advance(operator, group, bar.update)
            recurrences.extend(group)
    rules = [recurrence.rule(num_steps) for recurrence in recurrences]
    nodes, weights, residuals = (torch.stack(parts) for parts in zip(*rules, strict=True))
    rounding = torch.tensor([recurrence.perturbation for recurrence in recurrences], dtype=torch.float64)
    num_matvecs = sum(recurrence.num_steps for recurrence in recurrences)
    return Quadrature(nodes, weights, residuals, rounding, space.size, num_matvecs)


def _advance(operator: LinearOperator, group: list["_Recurrence"], report: Callable[[int], object]) -> None:
    """Run the group's recurrences to their ends, and let go of their bases."""
    alive = group
    while alive:
        products = operator.rows(torch.stack([recurrence.newest for recurrence in alive])).contiguous()
        for recurrence, product in zip(alive, products, strict=True):
            recurrence.extend(product)
        report(len(alive))
        alive = [recurrence for recurrence in alive if not recurrence.finished]
    for recurrence in group:
        recurrence.drop_basis()


class _Recurrence:
    """Lanczos from one probe: A q_j = beta_(j-1) q_(j-1) + alpha_j q_j + beta_j q_(j+1), with the last `kept` vectors."""

    def __init__(self, space: VectorSpace, steps: int, kept: int, probe: torch.Tensor) -> None:
        self._space, self._steps, self._kept = space, steps, kept
        self._basis = torch.empty(kept, space.local_size, dtype=space.dtype, device=space.device)  # q_j in row j mod kept
        self._basis[0] = probe[0] / float(space.norms(probe))
        self._rounding = torch.finfo(space.dtype).eps
        self._alphas: list[float] = []
        self._betas: list[float] = []
        self._scale = 0.0  # norm of the largest product so far, which is at most that of A
        self.perturbation = 0.0  # norm of what rounding adds to A Q = Q T + beta q e^T
        self.finished = False

    @property
    def newest(self) -> torch.Tensor:
        """The vector whose product comes next, (P,)."""
        return self._basis[self.num_steps % self._kept]

    @property
    def num_steps(self) -> int:
        return len(self._alphas)

    def extend(self, product: torch.Tensor) -> None:
        """One step, with A q_j, (P,)."""
        step = self.num_steps
        rows = self._basis[: min(step + 1, self._kept)]
        residual = product.unsqueeze(0)
        coefficients = torch.zeros(len(rows), dtype=torch.float64)
        for _ in range(2):  # twice is enough: Parlett, The Symmetric Eigenvalue Problem, section 6.9
            correction = self._space.gram(rows, residual)
            residual = torch.addmm(residual, correction.T.to(rows), rows, alpha=-1)
            coefficients += correction[:, 0]
        beta = float(self._space.norms(residual))
        norm = hypot(float(coefficients.norm()), beta)  # of the product, by Pythagoras
        if not isfinite(norm):
            raise ValueError("the curvature is not finite: the loss has no second derivative here, or overflows")
        self._alphas.append(float(coefficients[step % self._kept]))
        self._betas.append(beta)
        coefficients[step % self._kept] = 0
        if step:
            coefficients[(step - 1) % self._kept] -= self._betas[-2]
        self._scale = max(self._scale, norm)
        self._check_symmetry(float(coefficients.abs().max()))
        rounding = _ROUNDING * self._rounding * norm
        self.perturbation = hypot(self.perturbation, float(coefficients.norm()), rounding)
        # To miss a breakdown costs products, not accuracy: the nodes that follow copy earlier ones and share their weight, or
        # weigh no more than rounding errors. To end too early would lose the bulk behind a large outlier. Hence tight bounds.
        self.finished = beta <= max(rounding, _NEGLIGIBLE * self._scale) or step + 1 == self._steps
        if not self.finished:
            self._basis[(step + 1) % self._kept] = residual[0] / beta

    def _check_symmetry(self, deviation: float) -> None:
        """By symmetry q_i . A q_j is 0 for i < j - 1, and beta_(j-1) for i = j - 1."""
        tolerance = _ASYMMETRY_IN_DOUBLE if self._space.dtype == torch.float64 else _ASYMMETRY
        if deviation > tolerance * self._scale:
            raise ValueError(
                f"the operator is not symmetric (u . A v and v . A u differ by {deviation / self._scale:.1e} of its norm, more "
                f"than the {tolerance:.1e} that rounding may explain): run hessian.verify(A)"
            )

    def drop_basis(self) -> None:
        self._basis = torch.empty(0)

    def rule(self, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Nodes, weights and residual bounds, each (length,)."""
        # implicit QL, "stev": the default driver's eigenvectors are less orthogonal
        nodes, vectors = (
            torch.from_numpy(part) for part in eigh_tridiagonal(self._alphas, self._betas[:-1], lapack_driver="stev")
        )
        weights = vectors[0].square()
        residuals = self._betas[-1] * vectors[-1].abs() + self.perturbation
        missing = length - len(nodes)
        return (
            torch.cat([nodes, nodes[-1:].expand(missing)]),
            torch.cat([weights, weights.new_zeros(missing)]),
            torch.cat([residuals, residuals[-1:].expand(missing)]),
        )
