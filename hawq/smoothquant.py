r"""SmoothQuant: outlying channels of an activation move into the weights that read it, where each row has its own scale.

For readers x W^T of a norm's (or linear layer's) output x, with :math:`X_j = \max |x_j|` on calibration data and
:math:`W_j = \max |W_{\cdot j}|` over all readers,

.. math:: s_j = X_j^\alpha / W_j^{1 - \alpha}, \qquad x W^T = (x S^{-1}) (W S)^T

and S^-1 goes into the source's weight and bias. Source: Xiao et al., SmoothQuant, ICML 2023, equations 3 and 4.
"""

import copy
import operator
from collections.abc import Iterable

import torch
from torch import fx

from hawq.affine import per_channel
from hawq.channels import Readers, find_readers, scalable
from hawq.graph import Layer, argument, find_layers, get_tensor, own_tensor, set_parameter

aten = torch.ops.aten
_NORMS = {aten.layer_norm.default: 2, aten.native_layer_norm.default: 2}  # where the weight is; the bias follows
_SMALLEST = 1e-5  # of a scale


@torch.no_grad()
def smoothed(
    graph: fx.GraphModule, inputs: Iterable[torch.Tensor], *, alpha: float = 0.5
) -> tuple[fx.GraphModule, list[str], dict[str, str]]:
    """A copy of a folded graph (see `folded`) that computes the same, with the ranges of activations moved into weights.

    inputs: calibration batches. alpha: how much of an activation's range moves, 0 to 1. Returns the copy, the sources that
    were smoothed (layer norms and linear layers, by module name), and the others with what stops each: another reader, such
    as a residual sum, an operation that is not positively homogeneous, a norm without weights. Of a source with some
    channels read elsewhere too (queries and keys beside values) the rest is smoothed.

    Raises ValueError for an alpha outside 0 to 1, no inputs, or activations that are not finite.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: the share of the activations' range that moves is from 0 to 1")
    result = copy.deepcopy(graph)
    layers = find_layers(result)
    joined: dict[str, tuple[str, str | None, Readers]] = {}
    skipped: dict[str, str] = {}
    for name, node, weight, bias in _sources(result, layers):
        if weight is None:
            skipped[name] = "weights or biases that it does not have or that others use"
            continue
        readers = find_readers(node, -1, layers)
        if readers.free.any():
            joined[name] = weight, bias, readers
        else:
            skipped[name] = str(readers.barrier)
    read = {reader for _, _, readers in joined.values() for reader in readers.layers}
    maxima = _input_maxima(result, {name: layers[name] for name in read}, inputs) if joined else {}
    for weight, bias, readers in joined.values():
        columns = readers.column_maxima({name: get_tensor(result, layers[name].weight).abs() for name in readers.layers})
        activations = readers.column_maxima({name: maxima[name] for name in readers.layers})
        alive = readers.free & (columns > 0) & (activations > 0)
        scale = (activations**alpha / columns ** (1 - alpha)).clamp(min=_SMALLEST)
        scale = torch.where(alive, scale, 1.0)
        for target in (weight, bias):
            if target is not None:
                value = get_tensor(result, target)
                set_parameter(result, target, (value / per_channel(scale, value)).to(value.dtype))
        for reader, channels in readers.layers.items():
            value = get_tensor(result, layers[reader].weight)
            set_parameter(result, layers[reader].weight, readers.scaled_columns(reader, value, scale).to(value.dtype))
            maxima[reader] = maxima[reader] / scale[channels]  # a layer's columns may come from several sources
    return result, list(joined), skipped


def _sources(graph: fx.GraphModule, layers: dict[str, Layer]) -> list[tuple[str, fx.Node, str | None, str | None]]:
    """(name, result, weight, bias) of layer norms and linear layers; no weight where it cannot be scaled."""
    names = {layer.node: name for name, layer in layers.items()}
    found: list[tuple[str, fx.Node, str | None, str | None]] = []
    for node in graph.graph.nodes:
        if node.target in _NORMS:
            position = _NORMS[node.target]
            weight, bias = own_tensor(argument(node, position)), own_tensor(argument(node, position + 1))
            is_own = weight is not None and len(node.args[1]) == 1 and (bias is None) == (argument(node, position + 1) is None)
            result = node
            if node.target is aten.native_layer_norm.default:
                result = next(user for user in node.users if user.target is operator.getitem and user.args[1] == 0)
            name = weight.removesuffix(".weight") if weight is not None else node.name
            found.append((name, result, weight if is_own else None, bias))
        elif node in names and node.target is aten.linear.default:
            layer = layers[names[node]]
            found.append((layer.name, node, layer.weight if scalable(layer) else None, layer.bias))
    return found


def _input_maxima(graph: fx.GraphModule, layers: dict[str, Layer], inputs: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The largest |input| of each input channel of the layers, (input channels,), float64."""
    names = {layer.node: name for name, layer in layers.items()}
    maxima: dict[str, torch.Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            if n in names:
                x = self.env[n.args[0]].detach().double()  # type: ignore[index]
                channels = x.dim() - 1 if n.target is aten.linear.default else 1
                largest = x.abs().amax([dim for dim in range(x.dim()) if dim != channels])
                if not torch.isfinite(largest).all():
                    raise ValueError(f"the input of {names[n]!r} is NaN or Inf on the calibration data")
                maxima[names[n]] = torch.maximum(largest, maxima.get(names[n], largest))
            return super().run_node(n)

    for batch in inputs:
        Recorder(graph).run(batch)
    if not maxima:
        raise ValueError("there are no calibration inputs to smooth with")
    return maxima
