"""From weights to integer codes."""

from typing import Literal, get_args

from hawq.rounding.least_squares import LeastSquares
from hawq.rounding.nearest import round_to_nearest

Rounding = Literal["nearest", "gptq", "adaround"]
ROUNDINGS = get_args(Rounding)

__all__ = ["ROUNDINGS", "LeastSquares", "Rounding", "round_to_nearest"]
