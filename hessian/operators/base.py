"""A matrix that you can only multiply by."""

from abc import ABC, abstractmethod
from functools import partial

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator as ScipyOperator

from hessian.space import VectorSpace

_DENSE_COLUMNS = 64  # columns of the identity multiplied at a time


class NotExactError(Exception):
    """What was asked for cannot be computed without sampling; the text says why."""


class LinearOperator(ABC):
    """A real symmetric (P, P) matrix known by its products.

    `A @ v` takes (P,) or (P, K) tensors of the operator's dtype and device; `A + B`, `A - B`, `-A` and `c * A` are
    operators; `A.to_dense()` multiplies by the identity; `A.to_scipy()` speaks NumPy. `space` knows inner products
    of its vectors.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def _matmat(self, vectors: torch.Tensor) -> torch.Tensor:
        """The product with (P, K) vectors, whose columns had better be contiguous."""

    @property
    def space(self) -> VectorSpace:
        return VectorSpace(self.shape[0], self.dtype, self.device)

    def __matmul__(self, vectors: torch.Tensor) -> torch.Tensor:
        if not isinstance(vectors, torch.Tensor):
            raise TypeError(f"an operator multiplies torch tensors, not a {type(vectors).__name__}: use to_scipy() for NumPy")
        square = self.shape[0] == self.shape[1]  # others have whole vectors in one process
        size = self.space.local_size if square else self.shape[1]
        if vectors.dim() not in (1, 2) or vectors.shape[0] != size:
            raise ValueError(f"a vector of shape {tuple(vectors.shape)} for an operator of size {size}: pass (P,) or (P, K)")
        if vectors.dtype != self.dtype or vectors.device != self.device:
            raise ValueError(
                f"a vector of {vectors.dtype} on {vectors.device} for an operator of {self.dtype} on {self.device}"
            )
        vectors = vectors.detach()
        if vectors.dim() == 1:
            return self._matmat(vectors.unsqueeze(1)).squeeze(1)
        return self._matmat(vectors)

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The product with vectors kept as rows: (K, P) to (K, P)."""
        return (self @ rows.T).T

    def exact_trace(self) -> float:
        """The trace, free of sampling error, where the operator's structure gives it away; NotExactError elsewhere."""
        raise NotExactError("this operator knows no exact trace")

    def exact_diagonal(self) -> torch.Tensor:
        """The diagonal, (P,), free of sampling error, where the structure gives it away; NotExactError elsewhere."""
        raise NotExactError("this operator knows no exact diagonal")

    @property
    def T(self) -> "LinearOperator":  # noqa: N802  # torch's name for it
        """The transpose: itself."""
        return self

    def __add__(self, other: "LinearOperator") -> "LinearOperator":
        return Combination(self, 1.0, other, 1.0) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other: "LinearOperator") -> "LinearOperator":
        return Combination(self, 1.0, other, -1.0) if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, factor: float) -> "LinearOperator":
        return Combination(self, float(factor), None, 0.0)

    __rmul__ = __mul__

    def __neg__(self) -> "LinearOperator":
        return -1.0 * self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape[0]:,} x {self.shape[1]:,}, {self.dtype}, {self.device})"

    def to_dense(self) -> torch.Tensor:
        """The (P, P) matrix, some columns at a time."""
        dense = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        space = self.space
        for start in range(0, self.shape[1], _DENSE_COLUMNS):
            stop = min(start + _DENSE_COLUMNS, self.shape[1])
            columns = torch.zeros(stop - start, self.shape[1], dtype=self.dtype, device=self.device)
            columns.diagonal(start).fill_(1)
            dense[:, start:stop] = space.whole(self.rows(space.part(columns))).T
        return dense

    def to_scipy(self, dtype: type = np.float64) -> ScipyOperator:
        """A scipy.sparse.linalg.LinearOperator; products are computed in the operator's own precision."""

        def product(operator: LinearOperator, vectors: np.ndarray) -> np.ndarray:
            converted = torch.as_tensor(vectors, dtype=self.dtype, device=self.device)
            return (operator @ converted).cpu().to(torch.float64).numpy().astype(dtype)

        forth, back = partial(product, self), partial(product, self.T)
        return ScipyOperator(self.shape, matvec=forth, matmat=forth, rmatvec=back, rmatmat=back, dtype=dtype)


class Combination(LinearOperator):
    """a A + b B."""

    def __init__(self, left: LinearOperator, left_factor: float, right: LinearOperator | None, right_factor: float) -> None:
        if right is not None and right.shape != left.shape:
            raise ValueError(f"cannot add operators of shapes {left.shape} and {right.shape}")
        if right is not None and (right.dtype, right.device) != (left.dtype, left.device):
            raise ValueError(f"cannot add operators of {left.dtype} on {left.device} and {right.dtype} on {right.device}")
        self.shape, self.dtype, self.device = left.shape, left.dtype, left.device
        self._left, self._left_factor = left, left_factor
        self._right, self._right_factor = right, right_factor

    @property
    def space(self) -> VectorSpace:
        return self._left.space

    def _matmat(self, vectors: torch.Tensor) -> torch.Tensor:
        product = self._left_factor * (self._left @ vectors)
        if self._right is not None:
            product = product.add(self._right @ vectors, alpha=self._right_factor)
        return product


class Dense(LinearOperator):
    """A symmetric matrix that is already at hand, (P, P), as an operator.

    >>> import torch, hessian
    >>> A = 2 * hessian.Dense(torch.diag(torch.tensor([1.0, 2.0]))) - hessian.Dense(torch.eye(2))
    >>> A @ torch.ones(2)
    tensor([1., 3.])
    """

    def __init__(self, matrix: torch.Tensor) -> None:
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.is_floating_point():
            raise ValueError(f"a {matrix.dtype} matrix of shape {tuple(matrix.shape)}: pass a real square one")
        self.matrix = matrix.detach()
        self.shape, self.dtype, self.device = (len(matrix), len(matrix)), matrix.dtype, matrix.device

    def _matmat(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.matrix @ vectors
