"""Integer-only inference with dyadic rescaling, and its comparison with onnxruntime's integers."""

from hawq.integer.compare import Comparison, Difference, compare
from hawq.integer.dyadic import Dyadic, dyadic
from hawq.integer.executor import IntegerModel, integer_model

__all__ = ["Comparison", "Difference", "Dyadic", "IntegerModel", "compare", "dyadic", "integer_model"]
