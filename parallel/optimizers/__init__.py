"""Optimizers by name, as the trainer makes them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from parallel.optimizers.adahessian import AdaHessian
from parallel.optimizers.kfac import KFAC
from parallel.optimizers.lamb import LAMB
from parallel.optimizers.lars import LARS
from parallel.optimizers.newton_cg import NewtonCG
from parallel.optimizers.newton_mr import NewtonMR

__all__ = ["KFAC", "LAMB", "LARS", "OPTIMIZERS", "AdaHessian", "Kind", "NewtonCG", "NewtonMR"]

_NEWTON_MATVECS = 20  # a step, in the trainer: each is as dear as two to three gradients

Make = Callable[[nn.Module, list[dict[str, Any]], float, Any], torch.optim.Optimizer]


@dataclass(frozen=True)
class Kind:
    """How to make an optimizer of a model, groups of its parameters, a learning rate and the config; the rate where none is
    given; whether each rank must compute whole layers."""

    make: Make
    learning_rate: float
    whole_layers: bool = False


def _sgd(_: nn.Module, parameters: list[dict[str, Any]], learning_rate: float, config: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, learning_rate, momentum=config.momentum, weight_decay=config.weight_decay, foreach=True)


def _adamw(_: nn.Module, parameters: list[dict[str, Any]], learning_rate: float, config: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, learning_rate, weight_decay=config.weight_decay, foreach=True)


def _lars(_: nn.Module, parameters: list[dict[str, Any]], learning_rate: float, config: Any) -> torch.optim.Optimizer:
    return LARS(parameters, learning_rate, momentum=config.momentum, weight_decay=config.weight_decay)


def _lamb(_: nn.Module, parameters: list[dict[str, Any]], learning_rate: float, config: Any) -> torch.optim.Optimizer:
    return LAMB(parameters, learning_rate, weight_decay=config.weight_decay)


def _adahessian(_: nn.Module, parameters: list[dict[str, Any]], learning_rate: float, config: Any) -> torch.optim.Optimizer:
    return AdaHessian(parameters, learning_rate, weight_decay=config.weight_decay, curvature_every=config.curvature_every or 1)


def _kfac(model: nn.Module, parameters: list[dict[str, Any]], learning_rate: float, config: Any) -> torch.optim.Optimizer:
    every = config.curvature_every or 5  # the trainer's runs may be shorter than KFAC's own 100 steps to the second inverses
    settings = {"momentum": config.momentum, "weight_decay": config.weight_decay, "factor_every": every, "inverse_every": every}
    return KFAC(model, parameters, lr=learning_rate, damping=0.03, clip=0.01, **settings)


def _newton_cg(_: nn.Module, parameters: list[dict[str, Any]], learning_rate: float, config: Any) -> torch.optim.Optimizer:
    del config
    return NewtonCG(parameters, lr=learning_rate, max_matvecs=_NEWTON_MATVECS)


def _newton_mr(_: nn.Module, parameters: list[dict[str, Any]], learning_rate: float, config: Any) -> torch.optim.Optimizer:
    del config
    return NewtonMR(parameters, lr=learning_rate, max_matvecs=_NEWTON_MATVECS)


OPTIMIZERS = {
    "sgd": Kind(_sgd, 0.05),
    "adamw": Kind(_adamw, 1e-3),
    "lars": Kind(_lars, 0.2),
    "lamb": Kind(_lamb, 0.01),
    "adahessian": Kind(_adahessian, 0.15),
    "kfac": Kind(_kfac, 0.1, whole_layers=True),
    "newton-cg": Kind(_newton_cg, 1.0),
    "newton-mr": Kind(_newton_mr, 1.0),
}
