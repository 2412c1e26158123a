r"""Block diagonal matrices whose blocks are kept in Kronecker-factored eigenbases.

A block is :math:`(U_L \otimes U_R)\, \mathrm{diag}(S)\, (U_L \otimes U_R)^\top` with small orthogonal U_L and U_R. A Kronecker
product of two matrices has the outer product of their eigenvalues for S; a dense matrix is the case of a 1 x 1 left factor. To
shift or to invert such a matrix is to shift or to invert S.
"""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from hessian.operators.base import LinearOperator


@dataclass(frozen=True)
class KroneckerBlock:
    """One diagonal block, itself made of G equal-sized ones for the groups of a grouped layer: a (G * R * C, ...) square.

    left: (G, R, R) orthogonal; right: (G, C, C) orthogonal; values: (G, R, C), the eigenvalues S. Coordinates are those of
    a (G, R, C) tensor.
    """

    left: torch.Tensor
    right: torch.Tensor
    values: torch.Tensor

    @property
    def size(self) -> int:
        return self.values.numel()

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """The product with vectors kept as rows: (K, G * R * C) to the same, in the block's own precision."""
        tensors = rows.reshape(-1, *self.values.shape).to(self.values.dtype)
        rotated = torch.einsum("gai,kgab,gbj->kgij", self.left, tensors, self.right) * self.values
        return torch.einsum("gia,kgab,gjb->kgij", self.left, rotated, self.right).reshape(rows.shape).to(rows.dtype)

    def diagonal(self) -> torch.Tensor:
        """The block's diagonal, (G * R * C,)."""
        return torch.einsum("gia,gab,gjb->gij", self.left.square(), self.values, self.right.square()).flatten()

    def with_values(self, values: torch.Tensor) -> "KroneckerBlock":
        return KroneckerBlock(self.left, self.right, values)


def eigenbasis(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues (G, R), ascending, none below zero, and eigenvectors (G, R, R) of positive semi-definite (G, R, R) matrices.

    They are computed in float64 on the CPU and returned in the matrices' precision and place.
    """
    values, vectors = torch.linalg.eigh(matrices.to("cpu", torch.float64))
    return values.clamp_min(0).to(matrices), vectors.to(matrices)


def kronecker_product(left: torch.Tensor, right: torch.Tensor) -> KroneckerBlock:
    """The block of :math:`L_g \\otimes R_g` for positive semi-definite (G, R, R) and (G, C, C) matrices."""
    (left_values, left_vectors), (right_values, right_vectors) = eigenbasis(left), eigenbasis(right)
    return KroneckerBlock(left_vectors, right_vectors, torch.einsum("gi,gj->gij", left_values, right_values))


def dense_block(matrix: torch.Tensor) -> KroneckerBlock:
    """The block of one positive semi-definite (C, C) matrix."""
    return kronecker_product(matrix.new_ones(1, 1, 1), matrix.unsqueeze(0))


def zero_block(size: int, like: torch.Tensor) -> KroneckerBlock:
    """A (size, size) block of zeros, of the precision and in the place of `like`."""
    return KroneckerBlock(*(torch.ones(size, 1, 1, dtype=like.dtype, device=like.device),) * 2, like.new_zeros(size, 1, 1))


class KroneckerOperator(LinearOperator):
    """A block diagonal matrix of named Kronecker blocks, in the order of their coordinates."""

    def __init__(self, blocks: Mapping[str, KroneckerBlock], dtype: torch.dtype) -> None:
        self.blocks = dict(blocks)
        size = sum(block.size for block in self.blocks.values())
        self.shape, self.dtype = (size, size), dtype
        self.device = next(iter(self.blocks.values())).values.device

    def block(self, names: str | Sequence[str]) -> "KroneckerOperator":
        """The diagonal block of the parameters that `names` (names, globs) chooses; ValueError for one that matches nothing."""
        patterns = [names] if isinstance(names, str) else list(names)
        for pattern in patterns:
            if not fnmatch.filter(self.blocks, pattern):
                raise ValueError(f"no parameter of this operator matches {pattern!r}: it has {', '.join(self.blocks)}")
        chosen = [name for name in self.blocks if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        return KroneckerOperator({name: self.blocks[name] for name in chosen}, self.dtype)

    def damped(self, damping: float) -> "KroneckerOperator":
        r""":math:`K + \lambda I`, whose every product costs what one with K does."""
        return self._with(lambda values: values + damping)

    def inverse(self, damping: float = 1e-3) -> "KroneckerOperator":
        r""":math:`(K + \lambda I)^{-1}` for `damping` :math:`\lambda`, exactly: S becomes :math:`1 / (S + \lambda)`.

        This is not the factored damping of Martens & Grosse (2015, section 6.3), which approximates it. ValueError if an
        eigenvalue of :math:`K + \lambda I` is not positive.
        """
        for name, block in self.blocks.items():
            smallest = float(block.values.min())
            if not smallest + damping > 0:
                raise ValueError(
                    f"the block of {name!r} has an eigenvalue of {smallest:.3g}, which with damping={damping:g} has no "
                    "inverse: give a positive damping"
                )
        return self._with(lambda values: (values + damping).reciprocal())

    def exact_trace(self) -> float:
        """The sum of the eigenvalues, in float64."""
        return sum(float(block.values.sum(dtype=torch.float64)) for block in self.blocks.values())

    def exact_diagonal(self) -> torch.Tensor:
        """The diagonal, (P,)."""
        return torch.cat([block.diagonal() for block in self.blocks.values()]).to(self.dtype)

    @property
    def eigenvalues(self) -> torch.Tensor:
        """All P eigenvalues, descending."""
        return torch.cat([block.values.flatten() for block in self.blocks.values()]).sort(descending=True).values

    def _with(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "KroneckerOperator":
        """The operator with the same eigenvectors and changed eigenvalues."""
        blocks = {name: block.with_values(function(block.values)) for name, block in self.blocks.items()}
        return KroneckerOperator(blocks, self.dtype)

    def _matmat(self, vectors: torch.Tensor) -> torch.Tensor:
        pieces = vectors.T.split([block.size for block in self.blocks.values()], dim=1)
        return torch.cat([block.multiply(piece) for block, piece in zip(self.blocks.values(), pieces, strict=True)], dim=1).T
