"""Damped inverses: by conjugate gradients, and in closed form for a low-rank matrix plus a multiple of the identity."""

import torch

from hessian.operators.base import LinearOperator
from hessian.space import VectorSpace


class ConjugateGradientInverse(LinearOperator):
    """(A + damping I)^-1, every product solved by conjugate gradients (Hestenes & Stiefel, 1952)."""

    def __init__(self, operator: LinearOperator, damping: float, tol: float, max_iterations: int) -> None:
        self._operator, self.damping, self.tol, self.max_iterations = operator, damping, tol, max_iterations
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device

    @property
    def space(self) -> VectorSpace:
        return self._operator.space

    def _matmat(self, vectors: torch.Tensor) -> torch.Tensor:
        space = self.space
        right = vectors.T.contiguous()
        solution, residual = torch.zeros_like(right), right.clone()
        direction = residual.clone()
        targets = self.tol * space.norms(right)
        squares = space.inner(residual, residual)
        for _ in range(self.max_iterations):
            active = squares.sqrt() > targets
            if not bool(active.any()):
                return solution.T
            image = self._operator.rows(direction) + self.damping * direction
            curvature = space.inner(direction, image)
            if bool((curvature[active] <= 0).any()):
                lowest = float(curvature[active].min())
                raise ValueError(
                    f"A + {self.damping:g} I is not positive definite: a direction has curvature {lowest:.3g}; "
                    "increase the damping, or use GaussNewton instead of Hessian"
                )
            step = torch.where(active, squares / curvature.where(active, 1.0), 0.0).to(right)[:, None]
            solution += step * direction
            residual -= step * image
            renewed = space.inner(residual, residual)
            ratio = torch.where(active, renewed / squares.where(active, 1.0), 0.0).to(right)[:, None]
            direction = residual + ratio * direction
            squares = renewed
        if bool((squares.sqrt() > targets).any()):
            worst = float((squares.sqrt() / targets.clamp(min=1e-300) * self.tol).max())
            raise ValueError(
                f"conjugate gradients ended after {self.max_iterations} products at a relative residual of {worst:.1e}, not "
                f"{self.tol:.1e}: allow more by max_iterations=, or increase the damping"
            )
        return solution.T


def inverse(
    operator: LinearOperator, *, damping: float = 0.0, tol: float = 1e-5, max_iterations: int | None = None
) -> ConjugateGradientInverse:
    """(A + damping I)^-1 as an operator; every product is solved to the relative residual `tol`.

    Needs A + damping I positive definite, and says so where a direction shows that it is not. `max_iterations`: by
    default 10 P, at most 10,000. ValueError if that does not suffice.

    >>> import torch, hessian
    >>> A = hessian.Dense(torch.diag(torch.tensor([1.0, 3.0])))
    >>> hessian.inverse(A, damping=1.0) @ torch.tensor([2.0, 8.0])
    tensor([1., 2.])
    """
    if not damping >= 0 or not tol > 0:
        raise ValueError(f"damping={damping} and tol={tol}: give a damping of at least 0 and a positive tolerance")
    limit = min(10 * operator.shape[0], 10_000) if max_iterations is None else max_iterations
    return ConjugateGradientInverse(operator, damping, tol, limit)


class LowRankPlusShift(LinearOperator):
    r"""The matrix :math:`V \Lambda V^\top + \sigma (I - V V^\top)`: known eigenpairs, and one value everywhere else.

    `values` (k,), `vectors` (P, k) orthonormal, as `top_eigenpairs` returns them; `shift` stands for the eigenvalues that
    are not known, for instance their average (trace - sum of values) / (P - k).

    >>> import torch, hessian
    >>> A = hessian.LowRankPlusShift(torch.tensor([3.0]), torch.tensor([[1.0], [0.0]]), shift=1.0)
    >>> A.inverse(damping=1.0).to_dense()
    tensor([[0.2500, 0.0000],
            [0.0000, 0.5000]])
    """

    def __init__(self, values: torch.Tensor, vectors: torch.Tensor, shift: float) -> None:
        if values.dim() != 1 or vectors.dim() != 2 or vectors.shape[1] != len(values):
            raise ValueError(f"values of shape {tuple(values.shape)} and vectors of shape {tuple(vectors.shape)} do not match")
        self.values, self.vectors, self.shift = values.to(vectors), vectors, float(shift)
        self.shape = (len(vectors), len(vectors))
        self.dtype, self.device = vectors.dtype, vectors.device

    def _matmat(self, vectors: torch.Tensor) -> torch.Tensor:
        parts = self.vectors.T @ vectors
        return self.shift * vectors + self.vectors @ ((self.values - self.shift).unsqueeze(1) * parts)

    def inverse(self, damping: float = 0.0) -> "LowRankPlusShift":
        """(A + damping I)^-1, in closed form; ValueError where that is singular."""
        denominators = self.values.double() + damping
        if bool((denominators == 0).any()) or self.shift + damping == 0:
            raise ValueError(f"A + {damping:g} I is singular: give another damping")
        return LowRankPlusShift(1 / denominators, self.vectors, 1 / (self.shift + damping))
