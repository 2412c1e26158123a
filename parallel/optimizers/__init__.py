"""Optimizers by name, as the trainer makes them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Make = Callable[[Iterable[nn.Parameter], float, Any], torch.optim.Optimizer]


@dataclass(frozen=True)
class Kind:
    """How to make an optimizer from parameters, a learning rate and the config, and the rate to use where none is given."""

    make: Make
    learning_rate: float


def _sgd(parameters: Iterable[nn.Parameter], learning_rate: float, config: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, learning_rate, momentum=config.momentum, weight_decay=config.weight_decay, foreach=True)


def _adamw(parameters: Iterable[nn.Parameter], learning_rate: float, config: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, learning_rate, weight_decay=config.weight_decay, foreach=True)


OPTIMIZERS = {"sgd": Kind(_sgd, 0.05), "adamw": Kind(_adamw, 1e-3)}
