"""The loss of a model over a data set: the only place that touches batches, weighting and model calls."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset, Subset

LossFunction = Callable[[Any, Any], torch.Tensor]
Data = Iterable[Any]


class Objective:
    r"""The mean loss over all items of the data, whatever the batches they come in.

    .. math:: L(\theta) = \sum_b w_b \, \ell(f_\theta(x_b), y_b) \big/ \sum_b w_b

    `data` is one batch (a tuple or list of two tensors) or something that yields batches anew each time it is
    iterated. `w_b` counts what `loss` averages over: examples; for a `torch.nn` loss with `ignore_index` the valid
    targets, with class weights their sum; nothing (a plain sum) where `reduction="sum"`.

    `forward(model, batch)` returns the outputs where a batch is not `(inputs, targets)`; targets are then
    `batch[1]` of a pair, or the batch itself. `items(batch)` returns `w_b` where the rules above do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        data: Data,
        *,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        items: Callable[[Any], float] | None = None,
    ) -> None:
        if isinstance(data, Iterator):
            raise ValueError(
                "`data` is an iterator and would be empty on the second pass: pass a list of batches, a DataLoader, "
                "or one (inputs, targets) batch"
            )
        self.model = model
        self.loss = loss
        self.data = [data] if isinstance(data, Mapping) or _is_one_batch(data) else data
        self.forward = forward
        self.items = items
        self._total_weight: float | None = None

    def batches(self) -> Iterator[Any]:
        """The batches, moved to the model's device; ValueError if there are none."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        count = 0
        for batch in self.data:
            count += 1
            if self.forward is None and not _is_pair(batch):
                raise TypeError(
                    f"a batch is a {type(batch).__name__}, not (inputs, targets): say how to call the model with "
                    "Objective(..., forward=lambda model, batch: ...)"
                )
            yield map_tensors(lambda tensor: tensor.to(device), batch)
        if count == 0:
            raise ValueError("the data is empty: there is no batch to compute a loss on")

    def outputs(self, batch: Any) -> Any:
        """The model's outputs on one batch."""
        if self.forward is not None:
            return self.forward(self.model, batch)
        return self.model(batch[0])

    def targets(self, batch: Any) -> Any:
        """What the loss compares the outputs with."""
        return batch[1] if _is_pair(batch) else batch

    def batch_loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        """The loss of one batch (a scalar), checked: targets in range, one value, finite."""
        targets = self.targets(batch)
        _check_classes(self.loss, outputs, targets)
        value = self.loss(outputs, targets)
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"the loss returned a {type(value).__name__}, not a tensor: do not call .item() in it")
        if value.numel() != 1:
            raise ValueError(f"the loss has shape {tuple(value.shape)}, not one value: use reduction='mean'")
        if not torch.isfinite(value):
            raise ValueError(self._why_not_finite(value, batch))
        return value.reshape(())

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
        if isinstance(self.loss, nn.CrossEntropyLoss | nn.NLLLoss) and classes:
            valid = targets[targets != self.loss.ignore_index]
            if self.loss.weight is not None:
                return float(self.loss.weight[valid].sum())
            return float(valid.numel())
        return float(_count_examples(batch))

    @property
    def is_sum(self) -> bool:
        """Whether the loss adds items up, so that batches are added too, not averaged."""
        return getattr(self.loss, "reduction", "mean") == "sum"

    def total_weight(self) -> float:
        """The sum of the batch weights, from one pass over the data, the first time; 1 for a loss that sums."""
        if self._total_weight is None:
            total = 1.0 if self.is_sum else sum(self.weight(batch) for batch in self.batches())
            if total <= 0:
                raise ValueError("no item of the data counts: batches are empty, or the loss ignores every target")
            self._total_weight = total
        return self._total_weight

    def weighted_batches(self) -> Iterator[tuple[Any, float]]:
        """Batches with weights that sum to one (or all 1 for a loss that sums)."""
        total = self.total_weight()
        for batch in self.batches():
            weight = self.weight(batch)
            if weight > 0:
                yield batch, weight / total

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Differentiate twice inside, whatever the caller's mode; buffers and the global random state come back as they were.

        Attention runs by its formula there: the fused kernels have no second derivative.
        """
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        state = torch.get_rng_state()
        try:
            with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            torch.set_rng_state(state)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

    def _why_not_finite(self, value: torch.Tensor, batch: Any) -> str:
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                return f"the loss is {value.item()}: {name!r} of the model holds NaN or Inf"
        for position, tensor in enumerate(_tensors(batch)):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                rows = (~torch.isfinite(tensor)).flatten(1).any(1) if tensor.dim() > 1 else ~torch.isfinite(tensor)
                first = int(rows.nonzero()[0])
                return (
                    f"the loss is {value.item()}: tensor {position} of a batch holds NaN or Inf, first in its "
                    f"example {first}; clean the data or drop the example"
                )
        return f"the loss is {value.item()} although weights and data are finite: the model or the loss overflows"


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


def _tensors(batch: Any) -> Iterator[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from _tensors(part)
    elif isinstance(batch, tuple | list):
        for part in batch:
            yield from _tensors(part)


def _count_examples(batch: Any) -> int:
    for tensor in _tensors(batch):
        if tensor.dim() > 0:
            return tensor.shape[0]
    raise ValueError(f"cannot count the examples of a {type(batch).__name__}: pass items=lambda batch: ...")


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], batch: Any) -> Any:
    """The batch with `function` applied to every tensor in it; dicts, tuples (named ones too) and lists are followed."""
    if isinstance(batch, torch.Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, part) for key, part in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [map_tensors(function, part) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def _check_classes(loss: LossFunction, outputs: Any, targets: Any) -> None:
    """Class targets out of range, before a kernel fails on them (or reads past its end)."""
    classification = isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) or loss in (
        nn.functional.cross_entropy,
        nn.functional.nll_loss,
    )
    if not classification or not isinstance(targets, torch.Tensor) or targets.is_floating_point():
        return
    classes = outputs.shape[1] if outputs.dim() > 1 else outputs.shape[0]
    valid = targets[targets != getattr(loss, "ignore_index", -100)]
    if valid.numel() and (int(valid.min()) < 0 or int(valid.max()) >= classes):
        wrong = int(valid.max()) if int(valid.max()) >= classes else int(valid.min())
        raise ValueError(f"target {wrong} is out of range: the model has {classes} outputs, so targets are 0 to {classes - 1}")
