r"""Curvature of a model that several processes train: each holds a part of the data, and products are summed over all.

.. math:: H v = \sum_r \frac{W_r}{\sum W} H_r v

with W_r the items of rank r's part. Every rank passes the same vectors and gets the same product, one reduction a block of
vectors; estimators then take the same decisions everywhere, because random vectors are rank 0's on all ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hessian.estimators.exact_diagonal import gauss_newton_diagonal
from hessian.objective import Data, LossFunction, Objective
from hessian.operators.base import NotExactError
from hessian.operators.curvature import CurvatureOperator, NoSecondDerivativeError
from hessian.operators.gauss_newton import GaussNewton
from hessian.operators.hessian import Hessian
from hessian.parameters import Selection, flatten
from hessian.space import Distribution, VectorSpace

_OTHER_ERROR = 1024  # on the scale on which a missing second derivative is 1: more than there are ranks that see it


def hessian(
    model: nn.Module,
    loss: LossFunction,
    data: Data,
    params: Selection = None,
    *,
    group: ProcessGroup | None = None,
    micro_batch: int | None = None,
) -> Hessian:
    """The Hessian of the loss over all ranks' data; an operator like `hessian.Hessian`, the same on every rank.

    model: the same on every rank, plain or wrapped by DistributedDataParallel, whose group is then the default. data: this
    rank's part, of any size, weighted by items over all ranks. Collective: every rank must make the operator, and call
    what multiplies by it. An error on one rank is raised on all.
    """
    return _DataParallelHessian(_objective(model, loss, data, group, micro_batch), params=params)


def gauss_newton(
    model: nn.Module,
    loss: LossFunction,
    data: Data,
    params: Selection = None,
    *,
    group: ProcessGroup | None = None,
    micro_batch: int | None = None,
) -> GaussNewton:
    """The Gauss-Newton matrix of the loss over all ranks' data; otherwise as `hessian`."""
    return _DataParallelGaussNewton(_objective(model, loss, data, group, micro_batch), params=params)


class SharedSpace(VectorSpace):
    """Vectors of which every rank of `group` has a copy."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device, group: ProcessGroup | None) -> None:
        super().__init__(size, dtype, device)
        self.group = group

    def random(
        self, count: int, distribution: Distribution = "rademacher", generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """As `VectorSpace.random`, rank 0's on every rank; generators advance on all of them."""
        rows = super().random(count, distribution, generator)
        if distributed.is_initialized():
            distributed.broadcast(rows, group=self.group, group_src=0)
        return rows


class _PartOfData(Objective):
    """The objective over all ranks' data, of which `data` is this rank's part: its weights sum to this rank's share."""

    group: ProcessGroup | None = None

    def total_weight(self) -> float:
        """The sum of the batch weights of all ranks; 1 for a loss that sums."""
        if self.is_sum:
            return 1.0
        if self._total_weight is None:
            total = float(_added_up(self._own_weight, (1,), self, torch.float64))
            if total <= 0:
                raise ValueError("no item of the data counts on any rank: batches are empty, or the loss ignores every target")
            self._total_weight = total
        return self._total_weight

    def batches(self) -> Iterator[Any]:
        """This rank's batches, of which there may be none."""
        if not self.is_empty:
            yield from super().batches()

    @property
    def is_empty(self) -> bool:
        """Whether this rank has no batch."""
        return next(iter(self.data), None) is None

    def _own_weight(self) -> torch.Tensor:
        return torch.tensor([sum(self.weight(batch) for batch in self.batches())], dtype=torch.float64, device=self.device)


