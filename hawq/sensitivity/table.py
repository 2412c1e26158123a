"""The sensitivity table: what each width of each layer is expected to cost, with standard errors."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from tqdm.auto import tqdm

from hawq.affine import check_width, dequantize, per_channel
from hawq.fold import folded
from hawq.graph import Layer, example_inputs, find_layers, get_tensor, require_layers
from hawq.rounding import round_to_nearest
from hessian.estimators.layers import layer_report
from hessian.objective import Data, LossFunction, Objective

Errors = Mapping[str, Mapping[int, float]]

METHODS = ("hessian-trace", "weight-error")


class SensitivityTable(Mapping[str, Mapping[int, float]]):
    """omega by layer and bits; `stderr` likewise; `method` that made it."""

    def __init__(self, omega: Errors, stderr: Errors, method: str) -> None:
        self._omega = {name: dict(row) for name, row in omega.items()}
        self.stderr = {name: dict(row) for name, row in stderr.items()}
        self.method = method

    def __getitem__(self, layer: str) -> dict[int, float]:
        return self._omega[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._omega)

    def __len__(self) -> int:
        return len(self._omega)

    def __repr__(self) -> str:
        return f"SensitivityTable({self._omega!r}, method={self.method!r})"


def rounding_errors(
    graph: torch.fx.GraphModule, layers: Mapping[str, Layer], bits: Sequence[int], *, progress: bool = False
) -> dict[str, dict[int, float]]:
    """The squared Euclidean norm of each layer's rounding error at each width, rounded to nearest."""
    errors: dict[str, dict[int, float]] = {}
    for name, layer in tqdm(layers.items(), desc="rounding errors", unit="layer", disable=not progress):
        weight = get_tensor(graph, layer.weight).detach()
        errors[name] = {}
        for width in bits:
            codes, scale = round_to_nearest(weight, width)
            difference = dequantize(codes, per_channel(scale, weight)) - weight
            errors[name][width] = float(difference.double().square().sum())
    return errors


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
    from hawq.sensitivity.hessian import hessian_trace
    from hawq.sensitivity.weight_error import weight_error

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
