"""From weights to integer codes."""

from hawq.rounding.nearest import round_to_nearest

ROUNDINGS = {"nearest": round_to_nearest}

__all__ = ["ROUNDINGS", "round_to_nearest"]
