"""The data that sensitivities, ranges and roundings look at: training examples, or distilled ones where there are none."""

from importlib.metadata import version
from typing import Any

import safetensors.torch
import torch
from torch.utils.data import DataLoader

from hawq.distilled_data import distilled_batches
from hawq.options import Options
from hawq.stages import Stages, model_digest
from hessian.objective import batches_of
from hessian.task import Task

Batches = DataLoader[Any] | list[tuple[torch.Tensor, torch.Tensor]]


def calibration_batches(options: Options, task: Task, stages: Stages, example: torch.Tensor) -> Batches:
    """`options.calibration_size` examples in batches; distilling them is a stage."""
    generator = torch.Generator().manual_seed(options.seed)
    size, batch_size = options.calibration_size, options.batch_size
    if not options.data_free:
        return batches_of(task.train, batch_size, size=size, generator=generator)

    def compute() -> bytes:
        batches = distilled_batches(
            task.model,
            task.loss,
            example,
            size=size,
            batch_size=batch_size,
            generator=generator,
            progress=stages.processes.rank == 0,
        )
        parts = {
            f"{name}.{index:06}": tensor for index, pair in enumerate(batches) for name, tensor in zip("xy", pair, strict=True)
        }
        return safetensors.torch.save({name: tensor.contiguous() for name, tensor in parts.items()})

    inputs = {
        "weights": model_digest(task.model),
        "loss": repr(task.loss),
        "shape": list(example.shape[1:]),
        "versions": [version("hessianware"), torch.__version__],
        "settings": [size, batch_size, options.seed],
    }
    stored = safetensors.torch.load(stages.run("distillation", inputs, compute))
    names = sorted(name.removeprefix("x.") for name in stored if name.startswith("x."))
    return [(stored[f"x.{name}"], stored[f"y.{name}"]) for name in names]
