"""Vectors in parts: what an estimator keeps, and what it needs of memory, is divided among the ranks of a group."""

from collections.abc import Callable, Mapping

import torch
from torch import distributed, nn
from torch.distributed import ProcessGroup

from hessian.objective import Objective
from hessian.operators.base import LinearOperator
from hessian.operators.curvature import CurvatureOperator
from hessian.parameters import Selection
from hessian.space import Distribution, VectorSpace
from hessian.split_data import least_of_all


class ShardedSpace(VectorSpace):
    """Vectors whose entries are divided among the ranks of `group`.

    positions: (local_size,), where this rank's entries are in the whole vector. copies: (local_size,), on how many ranks
    each of them is; None where it is on this one alone. drawn_by: the ranks whose random vectors are the same, `group` among
    them; its first rank draws.
    """

    def __init__(
        self,
        size: int,
        positions: torch.Tensor,
        copies: torch.Tensor | None,
        dtype: torch.dtype,
        group: ProcessGroup | None,
        drawn_by: ProcessGroup | None = None,
    ) -> None:
        super().__init__(size, dtype, positions.device)
        self.positions, self.group, self.drawn_by = positions, group, drawn_by
        self._weights = None if copies is None else copies.to(dtype).reciprocal()

    @property
    def local_size(self) -> int:
        return len(self.positions)

    def gram(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """As `VectorSpace.gram`, every entry counted once."""
        return super().gram(self._counted_once(left), right)

    def inner(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """As `VectorSpace.inner`, every entry counted once."""
        return super().inner(self._counted_once(left), right)

    def random(
        self, count: int, distribution: Distribution = "rademacher", generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """This rank's part of the whole vectors that rank 0 would draw alone."""
        whole = VectorSpace(self.size, self.dtype, self.device).random(count, distribution, generator)
        distributed.broadcast(whole, group=self.drawn_by, group_src=0)
        return self.part(whole)

    def reduce(self, numbers: torch.Tensor) -> torch.Tensor:
        total = numbers.to(self.device)
        distributed.all_reduce(total, group=self.group)
        return total.cpu()

    def least(self, number: float) -> float:
        return least_of_all(number, self.device, self.group)

    def part(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, self.positions]

    def whole(self, rows: torch.Tensor) -> torch.Tensor:
        ranks = distributed.get_world_size(self.group)
        sizes = [torch.zeros((), dtype=torch.int64, device=self.device) for _ in range(ranks)]
        distributed.all_gather(sizes, torch.tensor(self.local_size, device=self.device), group=self.group)
        most = max(int(size) for size in sizes)
        result = rows.new_empty(len(rows), self.size)
        for values, positions, size in zip(
            self._everybody(rows, most), self._everybody(self.positions[None], most), sizes, strict=True
        ):
            result[:, positions[0, : int(size)]] = values[:, : int(size)]
        return result

    def _everybody(self, rows: torch.Tensor, width: int) -> list[torch.Tensor]:
        """All ranks' rows, each padded to `width`."""
        padded = torch.nn.functional.pad(rows, (0, width - rows.shape[1]))
        found = [torch.empty_like(padded) for _ in range(distributed.get_world_size(self.group))]
        distributed.all_gather(found, padded.contiguous(), group=self.group)
        return found

    def _counted_once(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self._weights is None else rows * self._weights.to(rows)


class ShardedVectors(LinearOperator):
    """A curvature operator of all ranks' data whose vectors are divided evenly among the ranks of `group`.

    A product gathers its vector, multiplies, and keeps this rank's part: the memory of a basis of m vectors falls from m P to
    m P / ranks, and whole vectors exist during a product alone. prepare: called on every rank before each product.
    """

    def __init__(
        self,
        operator: CurvatureOperator,
        group: ProcessGroup | None = None,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self.operator, self.group, self._prepare = operator, group, prepare
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device
        rank, ranks, size = distributed.get_rank(group), distributed.get_world_size(group), self.shape[0]
        positions = torch.arange(size * rank // ranks, size * (rank + 1) // ranks, device=self.device)
        self._space = ShardedSpace(size, positions, None, self.dtype, group, group)

    @property
    def space(self) -> VectorSpace:
        return self._space

    @property
    def objective(self) -> Objective:
        """The loss over all ranks' data."""
        return self.operator.objective

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Whole, by name, in the order of the vectors' coordinates: of FSDP2 gathered copies."""
        return self.operator.parameters

    def block(self, params: Selection) -> "ShardedVectors":
        """The diagonal block of the parameters that `params` chooses."""
        return ShardedVectors(self.operator.block(params), self.group, self._prepare)

    def gradient(self) -> torch.Tensor:
        """This rank's part of the gradient."""
        self._prepare()
        return self._space.part(self.operator.gradient()[None])[0]

    def loss_and_gradient(self) -> tuple[float, torch.Tensor]:
        """The loss and this rank's part of its gradient."""
        self._prepare()
        value, gradient = self.operator.loss_and_gradient()
        return value, self._space.part(gradient[None])[0]

    def loss_value(self) -> float:
        """The loss at the parameters' current values, which may be infinite."""
        self._prepare()
        return self.operator.loss_value()

    def exact_trace(self) -> float:
        self._prepare()
        return self.operator.exact_trace()

    def exact_diagonal(self) -> torch.Tensor:
        """This rank's part of the diagonal."""
        self._prepare()
        return self._space.part(self.operator.exact_diagonal()[None])[0]

    def _matmat(self, vectors: torch.Tensor) -> torch.Tensor:
        self._prepare()
        whole = self._space.whole(vectors.T.contiguous())
        return self._space.part(self.operator.rows(whole)).T
