"""How much does it hurt to narrow a layer? One file a method, one table format."""

from hawq.sensitivity.methods import METHODS, sensitivity
from hawq.sensitivity.table import SensitivityTable, rounding_errors

__all__ = ["METHODS", "SensitivityTable", "rounding_errors", "sensitivity"]
