"""Rewrites of an exported ONNX graph: integer matrix products, packed weights, no byte that says nothing."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from hawq.layers import LAYERS, QUANTIZERS, QuantizedLayer
from hawq.packing import pack

_DEFAULTS = {"block_size": 0, "output_dtype": 0, "saturate": 1, "axis": 1}


class GraphRewriter:
    """A graph with its initializers by name; `finish` puts the changes back."""

    def __init__(self, graph: GraphProto) -> None:
        self.graph = graph
        self.nodes = list(graph.node)
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}

    def array(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self.initializers[name])

    def constant(self, name: str, value: np.ndarray) -> str:
        """An initializer of that name, made once."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(value, name)
        return name

    def producers(self) -> dict[str, NodeProto]:
        return {output: node for node in self.nodes for output in node.output}

    def finish(self) -> None:
        """Drop what nothing reads, give intermediate values short names, and write the graph back."""
        outputs = {value.name for value in self.graph.output}
        while True:
            read = {name for node in self.nodes for name in node.input} | outputs
            used = [node for node in self.nodes if any(name in read for name in node.output)]
            if len(used) == len(self.nodes):
                break
            self.nodes = used
        given = {value.name for value in self.graph.input} | outputs
        short: dict[str, str] = {}
        for node in self.nodes:
            for name in node.output:
                if name not in given:
                    short[name] = f"v{len(short)}"
        for name in self.initializers:
            plain = name.removeprefix(f"{LAYERS}.").replace(f"{QUANTIZERS}.", "act.", 1)
            short[name] = plain if plain not in short.values() else name
        for node in self.nodes:
            node.input[:] = [short.get(name, name) for name in node.input]
            node.output[:] = [short.get(name, name) for name in node.output]
            _strip(node)
        kept = {short[name]: tensor for name, tensor in self.initializers.items() if name in read}
        for name, tensor in kept.items():
            tensor.name = name
        for field, items in ((self.graph.node, self.nodes), (self.graph.initializer, list(kept.values()))):
            copies = [type(item).FromString(item.SerializeToString()) for item in items]
            del field[:]
            field.extend(copies)
        for value in (*self.graph.input, *self.graph.output):
            if value.type.tensor_type.shape.dim and value.type.tensor_type.shape.dim[0].dim_param:
                value.type.tensor_type.shape.dim[0].dim_param = "batch"
        del self.graph.value_info[:]
        self.graph.metadata_props.clear()


def _strip(node: NodeProto) -> None:
    """Remove names, exporter's notes and attributes that are at their default."""
    node.name = ""
    node.doc_string = ""
    node.metadata_props.clear()
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        kept = [item for item in node.attribute if _DEFAULTS.get(item.name) != item.i]
        del node.attribute[:]
        node.attribute.extend(kept)


