"""How few bits does each layer need? Sensitivity, exact allocation, quantized models and their files."""

from hawq.allocate import Budget, allocate
from hawq.allocation import Allocation
from hawq.model import QuantizedModel, quantize_model
from hawq.onnx_export import export_onnx
from hawq.sensitivity import SensitivityTable, sensitivity
from hawq.storage import load, save
from hawq.widths import allowed_widths

__all__ = [
    "Allocation",
    "Budget",
    "QuantizedModel",
    "SensitivityTable",
    "allocate",
    "allowed_widths",
    "export_onnx",
    "load",
    "quantize_model",
    "save",
    "sensitivity",
]
