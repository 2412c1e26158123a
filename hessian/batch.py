"""What is in a batch: tensors, by themselves or in tuples, lists, dicts and dataclasses."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch


def tensors_of(batch: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a batch or in a model's outputs; dicts, tuples, lists and dataclasses are followed."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from tensors_of(part)
    elif isinstance(batch, tuple | list):
        for part in batch:
            yield from tensors_of(part)
    elif _is_dataclass(batch):
        for field in dataclasses.fields(batch):
            yield from tensors_of(getattr(batch, field.name))


def count_examples(batch: Any) -> int:
    """The length of the first tensor that has one; ValueError if none has."""
    for tensor in tensors_of(batch):
        if tensor.dim() > 0:
            return tensor.shape[0]
    raise ValueError(f"cannot count the examples of a {type(batch).__name__}: pass items=lambda batch: ...")


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], batch: Any) -> Any:
    """The batch with `function` applied to every tensor in it, otherwise of the same types."""
    if isinstance(batch, torch.Tensor):
        return function(batch)
    if _is_dataclass(batch):
        parts = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **{name: map_tensors(function, part) for name, part in parts.items()})
    if isinstance(batch, MutableMapping):
        mapped = copy.copy(batch)
        for key, part in batch.items():
            mapped[key] = map_tensors(function, part)
        return mapped
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, part) for key, part in batch.items()}
    if isinstance(batch, tuple | list):
        items = [map_tensors(function, part) for part in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch


def split_batch(batch: Any, size: int) -> Iterator[Any]:
    """The batch in pieces of `size` examples: tensors as long as the batch are cut, everything else is shared."""
    for start in range(0, count_examples(batch), size):
        yield take_examples(batch, slice(start, start + size))


def take_examples(batch: Any, rows: slice) -> Any:
    """Some examples of a batch: tensors as long as the batch are cut, everything else is shared."""
    count = count_examples(batch)
    return map_tensors(lambda tensor: tensor[rows] if tensor.dim() and len(tensor) == count else tensor, batch)


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)
