"""Parts of a curvature matrix: off-diagonal pieces, and its diagonal blocks without the rest."""

from collections.abc import Sequence

import torch

from hessian.operators.base import LinearOperator
from hessian.operators.curvature import CurvatureOperator
from hessian.parameters import Selection, positions, select_parameters


class Submatrix(LinearOperator):
    """The rows and columns of an operator at the given positions; its `T` has them exchanged."""

    def __init__(self, operator: LinearOperator, rows: torch.Tensor, columns: torch.Tensor) -> None:
        self._operator, self._rows, self._columns = operator, rows, columns
        self.shape = (len(rows), len(columns))
        self.dtype, self.device = operator.dtype, operator.device

    @property
    def T(self) -> "Submatrix":  # noqa: N802  # torch's name for it
        return Submatrix(self._operator, self._columns, self._rows)

    def _matmat(self, vectors: torch.Tensor) -> torch.Tensor:
        embedded = vectors.new_zeros(vectors.shape[1], self._operator.shape[0])
        embedded[:, self._columns] = vectors.T
        return (self._operator @ embedded.T)[self._rows]


class BlockDiagonal(LinearOperator):
    """Some square operators one after the other, each at its own positions of the vectors; zero elsewhere."""

    def __init__(self, blocks: Sequence[LinearOperator], places: Sequence[torch.Tensor], size: int) -> None:
        self.blocks, self._places = list(blocks), list(places)
        self.shape = (size, size)
        self.dtype, self.device = self.blocks[0].dtype, self.blocks[0].device

    def _matmat(self, vectors: torch.Tensor) -> torch.Tensor:
        products = torch.zeros_like(vectors)
        for block, place in zip(self.blocks, self._places, strict=True):
            products[place] = block @ vectors[place]
        return products


def submatrix(operator: CurvatureOperator, rows: Selection, columns: Selection) -> Submatrix:
    """The derivatives between two groups of parameters, chosen by names or globs: (rows, columns), one product a column.

    >>> import torch, hessian
    >>> model, batch = torch.nn.Linear(2, 1), (torch.eye(2), torch.zeros(2, 1))
    >>> H = hessian.Hessian(model, torch.nn.MSELoss(), batch)
    >>> (hessian.submatrix(H, "weight", "bias") @ torch.ones(1)).flatten()
    tensor([1., 1.])
    """
    chosen = [positions(operator.parameters, _names(operator, selection)) for selection in (rows, columns)]
    return Submatrix(operator, *(place.to(operator.device) for place in chosen))


def block_diagonal(operator: CurvatureOperator, groups: Sequence[Selection] | None = None) -> BlockDiagonal:
    """The operator without what couples `groups` of parameters (globs), by default every tensor on its own.

    A product costs one product for each group. ValueError if a parameter is in two groups; those in none have zeros.

    >>> import torch, hessian
    >>> model, batch = torch.nn.Linear(1, 1), (torch.ones(1, 1), torch.zeros(1, 1))
    >>> H = hessian.Hessian(model, torch.nn.MSELoss(), batch)  # all entries are 2
    >>> hessian.block_diagonal(H).to_dense()
    tensor([[2., 0.],
            [0., 2.]])
    """
    chosen = [_names(operator, group) for group in (list(operator.parameters) if groups is None else groups)]
    seen: set[str] = set()
    for names in chosen:
        for name in names:
            if name in seen:
                raise ValueError(f"parameter {name!r} is in two blocks: make the groups disjoint")
            seen.add(name)
    places = [positions(operator.parameters, names).to(operator.device) for names in chosen]
    return BlockDiagonal([operator.block(names) for names in chosen], places, operator.shape[0])


def _names(operator: CurvatureOperator, selection: Selection) -> list[str]:
    names = list(select_parameters(operator.objective.model, selection))
    for name in names:
        if name not in operator.parameters:
            raise ValueError(f"parameter {name!r} is not among those of the operator")
    return names
