"""What an Objective cannot be made of, and what to give instead."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from hessian.batch import describe

OWN_FORWARD = "hessian.Objective(model, loss, data, forward=lambda model, batch: ..., items=lambda batch: ...)"


def check_arguments(model: Any, loss: Any, data: Any) -> None:
    """TypeError or ValueError for what is no model, no loss, or nothing that yields batches again and again."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is {_named(model)}, not a torch.nn.Module")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "the model's parameters are on the device 'meta', without values: model.to_empty(device='cpu'), then weights"
        )
    if isinstance(loss, type) or not callable(loss):
        raise TypeError(f"the loss is {_named(loss)}, not a function of outputs and targets")
    if isinstance(data, Iterator):
        raise ValueError(
            f"`data` is an iterator (a {type(data).__name__}) and would be empty on the second pass: pass a list of batches, a "
            "DataLoader, or one (inputs, targets) batch"
        )
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise TypeError(
            f"`data` is a {type(data).__name__}, which yields single examples: pass torch.utils.data.DataLoader(dataset, "
            "batch_size=...), or batch_size=None where its items are batches"
        )
    if isinstance(data, type) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise TypeError(
            f"`data` is {_named(data)}, which yields no batches: pass a list of batches, a DataLoader, or one (inputs, "
            "targets) batch"
        )


def _named(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}, of which one is made by {value.__name__}(...)"
    return "a function" if callable(value) and hasattr(value, "__name__") else describe(value)


def not_a_pair(batch: Any, data: Any) -> str:
    """What to do about a batch that is not (inputs, targets)."""
    if isinstance(batch, np.ndarray):
        return f"a batch is {describe(batch)}, not (inputs, targets): make tensors of arrays, torch.as_tensor(array)"
    whole = f", taken out of {describe(data)}" if isinstance(data, tuple | torch.Tensor) else ""
    return f"a batch is {describe(batch)}{whole}, not (inputs, targets): say how to call the model with {OWN_FORWARD}"


def nothing(data: Any, *, passed_before: bool) -> str:
    """What to do about data without a batch."""
    if passed_before:
        return f"the data, {describe(data)}, is empty on this pass and was not before: its __iter__ must start anew each time"
    return (
        f"the data is empty, {describe(data)}: there is no batch to compute a loss on (a DataLoader with drop_last=True has "
        "none of fewer than batch_size examples)"
    )
