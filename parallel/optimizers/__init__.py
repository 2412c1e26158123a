"""Optimizers by name, as the trainer makes them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from parallel.optimizers.adahessian import AdaHessian
from parallel.optimizers.lamb import LAMB
from parallel.optimizers.lars import LARS

__all__ = ["LAMB", "LARS", "OPTIMIZERS", "AdaHessian", "Kind"]

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


def _lars(parameters: list[dict[str, Any]], learning_rate: float, config: Any) -> torch.optim.Optimizer:
    return LARS(parameters, learning_rate, momentum=config.momentum, weight_decay=config.weight_decay)


def _lamb(parameters: list[dict[str, Any]], learning_rate: float, config: Any) -> torch.optim.Optimizer:
    return LAMB(parameters, learning_rate, weight_decay=config.weight_decay)


def _adahessian(parameters: list[dict[str, Any]], learning_rate: float, config: Any) -> torch.optim.Optimizer:
    return AdaHessian(parameters, learning_rate, weight_decay=config.weight_decay, curvature_every=config.curvature_every)


OPTIMIZERS = {
    "sgd": Kind(_sgd, 0.05),
    "adamw": Kind(_adamw, 1e-3),
    "lars": Kind(_lars, 0.2),
    "lamb": Kind(_lamb, 0.01),
    "adahessian": Kind(_adahessian, 0.15),
}
