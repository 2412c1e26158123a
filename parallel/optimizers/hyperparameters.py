"""The ranges of optimizers' hyperparameters."""

import math
from collections.abc import Callable, Mapping
from typing import Any

_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "lr": (lambda value: 0 < value < math.inf, "give a positive learning rate"),
    "eta": (lambda value: 0 < value < math.inf, "give a positive trust coefficient, such as 0.02"),
    "momentum": (lambda value: 0 <= value < 1, "give a number from 0 to below 1"),
    "weight_decay": (lambda value: 0 <= value < math.inf, "give a number of at least 0"),
    "eps": (lambda value: 0 < value < math.inf, "give a small positive number, such as 1e-8"),
    "hessian_power": (lambda value: 0 < value <= 1, "give a number above 0, at most 1"),
}


def check(hyperparameters: Mapping[str, Any]) -> None:
    """ValueError, with the value and what it should be, for the first hyperparameter that is out of its range."""
    for name, (holds, remedy) in _RANGES.items():
        if name in hyperparameters and not holds(float(hyperparameters[name])):
            raise ValueError(f"{name}={hyperparameters[name]}: {remedy}")
    betas = hyperparameters.get("betas", ())
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas={tuple(betas)}: give numbers from 0 to below 1")
    bounds = hyperparameters.get("bounds")
    if bounds is not None and not 0 <= bounds[0] <= bounds[1]:
        raise ValueError(f"bounds={tuple(bounds)}: give a least and a largest norm, at least 0")
