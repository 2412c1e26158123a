"""Where activations are rounded: so that every layer and every residual addition can run on integers."""

import operator
from collections.abc import Mapping
from functools import partial

import torch
from torch import fx

from hawq.graph import MOVING, only_user
from hawq.layers import QUANTIZERS, ActivationQuantizer

aten = torch.ops.aten

# Operations that clip; those that clip at 0 from below fuse into the layer or addition before them, whose range then
# starts at 0 and does the clipping.
_CLIPPING = frozenset((aten.relu.default, aten.hardtanh.default, aten.relu6.default, aten.clamp.default))
# Operations that keep the scale of their input, as padding with zeros does.
_MOVING = MOVING | {
    aten.dropout.default,
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.max_pool3d.default,
}


def insert_quantizers(graph: fx.GraphModule, layer_nodes: list[fx.Node], bits: Mapping[str, int], default: int) -> None:
    """Put one ActivationQuantizer behind every tensor that a layer, residual addition or product of two activations reads,
    and that a layer or addition writes; its width is that of its name in `bits`, else `default`.

    A layer's or addition's output is rounded after the activation function that alone reads it; values that are moved
    (reshaped, max-pooled, padded with zeros) keep their scale and pass the same quantizer again. The output of a linear
    layer is rounded only where an integer operation reads it, so that logits stay exact.
    """
    integer = _integer_nodes(graph, layer_nodes)
    sources: dict[fx.Node, list[fx.Node]] = {}  # what is rounded, and where the same values arrive after moving
    for node in graph.graph.nodes:
        if _is_product(node):
            inputs = node.all_input_nodes
        elif node not in integer or node.op == "placeholder" or _is_follower(node):
            continue
        else:
            inputs = node.all_input_nodes if _is_addition(node) else [node.args[0]]
        for read in inputs:
            source = _unmoved(read)
            arrivals = sources.setdefault(source, [])
            if read is not source and read not in arrivals:
                arrivals.append(read)
        if not _is_linear(graph, node) and not _is_product(node):
            sources.setdefault(_after_activation(node), [])
    graph.add_module(QUANTIZERS, torch.nn.Module())
    for source, arrivals in sources.items():
        quantizer = ActivationQuantizer(bits.get(source.name, default))
        graph.get_submodule(QUANTIZERS).add_module(source.name, quantizer)
        for node in (source, *arrivals):
            with graph.graph.inserting_after(node):
                rounded = graph.graph.call_module(f"{QUANTIZERS}.{source.name}", (node,))
            node.replace_all_uses_with(rounded, delete_user_cb=partial(operator.is_not, rounded))


def _integer_nodes(graph: fx.GraphModule, layer_nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes whose values can live on an 8-bit grid: inputs, layers, what follows them, and sums of two such."""
    integer = set(layer_nodes)
    for node in graph.graph.nodes:
        follows = _is_follower(node) and node.args[0] in integer
        adds = _is_addition(node) and all(read in integer for read in node.all_input_nodes)
        if node.op == "placeholder" or follows or adds:
            integer.add(node)
    return integer


def _is_follower(node: fx.Node) -> bool:
    return _fuses(node) or _moves(node)


def _fuses(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in _CLIPPING:
        return False
    if node.target in (aten.relu.default, aten.relu6.default):
        return True
    low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min", -1.0 if node.target is aten.hardtanh.default else None)
    return isinstance(low, int | float) and low == 0


def _moves(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is aten.pad.default:
        mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
        value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
        return mode != "constant" or not value
    if node.target is aten.constant_pad_nd.default:
        return not (node.args[2] if len(node.args) > 2 else node.kwargs.get("value"))
    return node.target in _MOVING


def _is_addition(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is aten.add.Tensor and len(node.all_input_nodes) == 2


def _is_product(node: fx.Node) -> bool:
    """Whether two activations are multiplied as matrices, as in attention."""
    return (
        node.op == "call_function"
        and node.target in (aten.matmul.default, aten.bmm.default)
        and all(isinstance(read, fx.Node) and read.op != "get_attr" for read in node.args)
    )


def _is_linear(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and getattr(graph.get_submodule(str(node.target)), "channel_dim", 1) == -1


def _after_activation(node: fx.Node) -> fx.Node:
    user = only_user(node)
    return user if user is not None and _fuses(user) else node


def _unmoved(node: fx.Node) -> fx.Node:
    while _moves(node):
        node = node.args[0]  # type: ignore[assignment]
    return node
