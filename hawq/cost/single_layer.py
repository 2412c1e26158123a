"""A layer by itself, exported at every width: the kernels that onnxruntime runs for it, without what surrounds them."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from hawq import runtime
from hawq.affine import signed_range
from hawq.allocation import Allocation
from hawq.graph import Layer, input_node
from hawq.layers import QuantizedLayer
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
        source = input_node(layer.node)
        placeholder = next(node for node in layer.node.graph.nodes if node.op == "placeholder")
        traced = _hint(placeholder.meta["val"].shape[0])
        sizes = source.meta["val"].shape
        shape = tuple(size if isinstance(size, int) else _hint(size) * batch // traced for size in sizes)
        form = layer.form
        return cls(form.operation, form.settings, tuple(form.shape), shape, layer.bias is not None)

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
    """A layer of that shape at each width, with random weights and inputs, quantized and exported as a network's layers are.

    It is exported once, with 8 bits; for other widths its weight is then stored as `onnx_export` stores such weights.
    """
    import onnx

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(shape.input, generator=generator)
    quantized = quantize_model(
        _Network(shape, generator),
        Allocation({"layer": 8}),
        (inputs, torch.zeros(len(inputs))),
        rounding="nearest",
        activations=activations,
        augment=False,
        bias_correction=False,
        range_method="min-max",
    )
    layer = quantized.layers()["layer"]
    exported = onnx.load_from_string(to_bytes(quantized, inputs[:2]))
    files = (exported if width == 8 else _at_width(exported, layer, width) for width in bits)
    return [_kernels(runtime.optimized(file.SerializeToString(), "all"), inputs.numpy()) for file in files]


class _Network(nn.Module):
    """A network of one layer."""

    def __init__(self, shape: LayerShape, generator: torch.Generator) -> None:
        super().__init__()
        self.shape = shape
        self.layer = nn.Module()
        self.layer.register_parameter("weight", nn.Parameter(torch.randn(shape.weight, generator=generator)))
        bias = nn.Parameter(torch.randn(shape.weight[0], generator=generator)) if shape.bias else None
        self.layer.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shape.operation(x, self.layer.weight, self.layer.bias, *self.shape.settings)


def _at_width(exported: Any, layer: QuantizedLayer, width: int) -> Any:
    """The file of an 8-bit layer with its codes clipped to `width` bits and stored as such."""
    import onnx

    from hawq.onnx_rewrite import GraphRewriter, store_as_planes

    narrow = copy.deepcopy(layer)
    narrow.bits = width
    narrow.codes.clamp_(*signed_range(width))
    model = onnx.ModelProto()
    model.CopyFrom(exported)
    graph = GraphRewriter(model.graph)
    store_as_planes(graph, "layer.codes", narrow)
    graph.finish()
    return model


def _kernels(model: Any, inputs: np.ndarray) -> SingleLayer:
    """The nodes of an executed graph without those that only take values to the kernels and back."""
    from onnx import helper

    graph = model.graph
    arrived = {graph.input[0].name}
    for node in graph.node:
        if node.op_type in _ARRIVING and node.input[0] in arrived:
            arrived.update(node.output)
    producers = {name: node for node in graph.node for name in node.output}
    result = graph.output[0].name
    while producers[result].op_type in _LEAVING:
        result = producers[result].input[0]
    needed = {result}
    nodes: list[Any] = []
    for node in reversed(graph.node):
        if needed & set(node.output) and not arrived & set(node.output):
            nodes.insert(0, node)
            needed.update(node.input)
    assert nodes, "the layer has no kernel of its own"
    values = _values(model, inputs, (needed & arrived) | {result})
    given = {name: values[name] for name in sorted(needed & arrived)}
    stored = {tensor.name: tensor for tensor in graph.initializer if tensor.name in needed}
    described = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in (given | {result: values[result]}).items()
    ]
    cut = helper.make_graph(nodes, "layer", described[:-1], described[-1:], list(stored.values()))
    content = helper.make_model(cut, opset_imports=model.opset_import, ir_version=model.ir_version).SerializeToString()
    return SingleLayer(content, given, {result: values[result]}, _description(nodes, stored, values))


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
