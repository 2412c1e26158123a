"""Which kernel onnxruntime runs for each operation of an exported file, and why where it is not an integer one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hawq import runtime
from hawq.layers import LAYERS

# Operators that onnxruntime fuses with the DequantizeLinear before and the QuantizeLinear behind them into one kernel on
# bytes (its QLinear operators and QGemm).
COMPUTING = frozenset(
    (
        "Add",
        "AveragePool",
        "Concat",
        "Conv",
        "Gemm",
        "GlobalAveragePool",
        "LeakyRelu",
        "MatMul",
        "Mul",
        "Sigmoid",
        "Softmax",
    )
)
# Operators that it runs on the bytes themselves where what they read and what they give have one scale.
MOVING = frozenset(
    (
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "MaxPool",
        "ReduceMax",
        "Reshape",
        "Slice",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    )
)
_PRODUCTS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Kernel:
    """One operation of the graph that onnxruntime executes.

    name: the layer, or the operator and the layers before it. kernel: the operator. layer: the layer whose product of
    input and weight this is, None for other operations. integer: it computes on integers, or moves them. reason: why it
    does not, None where it does.
    """

    name: str
    kernel: str
    layer: str | None
    integer: bool
    reason: str | None


def explain_kernels(content: bytes) -> list[Kernel]:
    """Every operation that onnxruntime executes for the ONNX file `content`, in its order.

    The kernels' operators, counted, are those of `hawq.runtime.kernels`. Reasons are read from the graph that is left
    after the runtime's own fusions: the types of its values, where floats come from and go to, how weights are stored.
    """
    import onnx

    return _Explanation(onnx.load_from_string(content).graph, runtime.optimized(content)).kernels()


class _Graph:
    """Who makes and who reads each value."""

    def __init__(self, graph: Any) -> None:
        self.nodes = list(graph.node)
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.inputs = {value.name for value in graph.input}
        self.outputs = {value.name for value in graph.output}
        self.producers = {output: node for node in self.nodes for output in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def initializers_behind(self, names: Iterable[str], stop: Iterable[str] = ()) -> list[str]:
        """Initializers that the values `names` are computed from, without passing the values in `stop`."""
        found: list[str] = []
        seen = set(stop)
        pending = list(names)
        while pending:
            name = pending.pop(0)
            if name in seen:
                continue
            seen.add(name)
            if name in self.initializers:
                found.append(name)
            elif name in self.producers:
                pending.extend(self.producers[name].input)
        return found


class _Explanation:
    def __init__(self, exported: Any, executed: Any) -> None:
        self.exported = _Graph(exported)
        self.graph = _Graph(executed.graph)
        self.types = _value_types(executed)
        rounds = any(node.op_type == "QuantizeLinear" for node in self.exported.nodes)
        self.weights_only = not rounds and all(self.types[name] == "float" for name in self.graph.inputs)
        self.layers = self._name_layers()
        self.places = self._places()

    def kernels(self) -> list[Kernel]:
        result = []
        for position, node in enumerate(self.graph.nodes):
            reason = self._reason(node)
            layer = self.layers.get(position)
            name = layer or f"{node.op_type} {self.places[position]}"
            result.append(Kernel(name, node.op_type, layer, reason is None, reason))
        return result

    def _name_layers(self) -> dict[int, str]:
        """The layer of each product of an input and a stored weight, by the node's position.

        Fused nodes keep the names of their results and of most initializers; those behind the part of the exported graph
        that a node replaces name its weight. Equal tensors are stored once: a second reader takes the next name it has.
        """
        quantized = {_layer_of(name) for name in self.exported.initializers if name.endswith((".codes", ".codes.planes"))}
        activations = self.graph.inputs | {name for node in self.graph.nodes for name in node.output}
        named: dict[int, str] = {}
        for position, node in enumerate(self.graph.nodes):
            if not any(product in node.op_type for product in _PRODUCTS):
                continue
            inputs = [name for name in node.input if name not in activations]
            behind = self.exported.initializers_behind([*inputs, *_inside(self.exported, node, activations)], activations)
            stored = sorted(behind, key=lambda name: ".codes" not in name)
            candidates = [_layer_of(name) for name in stored if _layer_of(name) in quantized]
            if not candidates:
                candidates = [_layer_of(name) for name in stored if len(self.exported.initializers[name].dims) > 1]
            if candidates:
                free = [name for name in candidates if name not in named.values()]
                named[position] = (free or candidates)[0]
        return named

    def _places(self) -> list[str]:
        """For each node the nearest layers that its inputs come from."""
        origins: dict[str, tuple[str, ...]] = dict.fromkeys(self.graph.inputs, ("the input",))
        places = []
        for position, node in enumerate(self.graph.nodes):
            arriving = tuple(dict.fromkeys(layer for name in node.input for layer in origins.get(name, ())))
            places.append(f"after {' and '.join(arriving)}" if arriving else f"of {node.input[0]}")
            layer = self.layers.get(position)
            for name in node.output:
                origins[name] = arriving if layer is None else (layer,)
        return places

    def _reason(self, node: Any) -> str | None:
        """Why `node` does not compute on integers, None if it does."""
        if node.op_type == "QuantizeLinear":
            source = node.input[0]
            return f"rounds {'the input' if source in self.graph.inputs else self._described(source)} to bytes"
        if node.op_type == "DequantizeLinear":
            return self._why_dequantized(node)
        data = [name for name in node.input if self.types[name] == "float" and name not in self.graph.initializers]
        if "Integer" in node.op_type or node.op_type.startswith(("QLinear", "QGemm")):
            return None
        if not data:
            made = {self.types[name] for name in node.output}
            return "turns integers into floats" if "float" in made else None
        return self._why_float(node, data)

    def _why_dequantized(self, node: Any) -> str:
        name = node.output[0]
        readers = sorted({reader.op_type for reader in self.graph.readers.get(name, [])})
        if node.input[0] in self.graph.initializers:
            return f"the stored integers are read by {' and '.join(readers)} in float"
        if not readers:
            return "the network's output is float"
        also = " and is the network's output" if name in self.graph.outputs else ""
        return f"its result is read by {' and '.join(readers)} in float{also}"

    def _why_float(self, node: Any, data: list[str]) -> str:
        """Why a node that reads the floats `data` was not fused with roundings around it."""
        operator = node.op_type.removeprefix("Fused")
        if self.weights_only and any(product in operator for product in _PRODUCTS):
            return "activations are float in this file"
        if self._completes_product(node, data):
            step = "scales the sums of" if node.op_type == "Mul" else "adds the bias to"
            return f"{step} the integer product, whose result is float"
        nearest = _attribute(node, "mode", b"nearest") == b"nearest"
        if operator not in COMPUTING | MOVING and not (operator == "Resize" and nearest):
            return f"onnxruntime has no integer kernel for {node.op_type}"
        constants = [name for name in node.input if self.types[name] == "float" and name in self.graph.initializers]
        if constants and operator in _PRODUCTS:
            part = "bias" if constants[0] in node.input[2:] else "weight"
            return f"its {part} {constants[0]} is stored in float"
        if constants and operator in COMPUTING:
            return "one of its operands is a float constant"
        floats = [name for name in data if self._producer_type(name) != "DequantizeLinear"]
        if floats:
            return f"it reads {self._described(floats[0])} in float"
        if any(name in self.graph.outputs for name in node.output):
            return "its result is the network's output, which is float"
        readers = [reader for name in node.output for reader in self.graph.readers.get(name, [])]
        unrounded = sorted({reader.op_type for reader in readers if reader.op_type != "QuantizeLinear"})
        if unrounded:
            return f"its result is not rounded: {' and '.join(unrounded)} reads it in float"
        if len(readers) > 1:
            return "its result is rounded more than once"
        return self._why_not_fused(node, readers[0], operator)

    def _why_not_fused(self, node: Any, rounding: Any, operator: str) -> str:
        """Rounded on all sides, and yet in float."""
        sources = [self.graph.producers[name] for name in node.input if self._producer_type(name) == "DequantizeLinear"]
        if operator in ("Conv", "Gemm") and len(sources) == 3:
            scales = [self._array(source.input[1]) for source in sources]
            if all(scale is not None for scale in scales) and not np.array_equal(scales[2], scales[0] * scales[1]):
                return "its bias's scale is not the product of the input's and the weight's"
        if operator in MOVING and sources and list(sources[0].input[1:]) != list(rounding.input[1:]):
            return "what it reads and what it gives are rounded with different scales"
        return f"onnxruntime did not fuse {node.op_type} with the roundings around it"

    def _completes_product(self, node: Any, data: list[str]) -> bool:
        """Whether `node` multiplies the sums of an integer product by their scale, or adds the bias to it."""
        sources = [self.graph.producers.get(name) for name in data]
        sums = [source for source in sources if source is not None and self._made_of_integers(source)]
        biases = [source for source in sources if source is not None and self._is_stored_bias(source)]
        return bool(sums) and len(sums) + len(biases) == len(data) and node.op_type in ("Mul", "Add")

    def _made_of_integers(self, node: Any) -> bool:
        return "IntegerToFloat" in node.op_type or (node.op_type == "Cast" and self.types[node.input[0]] == "int32")

    def _is_stored_bias(self, node: Any) -> bool:
        return node.op_type == "DequantizeLinear" and node.input[0] in self.graph.initializers

    def _producer_type(self, name: str) -> str | None:
        return self.graph.producers[name].op_type if name in self.graph.producers else None

    def _described(self, name: str) -> str:
        return "the network's input" if name in self.graph.inputs else f"the result of {self._producer_type(name)}"

    def _array(self, name: str) -> Any:
        from onnx import numpy_helper

        return numpy_helper.to_array(self.graph.initializers[name]) if name in self.graph.initializers else None


def _value_types(model: Any) -> Mapping[str, str]:
    """The element type of every value, as the runtime itself infers it."""
    import onnx

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    names = [name for node in probe.graph.node for name in node.output if name]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = runtime.open_session(probe.SerializeToString(), level="none")
    values = (*session.get_inputs(), *session.get_outputs())
    types = {value.name: value.type.removeprefix("tensor(").removesuffix(")") for value in values}
    for tensor in model.graph.initializer:
        types[tensor.name] = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
    return types | {"": "none"}


def _inside(exported: _Graph, node: Any, activations: set[str]) -> list[str]:
    """Inputs of the exported node whose result `node` gives."""
    producers = [exported.producers[name] for name in node.output if name in exported.producers]
    return [name for producer in producers for name in producer.input if name not in activations]


def _layer_of(initializer: str) -> str:
    """A layer's name from that of one of its tensors."""
    name = initializer.removeprefix(f"{LAYERS}.").removesuffix(".planes")
    return name.removesuffix(".codes") if name.endswith(".codes") else name.rpartition(".")[0] or name


def _attribute(node: Any, name: str, default: bytes) -> bytes:
    return next((item.s for item in node.attribute if item.name == name), default)
