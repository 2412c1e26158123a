r"""The Krylov kernel: a growing orthonormal basis with the operator's projection on it, restarted without loss.

The basis is a list of orthonormal rows. The first `num_applied` of them, V, have been multiplied; the others wait in a
queue, Q. What multiplication leaves after orthogonalisation against all rows joins the queue, so that at any time

.. math:: A V = V T + Q B

holds to rounding, with T symmetric and nothing thrown away. A Ritz pair (theta, V y) of T then has the residual
:math:`\|B y\|`, at no product. The queue may start with any block (one vector, several, known approximate eigenvectors)
and may be given new random vectors at any time; a thick restart replaces V by some of its Ritz vectors (Wu & Simon, 2000).
"""

import torch

from hessian.operators.base import LinearOperator

_CHUNK = 2**20  # entries of a vector that a restart rotates at a time
_NEW = 1e-2  # a vector that is given counts as new if this share of it is outside the basis
_LOST = 10.0  # what is left of a product counts as rounding below this many times epsilon, relative to the operator
_SHORT = 1e-2  # the rest of a product, relative to the product, that needs another orthogonalisation
_NEW_AFTER_ALL = 0.7  # of its length must remain then, or it was rounding
_ASYMMETRY = 1e-3  # more of it is no rounding, and no finite difference's error either


class NotSymmetricError(ValueError):
    """The projection of the operator is not symmetric."""


