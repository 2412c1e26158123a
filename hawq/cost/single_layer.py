"""A layer by itself, exported at every width: the kernels that onnxruntime runs for it, without what surrounds them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import fx, nn

from hawq import runtime
from hawq.allocation import Allocation
from hawq.graph import Layer, argument
from hawq.model import quantize_model
from hawq.onnx_export import to_bytes

# What takes the input to where kernels work, and brings their results back. In a network whose neighbouring layers work
# in the same place, onnxruntime drops it.
_ARRIVING = frozenset(("QuantizeLinear", "Transpose", "ReorderInput"))
_LEAVING = frozenset(("DequantizeLinear", "Transpose", "ReorderOutput"))


@dataclass(frozen=True)
class LayerShape:
    """All of a layer that its time depends on: the operation and its settings, and the shapes of weight and input."""

    operation: Any
    settings: tuple[Any, ...]
    weight: tuple[int, ...]
    input: tuple[int, ...]
    bias: bool

    @classmethod
    def of(cls, layer: Layer, batch: int) -> "LayerShape":
        """The shape of a layer in its traced graph for that many examples."""
        source, weight = layer.node.args[0], argument(layer.node, 1)
        assert isinstance(source, fx.Node)
        assert weight is not None
        placeholder = next(node for node in layer.node.graph.nodes if node.op == "placeholder")
        traced = _hint(placeholder.meta["val"].shape[0])
        sizes = source.meta["val"].shape
        shape = tuple(size if isinstance(size, int) else _hint(size) * batch // traced for size in sizes)
        settings = tuple(layer.node.args[3:])
        return cls(layer.node.target, settings, tuple(weight.meta["val"].shape), shape, layer.bias is not None)

    def __str__(self) -> str:
        weight, given = ("x".join(map(str, shape)) for shape in (self.weight, self.input))
        bias = "with bias" if self.bias else "without bias"
        return f"{self.operation} of {given} with {weight} {bias} {list(self.settings)}"


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


@dataclass(frozen=True)
class SingleLayer:
    """An ONNX file of a layer's kernels as the runtime fused them, and values for it.

    kernels: text that is equal where the same kernels run on tensors of the same types and sizes.
    """

    content: bytes
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    kernels: str

    def run(self, threads: int) -> Callable[[], object]:
        """A function that runs the kernels on buffers given once."""
        from onnxruntime import OrtValue

        session = runtime.open_session(self.content, threads=threads, level="none")
        binding = session.io_binding()
        for name, value in self.inputs.items():
            binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(value))
        for name, value in self.outputs.items():
            binding.bind_ortvalue_output(name, OrtValue.ortvalue_from_numpy(value))
        return lambda: session.run_with_iobinding(binding)


def no_layer() -> SingleLayer:
    """A file that gives its one byte back: what a run costs whatever it computes."""
    from onnx import TensorProto, helper

    byte = helper.make_tensor_value_info("byte", TensorProto.UINT8, [1])
    graph = helper.make_graph([], "empty", [byte], [byte])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    value = {"byte": np.zeros(1, np.uint8)}
    return SingleLayer(model.SerializeToString(), value, value, "")


def single_layers(shape: LayerShape, bits: Sequence[int], activations: Literal[8] | None) -> list[SingleLayer]:
    """A layer of that shape at each width, with random weights and inputs, quantized and exported as a network's layers are."""
    generator = torch.Generator().manual_seed(0)
    network = _Layers(shape, len(bits), generator)
    inputs = torch.randn(shape.input, generator=generator)
    widths = Allocation({f"layers.{position}": width for position, width in enumerate(bits)})
    data = (inputs, torch.zeros(len(inputs)))
    quantized = quantize_model(
        network, widths, data, activations=activations, bias_correction=False, range_method="min-max", generator=generator
    )
    return _kernels(runtime.optimized(to_bytes(quantized, inputs[:2]), "all"), inputs.numpy())


class _Layers(nn.Module):
    """Layers of one shape that all read the input."""

    def __init__(self, shape: LayerShape, count: int, generator: torch.Generator) -> None:
        super().__init__()
        self.shape = shape
        self.layers = nn.ModuleList(nn.Module() for _ in range(count))
        for layer in self.layers:
            layer.weight = nn.Parameter(torch.randn(shape.weight, generator=generator))
            layer.bias = nn.Parameter(torch.randn(shape.weight[0], generator=generator)) if shape.bias else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.shape.operation(x, layer.weight, layer.bias, *self.shape.settings) for layer in self.layers)


def _kernels(model: Any, inputs: np.ndarray) -> list[SingleLayer]:
    """For each of the model's outputs the nodes that compute it, without those that only take values there and back."""
    graph = model.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    arrived = {graph.input[0].name}
    for node in graph.node:
        if node.op_type in _ARRIVING and node.input[0] in arrived:
            arrived.update(node.output)
    results = []
    for value in graph.output:
        name = value.name
        while producers[name].op_type in _LEAVING:
            name = producers[name].input[0]
        results.append(name)
    values = _values(model, inputs, arrived | set(results))
    return [_extract(model, producers, initializers, values, arrived, name) for name in results]


def _values(model: Any, inputs: np.ndarray, names: set[str]) -> dict[str, np.ndarray]:
    """The values of these names in the graph, for these inputs."""
    import onnx

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    wanted = sorted(names - {probe.graph.input[0].name})
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    session = runtime.open_session(probe.SerializeToString(), level="none")
    given = {probe.graph.input[0].name: inputs}
    return given | dict(zip(wanted, session.run(None, given), strict=True))


def _extract(
    model: Any,
    producers: dict[str, Any],
    initializers: dict[str, Any],
    values: dict[str, np.ndarray],
    arrived: set[str],
    result: str,
) -> SingleLayer:
    from onnx import helper

    needed = {result}
    nodes: list[Any] = []
    for node in reversed(model.graph.node):
        if needed & set(node.output) and not arrived & set(node.output):
            nodes.insert(0, node)
            needed.update(node.input)
    assert nodes, "the layer has no kernel of its own"
    inputs = {name: values[name] for name in sorted(needed & arrived)}
    outputs = {result: values[result]}
    described = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in (inputs | outputs).items()
    ]
    stored = [tensor for name, tensor in initializers.items() if name in needed]
    graph = helper.make_graph(nodes, "layer", described[:-1], described[-1:], stored)
    content = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version).SerializeToString()
    return SingleLayer(content, inputs, outputs, _description(nodes, initializers, values))


def _description(nodes: list[Any], initializers: dict[str, Any], values: dict[str, np.ndarray]) -> str:
    """The nodes with the types and sizes of what they read; of weights' zero points also whether there are any, which
    decides how much a kernel has to do."""
    from onnx import TensorProto, numpy_helper

    def describe(name: str) -> str:
        if name not in initializers:
            return f"{values[name].dtype} {values[name].shape}" if name in values else "result"
        tensor = initializers[name]
        shifted = tensor.data_type == TensorProto.INT8 and len(tensor.dims) < 2 and numpy_helper.to_array(tensor).any()
        return f"{tensor.data_type} {list(tensor.dims)} {shifted}"

    lines = []
    for node in nodes:
        attributes = sorted(item.SerializeToString().hex() for item in node.attribute)
        lines.append(f"{node.domain}.{node.op_type} {attributes} {[describe(name) for name in node.input]}")
    return "\n".join(lines)
