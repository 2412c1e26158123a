"""Every sensitivity by its name."""

from collections.abc import Sequence

import torch
from torch import nn

from hawq.affine import check_width
from hawq.fold import folded
from hawq.graph import example_inputs, find_layers, require_layers
from hawq.sensitivity.hessian import hessian_trace
from hawq.sensitivity.table import SensitivityTable, rounding_errors
from hawq.sensitivity.weight_error import weight_error
from hessian.estimators.layers import layer_report
from hessian.objective import Data, LossFunction, Objective

METHODS = ("hessian-trace", "weight-error")


def sensitivity(
    model: nn.Module,
    loss: LossFunction,
    data: Data,
    *,
    bits: Sequence[int] = (2, 3, 4, 8),
    method: str = "hessian-trace",
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> SensitivityTable:
    """The sensitivity of every quantizable layer at every width, {layer: {bits: omega}}; layers by module name.

    method: "hessian-trace" (HAWQ-V2, see `hawq.sensitivity.hessian`) or "weight-error". Batch norm is folded first.
    Raises ValueError for an unknown method, widths outside 2 to 8, and a model without a quantizable layer.
    """
    if method not in METHODS:
        raise ValueError(f"sensitivity method {method!r} is none of {', '.join(map(repr, METHODS))}")
    for width in bits:
        check_width(width)
    graph = folded(model, example_inputs(Objective(model, loss, data).batches()))
    layers = find_layers(graph)
    require_layers(layers)
    errors = rounding_errors(graph, layers, bits)
    if method == "weight-error":
        return weight_error(errors)
    weights = [layer.weight for layer in layers.values()]
    report = layer_report(graph, loss, data, weights, generator=generator, progress=progress)
    return hessian_trace(layers, errors, report)
