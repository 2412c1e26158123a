"""How much does it hurt to narrow a layer? One file a method, one table format."""

from hawq.sensitivity.table import METHODS, SensitivityTable, rounding_errors, sensitivity

__all__ = ["METHODS", "SensitivityTable", "rounding_errors", "sensitivity"]
