"""Optimizers by name, as the trainer makes them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Make = Callable[[list[dict[str, Any]], float, Any], torch.optim.Optimizer]


@dataclass(frozen=True)
class Kind:
    """How to make an optimizer of parameter groups, a learning rate and the config, and the rate where none is given."""

    make: Make
    learning_rate: float


def _sgd(parameters: list[dict[str, Any]], learning_rate: float, config: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, learning_rate, momentum=config.momentum, weight_decay=config.weight_decay, foreach=True)


def _adamw(parameters: list[dict[str, Any]], learning_rate: float, config: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, learning_rate, weight_decay=config.weight_decay, foreach=True)


OPTIMIZERS = {"sgd": Kind(_sgd, 0.05), "adamw": Kind(_adamw, 1e-3)}