def multiply_integers(graph: GraphRewriter) -> None:
    """Gemm of dequantized input and weight as MatMulInteger: (q_x - z) W^T + b in int32, then one product with the scale.

    onnxruntime fuses DequantizeLinear with convolutions and with MatMul, but not with Gemm.
    """
    producers = graph.producers()
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        sources = [producers.get(name) for name in node.input]
        dequantized = [source for source in sources if source is not None and source.op_type == "DequantizeLinear"]
        if node.op_type != "Gemm" or len(dequantized) < len(sources):
            nodes.append(node)
            continue
        activation, weight = dequantized[:2]
        result = node.output[0]
        scale = graph.array(activation.input[1]) * graph.array(weight.input[1])
        graph.constant(f"{result}.scale", scale.astype(np.float32))
        nodes.append(helper.make_node("Transpose", [weight.input[0]], [f"{result}.weight"], perm=[1, 0]))
        integers = [activation.input[0], f"{result}.weight", activation.input[2]]
        nodes.append(helper.make_node("MatMulInteger", integers, [f"{result}.products"]))
        total = f"{result}.products"
        if len(dequantized) > 2:
            nodes.append(helper.make_node("Add", [total, dequantized[2].input[0]], [f"{result}.sums"]))
            total = f"{result}.sums"
        nodes.append(helper.make_node("Cast", [total], [f"{result}.float"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", [f"{result}.float", f"{result}.scale"], [result]))
    graph.nodes = nodes


def derive_bias_scales(graph: GraphRewriter, input_scales: Mapping[str, str]) -> None:
    """Compute each integer bias's scale from its layer's input scale and weight scale instead of storing it.

    The float32 product is the same wherever it is taken; a runtime takes it once, when it loads the file.
    """
    products: list[NodeProto] = []
    for name, input_scale in input_scales.items():
        stored, scale = f"{LAYERS}.{name}.bias_scale", f"{LAYERS}.{name}.scale"
        if stored in graph.initializers and scale in graph.initializers and input_scale in graph.initializers:
            del graph.initializers[stored]
            products.append(helper.make_node("Mul", [input_scale, scale], [stored]))
    graph.nodes = [*products, *graph.nodes]


def multiply_scales(graph: GraphRewriter, layers: Mapping[str, QuantizedLayer]) -> None:
    """DequantizeLinear(codes, scale) of these layers as Cast and Mul, which a runtime folds into a float weight when it loads
    the file; groups of columns are told apart for it by a Reshape."""
    by_scale = {f"{LAYERS}.{name}.scale": layer for name, layer in layers.items()}
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        if node.op_type != "DequantizeLinear" or node.input[1] not in by_scale:
            nodes.append(node)
            continue
        layer, result = by_scale[node.input[1]], node.output[0]
        shape = tuple(graph.initializers[node.input[0]].dims)
        axis = next((item.i for item in node.attribute if item.name == "axis"), 1)
        values = graph.array(node.input[1])
        factor = (
            values[:, :, None] if values.ndim == 2 else values.reshape([-1 if dim == axis else 1 for dim in range(len(shape))])
        )
        scale = graph.constant(f"{node.input[1]}.{'x'.join(map(str, factor.shape))}", factor)
        nodes.append(helper.make_node("Cast", [node.input[0]], [f"{result}.float"], to=TensorProto.FLOAT))
        if layer.scale.dim() == 1:
            nodes.append(helper.make_node("Mul", [f"{result}.float", scale], [result]))
            continue
        nodes.append(helper.make_node("Reshape", [f"{result}.float", _shape(graph, _in_groups(layer))], [f"{result}.groups"]))
        nodes.append(helper.make_node("Mul", [f"{result}.groups", scale], [f"{result}.scaled"]))
        nodes.append(helper.make_node("Reshape", [f"{result}.scaled", _shape(graph, shape)], [result]))
    graph.nodes = nodes


def compact_scales(graph: GraphRewriter) -> None:
    """Store the layers' scales in float16 where that holds the same numbers; a runtime casts them back when it loads them."""
    casts: list[NodeProto] = []
    for name, tensor in list(graph.initializers.items()):
        if not name.startswith(f"{LAYERS}.") or ".scale" not in name or tensor.data_type != TensorProto.FLOAT:
            continue
        values = graph.array(name)
        half = values.astype(np.float16)
        if values.size > 1 and np.array_equal(half.astype(np.float32), values):
            del graph.initializers[name]
            casts.append(helper.make_node("Cast", [graph.constant(f"{name}.half", half)], [name], to=TensorProto.FLOAT))
    graph.nodes = [*casts, *graph.nodes]


def _in_groups(layer: QuantizedLayer) -> tuple[int, ...]:
    """The weight's shape with groups of columns apart."""
    return (*layer.scale.shape, layer.codes.shape[1] // layer.scale.shape[1])


def _shape(graph: GraphRewriter, shape: tuple[int, ...]) -> str:
    return graph.constant("x".join(map(str, shape)), np.array(shape, np.int64))


def store_as_planes(graph: GraphRewriter, name: str, layer: QuantizedLayer) -> None:
    """Replace a layer's int8 codes by their bit planes and the operators that unpack them.

    A bit is masked out of its byte, scaled to its value in the code, and the planes are added up; then the lowest code is
    added: BitwiseAnd, Cast, Mul, ReduceSum, Add, Cast, Reshape (and Slice, where the last byte is not full).
    """
    if name not in graph.initializers:  # equal tensors are stored once, under the first one's name
        return
    del graph.initializers[name]
    bits, count, shape = layer.bits, layer.codes.numel(), tuple(layer.codes.shape)
    lowest = layer.lowest_codes()
    nodes = []
    values = 2.0 ** (np.arange(bits)[:, None, None] - np.arange(8)[None, None, :])
    steps: list[tuple[str, list[str], dict[str, Any]]] = [
        ("BitwiseAnd", [graph.constant("bit_masks", (1 << np.arange(8)).astype(np.uint8))], {}),
        ("Cast", [], {"to": TensorProto.FLOAT}),
        ("Mul", [graph.constant(f"bit_values_{bits}", values.astype(np.float32))], {}),
        ("ReduceSum", [graph.constant("first_axis", np.array([0], np.int64))], {"keepdims": 0}),
    ]
    if lowest is None:
        steps.append(("Add", [graph.constant(f"lowest_{bits}", np.array(-(2.0 ** (bits - 1)), np.float32))], {}))
    if count % 8:
        flat, start = np.array([-1], np.int64), np.array([0], np.int64)
        end = graph.constant(f"count_{count}", np.array([count], np.int64))
        steps.append(("Reshape", [graph.constant("flat", flat)], {}))
        steps.append(("Slice", [graph.constant("start", start), end], {}))
    if lowest is not None:
        if lowest.dim() == 2:
            steps.append(("Reshape", [_shape(graph, _in_groups(layer))], {}))
            spread = lowest.unsqueeze(2)
        else:
            steps.append(("Reshape", [_shape(graph, shape)], {}))
            spread = layer.spread(lowest)
        stored = graph.constant(f"{name}.lowest", spread.numpy())
        nodes.append(helper.make_node("Cast", [stored], [f"{stored}.float"], to=TensorProto.FLOAT))
        steps.append(("Add", [f"{stored}.float"], {}))
    if lowest is None or lowest.dim() == 2:
        steps.append(("Reshape", [_shape(graph, shape)], {}))
    steps.append(("Cast", [], {"to": TensorProto.INT8}))
    packed = pack(layer.codes, bits, None if lowest is None else layer.spread(lowest))
    value = graph.constant(f"{name}.planes", packed.unsqueeze(2).numpy())
    for position, (operator, inputs, attributes) in enumerate(steps):
        output = name if position == len(steps) - 1 else f"{name}.{position}"
        nodes.append(helper.make_node(operator, [value, *inputs], [output], **attributes))
        value = output
    graph.nodes = [*nodes, *graph.nodes]
