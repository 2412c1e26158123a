"""A trainer's state as a checkpoint has it: tensors by name, and a few numbers."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from parallel.checkpoint import Checkpoints, Tensors
from parallel.trainer import Trainer


def tensors_of(trainer: Trainer) -> Tensors:
    """The model's (`model.NAME`), the optimizer's (`optimizer.SLOT.NAME`) and the average's (`average.NAME`) tensors."""
    found = {f"model.{name}": tensor for name, tensor in trainer.replica.state().items()}
    names: dict[Any, str] = {parameter: name for name, parameter in trainer.replica.model.named_parameters()}
    for parameter, slots in trainer.optimizer.state.items():
        for slot, value in slots.items():
            if value is not None:
                found[f"optimizer.{slot}.{names[parameter]}"] = torch.as_tensor(value)
    found |= {f"control.{name}": tensor for name, tensor in trainer.control.tensors().items()}
    if trainer.average is not None:
        found |= {f"average.{name}": tensor for name, tensor in trainer.average.tensors.items()}
    return found


def numbers_of(trainer: Trainer) -> dict[str, Any]:
    """What is no tensor."""
    return {
        "task": trainer.task.name,
        "world_size": trainer.processes.world_size,
        "examples": trainer.examples,
        "rate_scale": trainer.rate_scale,
        "expected_weight": trainer.expected_weight,
        "expected_batch": trainer.expected_batch,
        "control": trainer.control.state(),
        "config": trainer.config.to_dict(),
    }


def restore(trainer: Trainer, checkpoints: Checkpoints, step: int) -> None:
    """Put the trainer where it was at a checkpoint. ValueError for one of another task or of another kind of run."""
    run = checkpoints.read_run(step)
    if run["task"] != trainer.task.name:
        raise ValueError(f"the checkpoint in {checkpoints.folder} is of task {run['task']!r}, this is {trainer.task.name!r}")
    for name in ("batch_size", "optimizer", "ema", "seed", "layer_rates", "adaptive_batch"):
        now = getattr(trainer.config, name)
        if run["config"][name] != now:
            flag = name.replace("_", "-")
            raise ValueError(
                f"the checkpoint in {checkpoints.folder} was made with --{flag} {run['config'][name]}, this run has {now}: go "
                "on with the same, or begin in another folder with --weights"
            )
    model, average = trainer.replica.state(), {} if trainer.average is None else trainer.average.tensors
    parameters = dict(trainer.replica.model.named_parameters())

    def make(key: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        kind, _, name = key.partition(".")
        if kind == "control":
            return torch.zeros(shape, dtype=dtype, device=trainer.processes.device)
        if kind != "optimizer":
            live = (model if kind == "model" else average).get(name)
            if live is None or live.shape != shape:
                raise ValueError(
                    f"the checkpoint has a tensor {name!r} of shape {tuple(shape)}, and the model has none like it"
                )
            return live
        parameter = parameters[name.partition(".")[2]]
        if shape == parameter.shape and isinstance(parameter, DTensor):
            return torch.zeros_like(parameter, dtype=dtype)
        return torch.zeros(shape, dtype=dtype, device=parameter.device if shape else "cpu")

    tensors = checkpoints.load(step, make)
    missing = [name for name in model if f"model.{name}" not in tensors]
    if missing:
        raise ValueError(f"the checkpoint in {checkpoints.folder} has no tensor {missing[0]!r}: it is of another model")
    own = {name.removeprefix("control."): tensor for name, tensor in tensors.items() if name.startswith("control.")}
    trainer.control.load(run["control"], own)
    trainer.optimizer.state.clear()
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "optimizer":
            slot, _, name = name.partition(".")
            trainer.optimizer.state[parameters[name]][slot] = tensor
    trainer.step, trainer.examples, trainer.expected_batch = step, run["examples"], run["expected_batch"]
    trainer.rate_scale, trainer.expected_weight = run["rate_scale"], run["expected_weight"]
