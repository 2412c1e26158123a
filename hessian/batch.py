"""What is in a batch: tensors, by themselves or in tuples, lists, dicts and dataclasses."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch

_SHOWN = 4  # parts of a value, in messages


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
    raise ValueError(
        f"cannot count the examples of {describe(batch)}, which holds no tensor: give tensors (torch.as_tensor), or pass "
        "items=lambda batch: ..."
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Without torch's name before it."""
    return str(dtype).removeprefix("torch.")


def describe(value: Any) -> str:
    """What a value is, for messages: its type, and the types and shapes of what it holds, one level deep."""
    if isinstance(value, torch.Tensor):
        return f"a {_kind(value)}"
    if isinstance(value, Mapping):
        parts = [f"{key!r}: {_kind(part)}" for key, part in value.items()]
    elif _is_dataclass(value):
        parts = [f"{field.name}: {_kind(getattr(value, field.name))}" for field in dataclasses.fields(value)]
    elif isinstance(value, tuple | list):
        parts = [_kind(part) for part in value]
    else:
        return f"a {type(value).__name__}"
    shown = [*parts[:_SHOWN], "..."] if len(parts) > _SHOWN else parts
    return f"a {type(value).__name__}({', '.join(shown)})"


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{dtype_name(value.dtype)} tensor {tuple(value.shape)}"
    return type(value).__name__


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
