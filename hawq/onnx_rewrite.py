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


def multiply_scales(graph: GraphRewriter) -> None:
    """DequantizeLinear(codes, scale) as Cast and Mul, which a runtime folds into a float weight when it loads the file."""
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        if node.op_type != "DequantizeLinear":
            nodes.append(node)
            continue
        codes, scale = node.input[:2]
        dimensions = len(graph.initializers[codes].dims)
        shaped = graph.array(scale).reshape(-1, *(1,) * (dimensions - 1))
        factor = graph.constant(f"{scale}.{dimensions}d", shaped)
        nodes.append(helper.make_node("Cast", [codes], [f"{node.output[0]}.float"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", [f"{node.output[0]}.float", factor], [node.output[0]]))
    graph.nodes = nodes


def store_as_planes(graph: GraphRewriter, name: str, layer: QuantizedLayer) -> None:
    """Replace a layer's int8 codes by their bit planes and the operators that unpack them.

    A bit is masked out of its byte, scaled to its value in the code, and the planes are added up:
    BitwiseAnd, Cast, Mul, ReduceSum, Sub, Cast, Reshape (and Slice, where the last byte is not full).
    """
    if name not in graph.initializers:  # equal tensors are stored once, under the first one's name
        return
    del graph.initializers[name]
    bits, count, shape = layer.bits, layer.codes.numel(), tuple(layer.codes.shape)
    values = 2.0 ** (np.arange(bits)[:, None, None] - np.arange(8)[None, None, :])
    steps: list[tuple[str, list[str], dict[str, Any]]] = [
        ("BitwiseAnd", [graph.constant("bit_masks", (1 << np.arange(8)).astype(np.uint8))], {}),
        ("Cast", [], {"to": TensorProto.FLOAT}),
        ("Mul", [graph.constant(f"bit_values_{bits}", values.astype(np.float32))], {}),
        ("ReduceSum", [graph.constant("first_axis", np.array([0], np.int64))], {"keepdims": 0}),
        ("Sub", [graph.constant(f"offset_{bits}", np.array(2.0 ** (bits - 1), np.float32))], {}),
        ("Cast", [], {"to": TensorProto.INT8}),
    ]
    if count % 8:
        flat, start = np.array([-1], np.int64), np.array([0], np.int64)
        end = graph.constant(f"count_{count}", np.array([count], np.int64))
        steps.append(("Reshape", [graph.constant("flat", flat)], {}))
        steps.append(("Slice", [graph.constant("start", start), end], {}))
    steps.append(("Reshape", [graph.constant("x".join(map(str, shape)), np.array(shape, np.int64))], {}))
    value = graph.constant(f"{name}.planes", pack(layer.codes, bits).unsqueeze(2).numpy())
    nodes = []
    for position, (operator, inputs, attributes) in enumerate(steps):
        output = name if position == len(steps) - 1 else f"{name}.{position}"
        nodes.append(helper.make_node(operator, [value, *inputs], [output], **attributes))
        value = output
    graph.nodes = [*nodes, *graph.nodes]
