"""The loss of a model over a data set: the only place that touches batches, weighting and model calls."""

import contextlib
import copy
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset, Subset

from hessian.arguments import check_arguments, not_a_pair, nothing
from hessian.batch import count_examples, map_tensors, split_batch, tensors_of
from hessian.diagnosis import check_classes, class_weight, explained_forward, explained_loss
from hessian.space import VectorSpace
from hessian.torch_losses import is_classification, loss_setting

_Value = TypeVar("_Value")
_Item = TypeVar("_Item")

LossFunction = Callable[[Any, Any], torch.Tensor]
Data = Iterable[Any]


class LossNotFiniteError(ValueError):
    """A batch's loss is NaN or infinite; the text says what seems to be why."""


class Objective:
    r"""The mean loss over all items of the data, whatever the batches they come in.

    .. math:: L(\theta) = \sum_b w_b \, \ell(f_\theta(x_b), y_b) \big/ \sum_b w_b

    `data` is one batch (a tuple or list of two tensors) or something that yields batches anew each time it is
    iterated. `w_b` counts what `loss` averages over: examples; for a `torch.nn` loss with `ignore_index` the valid
    targets, with class weights their sum; nothing (a plain sum) where `reduction="sum"`.

    `forward(model, batch)` returns the outputs where a batch is not `(inputs, targets)`; targets are then
    `batch[1]` of a pair, or the batch itself. `items(batch)` returns `w_b` where the rules above do not fit.
    `micro_batch`: at most so many examples at a time; batches are cut along the first dimension of their tensors.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        data: Data,
        *,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        items: Callable[[Any], float] | None = None,
        micro_batch: int | None = None,
    ) -> None:
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro_batch={micro_batch}: give a number of examples, at least 1, or None")
        check_arguments(model, loss, data)
        self.model = model
        self.loss = loss
        self.data = [data] if isinstance(data, Mapping) or _is_one_batch(data) else data
        self.forward = forward
        self.items = items
        self.micro_batch = micro_batch
        self._total_weight: float | None = None
        self._latest: tuple[int, weakref.ref[torch.Tensor]] | None = None  # batch's number and first tensor, for messages

    @property
    def device(self) -> torch.device:
        """Where the model is, and batches go."""
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    @property
    def runs_alone(self) -> bool:
        """Whether this process can pass a batch without the others'."""
        return True

    @property
    def is_one_batch(self) -> bool:
        """Whether the data is one batch, handled whole."""
        return isinstance(self.data, list | tuple) and len(self.data) == 1 and self.micro_batch is None

    def batches(self) -> Iterator[Any]:
        """The batches, moved to the model's device, cut into micro-batches; ValueError if there are none."""
        device = self.device
        number = -1
        for number, batch in enumerate(self.data):
            if self.forward is None and not _is_pair(batch):
                raise TypeError(not_a_pair(batch, self.data))
            for piece in [batch] if self.micro_batch is None else split_batch(batch, self.micro_batch):
                moved = map_tensors(lambda tensor: tensor.to(device), piece)
                first = next(tensors_of(moved), None)
                self._latest = None if first is None else (number, weakref.ref(first))
                yield moved
        if number < 0:
            raise ValueError(nothing(self.data, passed_before=self._total_weight is not None))

    def outputs(self, batch: Any) -> Any:
        """The model's outputs on one batch."""
        if self.forward is not None:
            with explained_forward(self.model, batch, self._where(batch), own_call=True):
                return self.forward(self.model, batch)
        with explained_forward(self.model, batch[0], self._where(batch)):
            return self.model(batch[0])

    def targets(self, batch: Any) -> Any:
        """What the loss compares the outputs with."""
        return batch[1] if _is_pair(batch) else batch

    def batch_loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        """The loss of one batch (a scalar), checked: targets in range, one value, finite."""
        check_classes(self.loss, outputs, self.targets(batch))
        value = self.loss_of(outputs, batch)
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"the loss returned a {type(value).__name__}, not a tensor: do not call .item() in it")
        if value.numel() != 1:
            raise ValueError(f"the loss has shape {tuple(value.shape)}, not one value: use reduction='mean'")
        if not torch.isfinite(value):
            raise LossNotFiniteError(self._why_not_finite(value, batch))
        return value.reshape(())

    def loss_of(self, outputs: Any, batch: Any) -> Any:
        """What the loss returns for one batch, whatever that is."""
        return explained_loss(self.loss, outputs, self.targets(batch), self._where(batch))

    def _where(self, batch: Any) -> str:
        """Which of the data a batch is, for messages; empty where there is one, or it is not known."""
        if self._latest is None or self.is_one_batch or self._latest[1]() is not next(tensors_of(batch), None):
            return ""
        return f" of batch {self._latest[0]}"

    def weight(self, batch: Any) -> float:
        """How much the batch's loss counts in the whole: w_b above, 1 for a loss that sums."""
        value = 1.0 if self.is_sum else self._count(batch)
        if not 0 <= value < math.inf:
            raise ValueError(f"a batch counts {value} items: items must return a finite number, at least 0")
        return value

    def _count(self, batch: Any) -> float:
        if self.items is not None:
            return float(self.items(batch))
        targets = self.targets(batch)
        classes = isinstance(targets, torch.Tensor) and not targets.is_floating_point()
        if is_classification(self.loss) and classes:
            return class_weight(self.loss, targets)
        return float(count_examples(batch))

    @property
    def is_sum(self) -> bool:
        """Whether the loss adds items up, so that batches are added too, not averaged."""
        return loss_setting(self.loss, "reduction", "mean") == "sum"

    def total_weight(self) -> float:
        """The sum of the batch weights, from one pass over the data, the first time; 1 for a loss that sums."""
        if self._total_weight is not None:
            return self._total_weight
        total = 1.0 if self.is_sum else sum(self.weight(batch) for batch in self.batches())
        if total <= 0:
            raise ValueError("no item of the data counts: batches are empty, or the loss ignores every target")
        if not self.is_one_batch:  # whose weight costs nothing and may change with the loss's
            self._total_weight = total
        return total

    def weighted_batches(self) -> Iterator[tuple[Any, float]]:
        """Batches with weights that sum to one (or all 1 for a loss that sums)."""
        return self.own_batches()

    def own_batches(self) -> Iterator[tuple[Any, float]]:
        """This process's part of `weighted_batches`, which is all of them here: sums over them are this process's part of the
        whole, to be added up by `total` or `gathered` (see `hessian.split_data`)."""
        total = self.total_weight()
        for batch in self.batches():
            weight = self.weight(batch)
            if weight > 0:
                yield batch, weight / total

    def total(
        self,
        compute: Callable[[], torch.Tensor],
        shape: Sequence[int],  # noqa: ARG002  # for processes whose part fails
        dtype: torch.dtype,  # noqa: ARG002
        expected: type[Exception] | None = None,  # noqa: ARG002
    ) -> torch.Tensor:
        """The sum of what `compute` returns, of `shape` and `dtype`, over all processes that hold data; here there is one."""
        return compute()

    def gathered(self, compute: Callable[[], _Value]) -> list[_Value]:
        """What `compute` returns on every process that holds data; here there is one."""
        return [compute()]

    def whole_batches(self) -> Iterator[Any]:
        """The batches of all processes that hold data, of which this process must have a copy; here they are all its own."""
        return self.batches()

    def each(self, compute: Callable[[_Item], _Value], items: Iterable[_Item]) -> list[_Value]:
        """What `compute` returns for every item, in order; the processes that hold data share the items, here there is one."""
        return [compute(item) for item in items]

    def seed(self, generator: torch.Generator | None) -> int:
        """A random seed, the same on all processes that hold data."""
        return int(torch.randint(2**62, (), generator=generator, device="cpu" if generator is None else generator.device))

    def space(self, size: int, dtype: torch.dtype, device: torch.device) -> VectorSpace:
        """The space of vectors in the parameters of an operator of this objective."""
        return VectorSpace(size, dtype, device)

    def over(self, data: Data, micro_batch: int | None = None) -> Self:
        """The same loss of the same model over other data."""
        other = copy.copy(self)
        other.data, other.micro_batch, other._total_weight = data, micro_batch, None
        return other

    def over_whole(self, data: Data) -> Self:
        """The same loss of the same model over other data, of which every process has a copy."""
        return self.over(data)

    def of(self, model: nn.Module) -> Self:
        """The same loss over the same data, of another model."""
        other = copy.copy(self)
        other.model = model
        return other

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Differentiate twice inside, whatever the caller's mode; buffers and the global random state come back as they were.

        Attention runs by its formula there: the fused kernels have no second derivative.
        """
        buffers = [
            (module, name, buffer, buffer.clone())
            for module in self.model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            try:
                with sdpa_kernel(SDPBackend.MATH), _checkpoints_without_reentry():
                    yield
            finally:
                with torch.no_grad():
                    for module, name, buffer, before in buffers:
                        module._buffers[name] = buffer  # some modules put another tensor in its place
                        if not torch.equal(buffer, before):  # writing anyway would spoil graphs that are kept
                            buffer.copy_(before)

    def _why_not_finite(self, value: torch.Tensor, batch: Any) -> str:
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                return f"the loss is {value.item()}: {name!r} of the model holds NaN or Inf"
        for position, tensor in enumerate(tensors_of(batch)):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                rows = (~torch.isfinite(tensor)).flatten(1).any(1) if tensor.dim() > 1 else ~torch.isfinite(tensor)
                first = int(rows.nonzero()[0])
                return (
                    f"the loss is {value.item()}: tensor {position} of a batch holds NaN or Inf, first in its "
                    f"example {first}; clean the data or drop the example"
                )
        return f"the loss is {value.item()} although weights and data are finite: the model or the loss overflows"


def _checkpoints_without_reentry() -> contextlib.AbstractContextManager[Any]:
    """Gradient checkpoints of the reentrant kind, which `torch.autograd.grad` refuses, run as those of the other kind."""

    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)

    return mock.patch.object(torch.utils.checkpoint.CheckpointFunction, "apply", apply)


def batches_of(
    dataset: Dataset[Any], batch_size: int, *, size: int | None = None, generator: torch.Generator | None = None
) -> DataLoader[Any]:
    """Re-iterable batches of a map-style dataset; with `size`, of a random subset of that many examples.

    Iterating leaves the global random state as it was; drawing the subset advances `generator` (or the global one).
    """
    count = len(dataset)  # type: ignore[arg-type]  # map-style datasets have a length
    if size is not None and size < count:
        chosen = torch.randperm(count, generator=generator)[:size]
        dataset = Subset(dataset, chosen.tolist())
    return DataLoader(dataset, batch_size=batch_size, generator=torch.Generator())


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, tuple | list) and len(batch) == 2


def _is_one_batch(data: Any) -> bool:
    return _is_pair(data) and all(isinstance(part, torch.Tensor) for part in data)
