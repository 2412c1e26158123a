r"""The loss over data of which every process of a group has a part.

.. math:: L(\theta) = \sum_r \sum_b \frac{w_{rb}}{\sum w} \, \ell(f_\theta(x_{rb}), y_{rb})

Whatever is a sum over batches is computed from this process's part and added up over all, one reduction a block of products;
random vectors are the first process's, so that every process takes the same decisions and gets the same results.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self, TypeVar

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from hessian.batch import count_examples, take_examples
from hessian.objective import Data, LossFunction, Objective
from hessian.space import Distribution, VectorSpace

_Value = TypeVar("_Value")
_Item = TypeVar("_Item")


class SharedSpace(VectorSpace):
    """Vectors of which every process of `group` has a copy."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device, group: ProcessGroup | None) -> None:
        super().__init__(size, dtype, device)
        self.group = group

    def random(
        self, count: int, distribution: Distribution = "rademacher", generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """As `VectorSpace.random`, the first process's on every one; generators advance on all of them."""
        rows = super().random(count, distribution, generator)
        distributed.broadcast(rows, group=self.group, group_src=0)
        return rows

    def least(self, number: float) -> float:
        return least_of_all(number, self.device, self.group)


def own_parts(batches: Iterable[Any], rank: int, ranks: int) -> list[Any]:
    """This process's examples of every batch; parts follow each other, differ by one example at most, and may be none."""
    found = []
    for batch in batches:
        count = count_examples(batch)
        start, stop = count * rank // ranks, count * (rank + 1) // ranks
        if start < stop:
            found.append(take_examples(batch, slice(start, stop)))
    return found


def least_of_all(number: float, device: torch.device, group: ProcessGroup | None) -> float:
    """The least of all processes' numbers."""
    found = torch.tensor(number, dtype=torch.float64, device=device)
    distributed.all_reduce(found, distributed.ReduceOp.MIN, group=group)
    return float(found)


class SplitObjective(Objective):
    """An Objective over all processes' data; `data` is this process's part, of any size, none included.

    whole: all of that data, where every process has a copy; `divided` makes such an objective. group: the processes that have
    parts, None for all. Collective: every process must make it, and do the same with it. An
    error in one process's part is raised on all.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss: LossFunction,
        data: Data,
        *,
        whole: Data | None = None,
        group: ProcessGroup | None = None,
        forward: Callable[[torch.nn.Module, Any], Any] | None = None,
        items: Callable[[Any], float] | None = None,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__(model, loss, data, forward=forward, items=items, micro_batch=micro_batch)
        self.whole, self.group = whole, group
        self.total_weight()  # now, on every process, so that errors in the data come at once

    def total_weight(self) -> float:
        """The sum of all processes' batch weights, found once; 1 for a loss that sums."""
        if self._total_weight is None:
            weights = self.gathered(lambda: sum(self.weight(batch) for batch in self.batches()))
            self._total_weight = 1.0 if self.is_sum else sum(weights)
            if self._total_weight <= 0:
                raise ValueError("no item of the data counts on any rank: batches are empty, or the loss ignores every target")
        return self._total_weight

    def batches(self) -> Iterator[Any]:
        """This process's batches, of which there may be none."""
        if next(iter(self.data), None) is not None:
            yield from super().batches()

    def weighted_batches(self) -> Iterator[tuple[Any, float]]:
        """TypeError: what knows nothing of other processes would take this one's part for the whole."""
        raise TypeError("this needs all data in one process: pass an Objective, not a SplitObjective")

    def whole_batches(self) -> Iterator[Any]:
        """All data, where this process has a copy; TypeError elsewhere."""
        if self.whole is None:
            raise TypeError("this needs all data in one process: pass an Objective, or `whole` to the SplitObjective")
        return Objective(self.model, self.loss, self.whole, forward=self.forward, micro_batch=self.micro_batch).batches()

    def over(self, data: Data, micro_batch: int | None = None) -> Self:
        """The same loss of the same model over other data, of which `data` is this process's part."""
        other = super().over(data, micro_batch)
        other.whole = None
        return other

    def over_whole(self, data: Data) -> Self:
        other = self.over(own_parts(data, distributed.get_rank(self.group), distributed.get_world_size(self.group)))
        other.whole = data
        return other

    def each(self, compute: Callable[[_Item], _Value], items: Iterable[_Item]) -> list[_Value]:
        """Every process iterates over all items, computes for its share, and gets all results. Small, picklable values."""
        rank, ranks = distributed.get_rank(self.group), distributed.get_world_size(self.group)
        parts = self.gathered(lambda: {place: compute(item) for place, item in enumerate(items) if place % ranks == rank})
        return [parts[place % ranks][place] for place in range(sum(map(len, parts)))]

    def seed(self, generator: torch.Generator | None) -> int:
        """The first process's; generators advance on all of them."""
        return self.gathered(lambda: Objective.seed(self, generator))[0]

    def space(self, size: int, dtype: torch.dtype, device: torch.device) -> VectorSpace:
        """Every process has whole vectors."""
        return SharedSpace(size, dtype, device, self.group)

    def gathered(self, compute: Callable[[], _Value]) -> list[_Value]:
        """What `compute` returns on every process, in the order of ranks. Small, picklable values."""
        value, failure = None, None
        try:
            value = compute()
        except Exception as error:
            failure = error
        everybody: list[Any] = [None] * distributed.get_world_size(self.group)
        distributed.all_gather_object(everybody, (value, None if failure is None else str(failure)), group=self.group)
        if failure is not None:
            raise failure
        for rank, (_, text) in enumerate(everybody):
            if text is not None:
                raise RuntimeError(f"rank {rank} failed: {text}")
        return [found for found, _ in everybody]

    def total(
        self,
        compute: Callable[[], torch.Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        expected: type[Exception] | None = None,
    ) -> torch.Tensor:
        """The sum of what `compute` returns over all processes, by one reduction that tells errors, too: `expected` is raised
        as itself on all, others as RuntimeError where they did not happen."""
        failure: Exception | None = None
        result = torch.zeros(tuple(shape), dtype=dtype, device=self.device)
        try:
            result = compute()
        except Exception as error:
            failure = error
        is_expected = expected is not None and isinstance(failure, expected)
        flags = result.new_tensor([float(is_expected), float(failure is not None and not is_expected)])
        packed = torch.cat([result.reshape(-1), flags])
        distributed.all_reduce(packed, group=self.group)
        found_expected, found_other = (packed[-2:] > 0).tolist()
        if failure is not None and (not found_other or not is_expected):
            raise failure
        if found_other:
            raise RuntimeError("the computation failed on another rank, whose own message says why")
        if found_expected and expected is not None:
            raise expected("found on another rank")
        return packed[:-2].reshape(tuple(shape))


def divided(model: torch.nn.Module, loss: LossFunction, batches: Data, world_size: int) -> Objective:
    """The loss over `batches`, of which every process has a copy; each of the default group takes its part of every batch.

    world_size: the number of processes; one needs no group.
    """
    if world_size == 1:
        return Objective(model, loss, batches)
    return SplitObjective(model, loss, own_parts(batches, distributed.get_rank(), world_size), whole=batches)
