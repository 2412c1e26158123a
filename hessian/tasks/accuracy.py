"""The metric of the built-in tasks, and the accuracy that a training must reach."""

import torch
from torch import nn
from torch.utils.data import TensorDataset


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The share of targets whose logit is the largest: outputs (N, C, ...), targets (N, ...), result a scalar."""
    return (outputs.argmax(dim=1) == targets).float().mean()


@torch.no_grad()
def require_accuracy(name: str, model: nn.Module, test: TensorDataset, required: float) -> None:
    """Raises RuntimeError if `model`, trained for the task `name`, is less accurate than `required` on `test`."""
    inputs, targets = test.tensors
    reached = accuracy(model(inputs), targets).item()
    if reached < required:
        raise RuntimeError(f"training {name} ended at {reached:.2%} test accuracy, below {required:.0%}")
