"""A matrix that you can only multiply by."""

from abc import ABC, abstractmethod

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator as ScipyOperator


class LinearOperator(ABC):
    """A real symmetric (P, P) matrix known by its products.

    `A @ v` takes (P,) or (P, K) tensors of the operator's dtype and device; `A + B`, `A - B` and `c * A` are
    operators; `A.to_dense()` multiplies by the identity; `A.to_scipy()` speaks float64 NumPy.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def _matmat(self, vectors: torch.Tensor) -> torch.Tensor:
        """The product with (P, K) vectors."""

    def __matmul__(self, vectors: torch.Tensor) -> torch.Tensor:
        size = self.shape[1]
        if vectors.dim() not in (1, 2) or vectors.shape[0] != size:
            raise ValueError(f"a vector of shape {tuple(vectors.shape)} for an operator of size {size}: pass (P,) or (P, K)")
        if vectors.dtype != self.dtype or vectors.device != self.device:
            raise ValueError(
                f"a vector of {vectors.dtype} on {vectors.device} for an operator of {self.dtype} on {self.device}"
            )
        if vectors.dim() == 1:
            return self._matmat(vectors.unsqueeze(1)).squeeze(1)
        return self._matmat(vectors)

    def __add__(self, other: "LinearOperator") -> "LinearOperator":
        return _Combination(self, 1.0, other, 1.0)

    def __sub__(self, other: "LinearOperator") -> "LinearOperator":
        return _Combination(self, 1.0, other, -1.0)

    def __mul__(self, factor: float) -> "LinearOperator":
        return _Combination(self, float(factor), None, 0.0)

    __rmul__ = __mul__

    def to_dense(self) -> torch.Tensor:
        """The (P, P) matrix, column by column."""
        return self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)

    def to_scipy(self) -> ScipyOperator:
        """A scipy.sparse.linalg.LinearOperator in float64."""

        def product(vectors: np.ndarray) -> np.ndarray:
            converted = torch.as_tensor(vectors, dtype=self.dtype, device=self.device)
            return (self @ converted).to("cpu", torch.float64).numpy()

        return ScipyOperator(self.shape, matvec=product, matmat=product, rmatvec=product, dtype=np.float64)


class _Combination(LinearOperator):
    """a A + b B."""

    def __init__(self, left: LinearOperator, left_factor: float, right: LinearOperator | None, right_factor: float) -> None:
        if right is not None and right.shape != left.shape:
            raise ValueError(f"cannot add operators of shapes {left.shape} and {right.shape}")
        self.shape, self.dtype, self.device = left.shape, left.dtype, left.device
        self._left, self._left_factor = left, left_factor
        self._right, self._right_factor = right, right_factor

    def _matmat(self, vectors: torch.Tensor) -> torch.Tensor:
        product = self._left_factor * (self._left @ vectors)
        if self._right is not None:
            product = product + self._right_factor * (self._right @ vectors)
        return product
