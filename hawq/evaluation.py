"""The metric and the loss of a network, in torch or in a runtime, on a task's evaluation data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from hessian.diagnosis import explained_forward
from hessian.objective import Objective
from hessian.task import Task


@dataclass(frozen=True)
class Evaluation:
    """metric and loss over all examples; outputs, example by example."""

    metric: float
    loss: float
    outputs: torch.Tensor


@torch.no_grad()
def evaluate(
    network: Callable[[torch.Tensor], torch.Tensor], task: Task, batches: Any, *, progress: str | None = None
) -> Evaluation:
    """Run `network` over `batches` of (inputs, targets); the task's metric is averaged by examples, its loss by items."""
    objective = Objective(task.model, task.loss, batches)
    outputs, loss, total, metric, count = [], 0.0, 0.0, 0.0, 0
    for batch in tqdm(objective.batches(), desc=progress, total=len(batches), unit="batch", disable=progress is None):
        inputs, targets = batch
        with explained_forward(task.model, inputs):
            result = network(inputs)
        outputs.append(result)
        weight = objective.weight(batch)
        loss += weight * float(objective.batch_loss(result, batch)) if weight else 0.0
        total += weight
        metric += len(inputs) * float(task.metric(result, targets))
        count += len(inputs)
    if not total:
        raise ValueError("no evaluation example counts: the loss ignores every target")
    return Evaluation(metric / count, loss if objective.is_sum else loss / total, torch.cat(outputs))


@torch.no_grad()
def mean_loss(network: Callable[[torch.Tensor], torch.Tensor], task: Task, batches: Any) -> float:
    """The task's loss of `network` over `batches`, weighted as in `evaluate`."""
    objective = Objective(task.model, task.loss, batches)
    loss = total = 0.0
    for batch in objective.batches():
        if weight := objective.weight(batch):
            loss += weight * float(objective.batch_loss(network(batch[0]), batch))
        total += weight
    return loss if objective.is_sum else loss / total
