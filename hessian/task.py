"""Task: a model, its data, its loss and its metric; how a task is named on a command line; how weights are read."""

import importlib
import inspect
import os
import pickle
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader, Dataset

from hessian.batch import describe
from hessian.objective import LossFunction
from hessian.spelling import did_you_mean, require_file


@dataclass(frozen=True)
class Task:
    """What there is to know of a learning problem.

    model: the network. train, evaluation: map-style datasets of (input, target). loss(outputs, targets): a mean over
    the batch. metric(outputs, targets): a mean over the batch, higher is better. name: shown in reports.
    """

    model: nn.Module
    train: Dataset[Any]
    evaluation: Dataset[Any]
    loss: LossFunction
    metric: Callable[[Any, Any], torch.Tensor | float]
    name: str


class UnknownTaskError(ValueError):
    """A task was named that does not exist."""


def load_task(text: str, weights: str | os.PathLike[str] | None = None, *, pretrained: bool = True) -> Task:
    """The task that `text` names: a built-in one, or `package.module:function` returning a Task.

    `weights`: a file of weights for the task's model (see `load_weights`); a built-in task then trains nothing.
    `pretrained=False`: the model of a built-in task has its initial weights.
    Raises UnknownTaskError (a ValueError) for a name that leads nowhere, ValueError for weights that are not there, do not
    fit or are not finite and for an empty dataset, TypeError for a function that returns no Task.
    """
    from hessian.tasks import BUILT_IN

    if weights is not None:
        require_file(Path(weights), "weights file")  # before the task's own work
    if text in BUILT_IN:
        task = BUILT_IN[text](pretrained=pretrained and weights is None)
    elif ":" in text:
        task = _call(text)
    else:
        hint = did_you_mean(text, BUILT_IN)
        if not hint and text.isidentifier() and Path(f"{text}.py").is_file():
            hint = f" (did you mean a function of that module, {text}:FUNCTION?)"
        raise UnknownTaskError(
            f"unknown task {text!r}{hint}: built-in tasks are {', '.join(BUILT_IN)}; name your own as package.module:function"
        )
    if weights is not None:
        load_weights(task.model, weights)
    _check(task)
    return task


def _call(text: str) -> Task:
    module_name, _, attribute = text.partition(":")
    if module_name.endswith(".py"):
        raise UnknownTaskError(
            f"task {text!r}: name the module, not its file: {module_name[:-3].replace('/', '.')}:{attribute}"
        )
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise UnknownTaskError(f"task {text!r}: {module_name!r} is no name of a module, such as package.module")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # console scripts, unlike `python -m`, do not look here
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module was found; something that it imports was not
        hint = _near_module(error.name)
        raise UnknownTaskError(f"task {text!r}: there is no module {error.name!r} here or among the installed{hint}") from error
    function = getattr(module, attribute, None)
    if function is not None and not callable(function):
        raise UnknownTaskError(f"task {text!r}: {attribute!r} is a {type(function).__name__}, not a function")
    if function is None:
        hint = did_you_mean(attribute, [name for name, value in vars(module).items() if inspect.isfunction(value)])
        raise UnknownTaskError(f"task {text!r}: module {module_name!r} has no function {attribute!r}{hint}")
    task = function()
    if not isinstance(task, Task):
        raise TypeError(f"task {text!r}: {attribute}() returned a {type(task).__name__}, not a hessian.Task")
    return task


def _near_module(name: str) -> str:
    """A hint at the module of a similar name in the same package, or wherever modules are found."""
    package, dot, last = name.rpartition(".")
    places = list(getattr(sys.modules[package], "__path__", [])) if dot else None
    return did_you_mean(last, [one.name for one in pkgutil.iter_modules(places)], lambda near: repr(package + dot + near))


def _check(task: Task) -> None:
    for name, function in (("loss", task.loss), ("metric", task.metric)):
        if isinstance(function, type) or not callable(function):
            kind = f"the class {function.__name__}" if isinstance(function, type) else f"a {type(function).__name__}"
            raise TypeError(f"task {task.name!r}: {name} is {kind}, not a function of outputs and targets")
    for name, dataset in (("train", task.train), ("evaluation", task.evaluation)):
        if isinstance(dataset, DataLoader):
            raise TypeError(
                f"task {task.name!r}: {name} is a DataLoader, and a task has data sets, of which batches are made here: give "
                f"loader.dataset, a {type(dataset.dataset).__name__}"
            )
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"task {task.name!r}: {name}, {describe(dataset)}, is not a map-style dataset with a length: give one with "
                "__getitem__ and __len__, such as torch.utils.data.TensorDataset(inputs, targets)"
            )
        if len(dataset) == 0:
            raise ValueError(f"task {task.name!r}: the {name} dataset is empty")
        item = dataset[0]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise TypeError(
                f"task {task.name!r}: an item of {name} is {describe(item)}, not (input, target): let the dataset's "
                "__getitem__ return those two"
            )
    for name, tensor in task.model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"task {task.name!r}: weight {name!r} holds NaN or Inf")


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Read a state dict into `model`: safetensors, or a torch file that holds tensors only.

    Nothing in the file is executed. A dict that holds the state dict under "state_dict" or "model" is unwrapped.
    Raises ValueError for an unreadable file, for one that would need to run code, and for weights that do not fit.
    """
    state = _read_state(Path(path))
    _check_fit(model, state, path)
    model.load_state_dict(state)


def _read_state(path: Path) -> Mapping[str, torch.Tensor]:
    require_file(path, "weights file")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or is no safetensors file: {error}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no plain file of tensors: it is damaged, or would have to run code to be read (nothing was run). "
            "Save it anew with torch.save(model.state_dict(), ...) or as safetensors"
        ) from error
    except Exception as error:  # a damaged file can make the reader fail in any way
        raise ValueError(f"{path} is damaged or is no file of weights") from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state dict of tensors")
    return state


def _check_fit(model: nn.Module, state: Mapping[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    wanted = model.state_dict()
    if any(name.endswith(":codes") for name in state):
        raise ValueError(f"{path} is a quantized model, for hawq.load(folder, model): name the float network's weights")
    problems = [f"{name} is missing" for name in wanted if name not in state]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, the model's is {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems += [f"{name} is not in the model" for name in state if name not in wanted]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(f"the weights in {path} do not fit the model: {'; '.join(problems[:3])}{more}")
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"weight {name!r} in {path} holds NaN or Inf")
