"""How few bits does each layer need? Sensitivity, exact allocation, quantized models and their files."""

from hawq.allocate import Budget, allocate
from hawq.allocation import Allocation
from hawq.audit import Audit, audit
from hawq.cost.size import average_bits, num_params
from hawq.distilled_data import distilled_batches, distilled_data
from hawq.finetune import finetune
from hawq.integer import integer_model
from hawq.model import QuantizedModel, quantize_model
from hawq.onnx_export import export_onnx
from hawq.pareto import Frontier, Outcome, convex_frontier, frontier, optimal_allocations
from hawq.preparation import prepared
from hawq.sensitivity import SensitivityTable, activation_sensitivity, sensitivity
from hawq.stability import Stability, stability
from hawq.storage import load, save
from hawq.widths import allowed_widths

__all__ = [
    "Allocation",
    "Audit",
    "Budget",
    "Frontier",
    "Outcome",
    "QuantizedModel",
    "SensitivityTable",
    "Stability",
    "activation_sensitivity",
    "allocate",
    "allowed_widths",
    "audit",
    "average_bits",
    "convex_frontier",
    "distilled_batches",
    "distilled_data",
    "export_onnx",
    "finetune",
    "frontier",
    "integer_model",
    "load",
    "num_params",
    "optimal_allocations",
    "prepared",
    "quantize_model",
    "save",
    "sensitivity",
    "stability",
]
