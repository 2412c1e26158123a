"""Matrices with known spectra, and an operator that records its products."""

import torch

from hessian.operators.base import Dense


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def rotated(eigenvalues: torch.Tensor, number: int = 0) -> torch.Tensor:
    """A dense float64 matrix with these eigenvalues and random eigenvectors."""
    basis = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64, generator=seed(number)))[0]
    matrix = (basis * eigenvalues.double()) @ basis.T
    return (matrix + matrix.T) / 2


def outliers_and_bulk(size: int = 1000) -> torch.Tensor:
    """Like a network's: a bulk around 0 (a semicircle), a tail, four outliers."""
    bulk = torch.linspace(-1, 1, size - 24, dtype=torch.float64)
    tail = torch.logspace(0, 1, 20, dtype=torch.float64)
    return torch.cat([bulk.sign() * (1 - (1 - bulk.abs()) ** 0.66), tail, torch.tensor([20.0, 35, 60, 100]).double()])


class Recording(Dense):
    """Remembers the blocks it was multiplied by."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__(matrix)
        self.blocks: list[torch.Tensor] = []

    def _matmat(self, vectors: torch.Tensor) -> torch.Tensor:
        self.blocks.append(vectors.T.clone())
        return super()._matmat(vectors)

    @property
    def probes(self) -> torch.Tensor:
        return self.blocks[0].double()


CASES = {
    "one": torch.tensor([[3.0]]),
    "zero": torch.zeros(7, 7),
    "identity": torch.eye(9),
    "two": torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
    "low rank": rotated(torch.tensor([5.0, 3.0, -2.0] + [0.0] * 57)),
    "clusters": rotated(torch.tensor([1.0, 1.0, -4.0, 2.5]).repeat(20)),
    "full": rotated(torch.linspace(-1, 2, 50)),
}