def _added_up(
    compute: Callable[[], torch.Tensor],
    shape: Sequence[int],
    objective: _PartOfData,
    dtype: torch.dtype,
    expected: type[Exception] | None = None,
) -> torch.Tensor:
    """The sum of what `compute` returns over all ranks, in one reduction that also tells errors: one that is raised on any
    rank is raised on all, `expected` as itself, others as RuntimeError on ranks that did not have them."""
    failure: Exception | None = None
    result = torch.zeros(tuple(shape), dtype=dtype, device=objective.device)
    try:
        result = compute()
    except Exception as error:
        failure = error
    code = 0 if failure is None else 1 if expected is not None and isinstance(failure, expected) else _OTHER_ERROR
    packed = torch.cat([result.reshape(-1), result.new_tensor([code])])
    if distributed.is_initialized():
        distributed.all_reduce(packed, group=objective.group)
    worst = float(packed[-1])
    if failure is not None and (worst < _OTHER_ERROR or code == _OTHER_ERROR):
        raise failure
    if worst >= _OTHER_ERROR:
        raise RuntimeError("the computation failed on another rank, whose own message says why")
    if worst > 0 and expected is not None:
        raise expected("found on another rank")
    return packed[:-1].reshape(tuple(shape))


class _DataParallel(CurvatureOperator):
    """What is summed over ranks."""

    @property
    def part(self) -> _PartOfData:
        """The objective."""
        assert isinstance(self.objective, _PartOfData)
        return self.objective

    @property
    def space(self) -> VectorSpace:
        return SharedSpace(self.shape[0], self.dtype, self.device, self.part.group)

    def loss_and_gradient(self) -> tuple[float, torch.Tensor]:
        """The loss over all data and its gradient, (P,)."""
        own = 0.0

        def compute() -> torch.Tensor:
            nonlocal own
            own, gradient = super(_DataParallel, self).loss_and_gradient()
            return gradient

        gradient = _added_up(compute, self.shape[:1], self.part, self.dtype)
        value = _added_up(lambda: torch.tensor([own], dtype=torch.float64), (1,), self.part, torch.float64)
        return float(value), gradient

    def exact_trace(self) -> float:
        """As the class that this is mixed into has it, over all data."""

        def compute() -> torch.Tensor:
            own = 0.0 if self.part.is_empty else super(_DataParallel, self).exact_trace()
            return torch.tensor([own], dtype=torch.float64, device=self.device)

        return float(_added_up(compute, (1,), self.part, torch.float64, NotExactError))

    def exact_diagonal(self) -> torch.Tensor:
        """As the class that this is mixed into has it, over all data."""

        def compute() -> torch.Tensor:
            if self.part.is_empty:
                return torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
            diagonal = gauss_newton_diagonal(self.objective, self.parameters)
            return flatten([diagonal[name] for name in self.parameters])

        self.exact_trace()  # under whose condition it is the diagonal
        return _added_up(compute, self.shape[:1], self.part, self.dtype, NotExactError)

    def _products(self, rows: torch.Tensor) -> torch.Tensor:
        def compute() -> torch.Tensor:
            return super(_DataParallel, self)._products(rows)

        return _added_up(compute, rows.shape, self.part, self.dtype, NoSecondDerivativeError)

    def _check_memory(self) -> None:
        def compute() -> torch.Tensor:
            if not self.part.is_empty:
                super(_DataParallel, self)._check_memory()
            return torch.zeros(1, device=self.device)

        if not self._source.fits:
            _added_up(compute, (1,), self.part, torch.float32, MemoryError)
            self._source.fits = True


class _DataParallelHessian(_DataParallel, Hessian):
    pass


class _DataParallelGaussNewton(_DataParallel, GaussNewton):
    pass


def _objective(
    model: nn.Module, loss: LossFunction, data: Data, group: ProcessGroup | None, micro_batch: int | None
) -> _PartOfData:
    if isinstance(model, DistributedDataParallel):
        group, model = group or model.process_group, model.module
    sharded = next((name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)), None)
    if sharded is not None:
        raise TypeError(f"parameter {sharded!r} is sharded: only models that are whole on every rank are supported so far")
    objective = _PartOfData(model, loss, data, micro_batch=micro_batch)
    objective.group = group
    objective.total_weight()  # now, on every rank, so that errors in the data come at once
    return objective
