"""How much does it hurt to narrow a layer? One file a method, one table format."""

from hawq.sensitivity.activation import activation_sensitivity
from hawq.sensitivity.methods import METHODS, automatic_method, sensitivity
from hawq.sensitivity.rounded import rounding_errors
from hawq.sensitivity.table import SensitivityTable

__all__ = ["METHODS", "SensitivityTable", "activation_sensitivity", "automatic_method", "rounding_errors", "sensitivity"]
