"""Every sensitivity by its name."""

from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from hawq.affine import check_width
from hawq.fold import folded
from hawq.graph import Layer, example_inputs, find_layers, require_layers, traceable
from hawq.sensitivity.fisher import fisher, fisher_diagonals
from hawq.sensitivity.hessian import hessian_trace, layer_traces
from hawq.sensitivity.kl import kl
from hawq.sensitivity.qbert import qbert, subsampled_eigenvalues
from hawq.sensitivity.rounded import Rounded, squares, weight_differences, with_bias_correction
from hawq.sensitivity.second_order import curves_loss, gauss_newton, has_many_outputs, is_piecewise_linear, second_order
from hawq.sensitivity.subset import first_examples
from hawq.sensitivity.table import SensitivityTable
from hawq.sensitivity.top_eigenvalue import top_eigenvalue, top_eigenvalues
from hawq.sensitivity.weight_error import weight_error
from hessian.objective import Data, LossFunction, Objective

METHODS = ("auto", "hessian-trace", "top-eigenvalue", "q-bert", "kl", "fisher", "weight-error", "second-order", "gauss-newton")


def sensitivity(
    model: nn.Module | Objective,
    loss: LossFunction | None = None,
    data: Data | None = None,
    *,
    bits: Sequence[int] = (2, 3, 4, 8),
    method: str = "hessian-trace",
    rounded: Rounded | None = None,
    bias_correction: bool = True,
    augment: bool = True,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> SensitivityTable:
    """The sensitivity of every quantizable layer at every width, {layer: {bits: omega}}; layers by module name.

    method: one of METHODS, each defined in its file of `hawq.sensitivity`. "auto": "second-order", which allocates best in
    benchmarks/results/sensitivities.md, where the network is piecewise linear and an example has no more than 64 outputs;
    elsewhere "gauss-newton", whose cost grows with neither layers nor widths; where that does not know the loss's curvature in
    the outputs (not one tensor, not convex, or linear, as a negative log-likelihood is in log-probabilities), "hessian-trace"
    for more than 64 outputs, else "second-order". Batch norm is folded first. rounded: gives a layer's weight at a width (by
    its name and bits, in real numbers, shaped like the folded weight), by default rounded to nearest. bias_correction: for
    "kl", "second-order" and "gauss-newton", let biases take up the change of mean outputs, as `quantize_model` does; the others
    look at weights alone. augment: for "hessian-trace" of more than 64 outputs, disturb images as `quantize_model` does.

    Raises ValueError for an unknown method, widths outside 2 to 8, and a model without a quantizable layer.
    """
    if method not in METHODS:
        raise ValueError(f"sensitivity method {method!r} is none of {', '.join(map(repr, METHODS))}")
    for width in bits:
        check_width(width)
    given = traceable(model, loss, data)
    graph = folded(given.model, example_inputs(given.whole_batches()))
    layers = find_layers(graph)
    require_layers(layers)
    objective = given.of(graph)
    errors = weight_differences(graph, layers, bits, rounded, progress=progress)
    if method == "auto":
        method = automatic_method(objective, layers)
    if method in ("kl", "second-order", "gauss-newton") and bias_correction:
        errors = with_bias_correction(objective, layers, errors, progress=progress)
    match method:
        case "weight-error":
            return weight_error(squares(errors))
        case "top-eigenvalue":
            values = top_eigenvalues(objective, layers, generator=generator, progress=progress)
            return top_eigenvalue(layers, squares(errors), values)
        case "q-bert":
            samples = subsampled_eigenvalues(objective, layers, generator=generator, progress=progress)
            return qbert(layers, squares(errors), samples)
        case "fisher":
            diagonals = fisher_diagonals(objective, layers, generator=generator, progress=progress)
            return fisher(layers, errors, diagonals, objective.loss)
        case "kl":
            return kl(objective, layers, errors, progress=progress)
        case "second-order":
            return second_order(objective, layers, errors, progress=progress)
        case "gauss-newton":
            return gauss_newton(objective, layers, errors, generator=generator, progress=progress)
    traces = layer_traces(objective, layers, augment=augment, generator=generator, progress=progress)
    return hessian_trace(layers, squares(errors), traces)


def automatic_method(objective: Objective, layers: Mapping[str, Layer]) -> str:
    """What "auto" stands for, `objective.model` being the traced graph that the layers are of."""
    graph = objective.model
    assert isinstance(graph, fx.GraphModule)
    few = first_examples(objective, 2, 2)
    batch = few[0]
    outputs = objective.outputs(batch)
    if not isinstance(outputs, torch.Tensor):
        return "hessian-trace"
    many = has_many_outputs(outputs)
    if not many and is_piecewise_linear(graph, layers, batch[0]):
        return "second-order"
    if curves_loss(Objective(graph, objective.loss, few), batch, outputs):
        return "gauss-newton"
    return "hessian-trace" if many else "second-order"
