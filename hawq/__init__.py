"""How few bits does each layer need? Sensitivity, exact allocation, quantized models and their files."""

from hawq.allocate import Budget, allocate
from hawq.allocation import Allocation
from hawq.distilled_data import distilled_batches, distilled_data
from hawq.finetune import finetune
from hawq.integer import integer_model
from hawq.model import QuantizedModel, quantize_model
from hawq.onnx_export import export_onnx
from hawq.preparation import prepared
from hawq.sensitivity import SensitivityTable, activation_sensitivity, sensitivity
from hawq.storage import load, save
from hawq.widths import allowed_widths

__all__ = [
    "Allocation",
    "Budget",
    "QuantizedModel",
    "SensitivityTable",
    "activation_sensitivity",
    "allocate",
    "allowed_widths",
    "distilled_batches",
    "distilled_data",
    "export_onnx",
    "finetune",
    "integer_model",
    "load",
    "prepared",
    "quantize_model",
    "save",
    "sensitivity",
]
