"""Batch norm folded into the layer before it, so that what is analysed and quantized is what runs."""

import operator

import torch
from torch import fx, nn

from hawq.graph import (
    EMBEDDING,
    LAYER_OPERATIONS,
    argument,
    bias_node,
    get_tensor,
    only_user,
    own_tensor,
    set_parameter,
    settings,
    trace,
    weight_node,
)
from hawq.patches import MatrixForm

aten = torch.ops.aten
_FOLDED = "hawq.folded"


def folded(model: nn.Module, example: torch.Tensor) -> fx.GraphModule:
    """The model's graph (see `trace`) with every batch norm that directly follows a layer folded into it.

    W' = W * gamma / sqrt(var + eps) for each output channel, b' = beta + (b - mean) * gamma / sqrt(var + eps). The given
    model is not changed; a graph that this function returned before is not traced again.
    """
    if isinstance(model, fx.GraphModule) and model.meta.get(_FOLDED):
        return model
    graph = trace(model, example)
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target in LAYER_OPERATIONS:
            _fold_into(graph, node)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    result = fx.GraphModule(graph, graph.graph)  # drops the folded statistics
    result.meta[_FOLDED] = True
    return result


def _fold_into(graph: fx.GraphModule, layer: fx.Node) -> None:
    norm = only_user(layer)
    if norm is None or norm.target is not aten._native_batch_norm_legit_no_training.default or norm.args[0] is not layer:
        return
    if layer.target is EMBEDDING or (layer.target is aten.linear.default and layer.meta["val"].dim() != 2):
        return  # its channels are last, those of a batch norm are second
    weight, bias = own_tensor(weight_node(layer)), own_tensor(bias_node(layer))
    result = only_user(norm)
    if weight is None or (bias is None) != (bias_node(layer) is None):
        return  # a weight or bias that is computed, or used elsewhere too
    if result is None or result.target is not operator.getitem or result.args[1] != 0:
        return
    gamma, beta, mean, variance = (_value(graph, argument(norm, position)) for position in range(1, 5))
    old = get_tensor(graph, weight)
    form = MatrixForm(layer.target, settings(layer), old.shape)
    if not form.has_channel_scales:
        return
    assert mean is not None
    assert variance is not None
    with torch.no_grad():
        factor = (variance + float(norm.args[6])).rsqrt() * (1 if gamma is None else gamma)  # type: ignore[arg-type]
        shift = ((0 if bias is None else get_tensor(graph, bias).double()) - mean) * factor + (0 if beta is None else beta)
        scaled = old.double() * factor.view(*(-1 if dim == form.channel_axis else 1 for dim in range(old.dim())))
    set_parameter(graph, weight, scaled.to(old.dtype))
    if bias is None:
        bias = f"{weight.removesuffix('weight')}bias" if weight.endswith("weight") else f"{weight}_bias"
        set_parameter(graph, bias, shift.to(old.dtype))
        with graph.graph.inserting_before(layer):
            node = graph.graph.get_attr(bias)
        layer.args = (*layer.args[:2], node, *layer.args[3:])
    else:
        set_parameter(graph, bias, shift.to(old.dtype))
    result.replace_all_uses_with(layer)
    graph.graph.erase_node(result)
    graph.graph.erase_node(norm)


def _value(graph: fx.GraphModule, node: fx.Node | None) -> torch.Tensor | None:
    return None if node is None else get_tensor(graph, str(node.target)).double()