class KrylovBasis:
    """At most `capacity` orthonormal rows and the operator's projection on them, (rows, num_applied), float64.

    `storage` keeps the rows in another precision or on another device than the operator's.
    """

    def __init__(
        self,
        operator: LinearOperator,
        capacity: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.operator, self.capacity = operator, capacity
        self.space = operator.space
        shape = (capacity, self.space.local_size)
        self.rows = torch.empty(shape, dtype=dtype or operator.dtype, device=device or operator.device)
        self.projection = torch.zeros(capacity, capacity, dtype=torch.float64)
        self.num_rows = self.num_applied = self.num_matvecs = 0
        self.scale = 0.0  # the largest norm of a product so far: a lower bound of the operator's norm

    @property
    def rounding(self) -> float:
        """The relative error of one operation in the operator's or the storage's precision, whichever is coarser."""
        return max(torch.finfo(self.rows.dtype).eps, torch.finfo(self.operator.dtype).eps)

    @property
    def num_waiting(self) -> int:
        return self.num_rows - self.num_applied

    @property
    def limit(self) -> int:
        """How many rows there can ever be."""
        return min(self.capacity, self.space.size)

    def add(self, vectors: torch.Tensor) -> int:
        """Orthogonalise (K, P) vectors against the basis and queue what is left of each; the number that was queued."""
        before = self.num_rows
        for vector in vectors:
            rest = vector.to(self.operator.device, self.operator.dtype).clone().unsqueeze(0)
            size = float(self.space.norms(rest)[0])
            self._orthogonalise(rest)
            if self.num_rows < self.limit and float(self.space.norms(rest)[0]) > _NEW * size:
                self._orthogonalise(rest)
                self._queue(rest, float(self.space.norms(rest)[0]))
        return self.num_rows - before

    def advance(self, count: int) -> None:
        """Multiply the next `count` waiting rows and queue what the products add to the basis."""
        assert count <= self.num_waiting
        assert self.num_rows + count <= self.capacity or self.capacity >= self.space.size
        first = self.num_applied
        products = self.operator.rows(self.working(slice(first, first + count))).clone()
        self.num_matvecs += count
        norms = self.space.norms(products)
        if not torch.isfinite(norms).all():
            raise ValueError("the curvature is not finite: the loss has no second derivative here, or overflows")
        self.scale = max(self.scale, float(norms.max()))
        known = self._orthogonalise(products)
        self.num_applied += count
        negligible = _LOST * torch.finfo(self.operator.dtype).eps * self.scale
        for column, product, coefficients, norm in zip(
            range(first, first + count), products, known, norms.tolist(), strict=True
        ):
            self.projection[: len(coefficients), column] = coefficients
            rest = product.unsqueeze(0)
            self.projection[: self.num_rows, column] += self._orthogonalise(rest)[0]  # against the block's new rows, too
            length = float(self.space.norms(rest)[0])
            if length <= negligible or self.num_rows >= self.limit:
                continue
            rest /= length
            left = 1.0
            if length < _SHORT * norm:  # what rounding left of its parts along the basis is now large beside it
                self._orthogonalise(rest)
                left = float(self.space.norms(rest)[0])
            if left > _NEW_AFTER_ALL:
                self.projection[self.num_rows, column] = length
                self._queue(rest, left)

    def _queue(self, vector: torch.Tensor, length: float) -> None:
        self.rows[self.num_rows] = (vector[0] / length).to(self.rows)
        self.num_rows += 1

    def _orthogonalise(self, vectors: torch.Tensor) -> torch.Tensor:
        """Subtract the vectors' parts along the basis, in place; the coefficients, (K, rows), float64.

        Every row gets two passes, which is enough (Giraud, Langou & Rozloznik, 2005).
        """
        coefficients = self.space.gram(vectors, self.rows[: self.num_rows])
        if self.num_rows:
            vectors -= self.combine(coefficients).to(vectors)
        return coefficients

    def combine(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Combinations of the rows, (K, P): `coefficients` (K, rows), in the precision that the rows and float32 share."""
        rows = self.rows[: coefficients.shape[1]]
        common = torch.promote_types(rows.dtype, torch.float32)
        weights = coefficients.to(rows.device, common)
        if rows.dtype == common:
            return weights @ rows
        width = max(1, _CHUNK // len(rows))
        pieces = [weights @ rows[:, start : start + width].to(common) for start in range(0, rows.shape[1], width)]
        return torch.cat(pieces, dim=1)

    def working(self, chosen: slice) -> torch.Tensor:
        """Rows of the basis as the operator takes them."""
        return self.rows[chosen].to(self.operator.device, self.operator.dtype)

    def newest_first(self) -> None:
        """Let the row that was queued last be multiplied next."""
        first, last = self.num_applied, self.num_rows - 1
        self.rows[[first, last]] = self.rows[[last, first]]
        self.projection[[first, last]] = self.projection[[last, first]]

    def ritz(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ritz values, ascending (m,), coefficient vectors as columns (m, m), residual norms (m,), all float64.

        What the projection lacks in symmetry counts as residual. NotSymmetricError if rounding does not explain it.
        """
        size = self.num_applied
        matrix = self.projection[:size, :size]
        noise = (matrix - matrix.T) / 2
        allowed = max(_ASYMMETRY, 10 * self.rounding) * float(matrix.abs().max())
        if float(noise.abs().max()) > allowed:
            raise NotSymmetricError(
                f"the operator is not symmetric: products with two vectors disagree by {2 * float(noise.abs().max()):.2g}, "
                f"the largest being {float(matrix.abs().max()):.2g}; run hessian.verify(operator) to find out why"
            )
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        rest = torch.cat([self.projection[size : self.num_rows, :size], noise])
        return values, vectors, (rest @ vectors).norm(dim=0)

    def restart(self, coefficients: torch.Tensor, values: torch.Tensor) -> None:
        """Keep of the multiplied rows only the Ritz vectors with the given coefficients (m, kept); the queue stays."""
        size, kept = self.num_applied, coefficients.shape[1]
        waiting = self.num_waiting
        coupling = self.projection[size : self.num_rows, :size] @ coefficients
        common = torch.promote_types(self.rows.dtype, torch.float32)
        rotation = coefficients.T.to(self.rows.device, common)
        for start in range(0, self.rows.shape[1], _CHUNK):
            piece = self.rows[:, start : start + _CHUNK]
            piece[:kept] = (rotation @ piece[:size].to(common)).to(piece.dtype)
        for index in range(waiting):
            self.rows[kept + index] = self.rows[size + index]
        self.projection.zero_()
        self.projection[:kept, :kept] = torch.diag(values)
        self.projection[kept : kept + waiting, :kept] = coupling
        self.num_applied, self.num_rows = kept, kept + waiting
