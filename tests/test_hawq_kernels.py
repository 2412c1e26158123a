"""Every operation of an exported file has its kernel named, and a reason where it is not an integer one."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import hawq
from hawq import onnx_export, runtime
from hawq.fold import folded
from hawq.graph import find_layers
from hawq.kernels import COMPUTING, MOVING, explain_kernels
from tests.networks import build

SHAPE = [2, 4, 6, 6]
WHOLE = {
    "Add": 2,
    "AveragePool": {"kernel_shape": [2, 2]},
    "BatchNormalization": [np.ones(4, np.float32)] * 4,
    "Clip": [np.float32(0.1), np.float32(0.2)],
    "Concat": (2, {"axis": 1}),
    "DepthToSpace": {"blocksize": 2},
    "Div": 2,
    "Elu": 1,
    "Erf": 1,
    "Expand": [np.array([3, 2, 4, 6, 6])],
    "Flatten": 1,
    "Gather": [np.array([0])],
    "Gelu": 1,
    "GlobalAveragePool": 1,
    "HardSigmoid": 1,
    "Identity": 1,
    "LayerNormalization": [np.ones(6, np.float32)],
    "LeakyRelu": 1,
    "MaxPool": {"kernel_shape": [2, 2]},
    "Mul": 2,
    "Pad": [np.array([0, 0, 1, 1, 0, 0, 1, 1])],
    "Pow": 2,
    "ReduceMax": [np.array([2, 3])],
    "ReduceMean": [np.array([2, 3])],
    "Relu": 1,
    "Reshape": [np.array([2, -1])],
    "Sigmoid": 1,
    "Slice": [np.array([0]), np.array([1])],
    "Softmax": 1,
    "Sub": 2,
    "Tanh": 1,
    "Tile": [np.array([1, 2, 1, 1])],
    "Transpose": {"perm": [0, 2, 3, 1]},
    "Unsqueeze": [np.array([1])],
}


def rounded(operator, count=1, constants=(), attributes=None, shapes=None, zero_point=3) -> bytes:
    """A file in which `operator` reads dequantized bytes (and constants), and its result is rounded to bytes."""
    shapes = shapes or [SHAPE] * count
    initializers = [
        numpy_helper.from_array(np.float32(0.02), "scale"),
        numpy_helper.from_array(np.uint8(zero_point), "zero"),
        *(numpy_helper.from_array(value, f"constant{position}") for position, value in enumerate(constants)),
    ]
    inputs = [helper.make_tensor_value_info(f"x{position}", TensorProto.UINT8, shape) for position, shape in enumerate(shapes)]
    read = [f"d{position}" for position in range(len(shapes))] + [f"constant{position}" for position in range(len(constants))]
    nodes = [
        *(helper.make_node("DequantizeLinear", [value.name, "scale", "zero"], [f"d{i}"]) for i, value in enumerate(inputs)),
        helper.make_node(operator, read, ["y"], **(attributes or {})),
        helper.make_node("QuantizeLinear", ["y", "scale", "zero"], ["q"]),
    ]
    return model(nodes, inputs, "q", TensorProto.UINT8, initializers)


def model(nodes, inputs, output, kind, initializers) -> bytes:
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info(output, kind, None)], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


def convolution(bias_scale=0.02 * 0.01, zero_points=(0, 0), round_result=True, weight=None) -> bytes:
    """A convolution of dequantized bytes with int8 weights (or float ones) and an int32 bias."""
    arrays = {
        "scale": np.float32(0.02),
        "zero": np.uint8(3),
        "c.codes": np.ones((2, 3, 1, 1), np.int8),
        "c.scale": np.full(2, 0.01, np.float32),
        "c.zero": np.array(zero_points, np.int8),
        "c.bias": np.ones(2, np.int32),
        "c.bias_scale": np.full(2, bias_scale, np.float32),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "scale", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["c.codes", "c.scale", "c.zero"], ["w"], axis=0),
        helper.make_node("DequantizeLinear", ["c.bias", "c.bias_scale"], ["b"], axis=0),
        helper.make_node("Conv", ["d", "w", "b"], ["y"]),
    ]
    if weight is not None:
        arrays["c.weight"] = weight
        nodes[3].input[1] = "c.weight"
    if round_result:
        nodes.append(helper.make_node("QuantizeLinear", ["y", "scale", "zero"], ["q"]))
    output, kind = ("q", TensorProto.UINT8) if round_result else ("y", TensorProto.FLOAT)
    initializers = [numpy_helper.from_array(value, name) for name, value in arrays.items()]
    return model(nodes, [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 3, 4, 4])], output, kind, initializers)


def reasons(content: bytes, operator: str) -> list[str | None]:
    return [kernel.reason for kernel in explain_kernels(content) if kernel.kernel == operator]


@pytest.mark.parametrize("operator", sorted(WHOLE))
def test_the_runtime_agrees_on_which_operators_have_integer_kernels(operator):
    case = WHOLE[operator]
    count, attributes = case if isinstance(case, tuple) else (case if isinstance(case, int) else 1, {})
    attributes = case if isinstance(case, dict) else attributes
    content = rounded(operator, count, case if isinstance(case, list) else (), attributes)
    executed = runtime.kernels(content)
    assert ("DequantizeLinear" not in executed) == (operator in COMPUTING | MOVING)
    kernels = explain_kernels(content)
    assert Counter(kernel.kernel for kernel in kernels) == executed
    if operator in COMPUTING | MOVING:
        assert all(kernel.integer for kernel in kernels)
    else:
        assert reasons(content, operator) == [f"onnxruntime has no integer kernel for {operator}"]


def test_products_and_interpolation():
    assert runtime.kernels(rounded("MatMul", shapes=[[2, 4], [4, 3]])) == {"QLinearMatMul": 1}
    assert runtime.kernels(rounded("Gemm", shapes=[[2, 4], [4, 3]])) == {"QGemm": 1}
    scales = (np.zeros(0, np.float32), np.array([1, 1, 2, 2], np.float32))
    nearest = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
    assert [kernel.integer for kernel in explain_kernels(rounded("Resize", 1, scales, nearest))] == [True]
    linear = rounded("Resize", 1, scales, {"mode": "linear"})
    assert reasons(linear, "Resize") == ["onnxruntime has no integer kernel for Resize"]


def test_convolutions_that_do_not_fuse():
    for content in (convolution(), convolution(zero_points=(0, 1))):
        fused = explain_kernels(content)
        assert [(kernel.kernel, kernel.layer, kernel.integer) for kernel in fused] == [("QLinearConv", "c", True)]
    cases = {
        "its bias's scale is not the product of the input's and the weight's": convolution(bias_scale=0.5),
        "its result is the network's output, which is float": convolution(round_result=False),
        "its weight c.weight is stored in float": convolution(weight=np.ones((2, 3, 1, 1), np.float32)),
    }
    for reason, content in cases.items():
        assert reasons(content, "Conv") == [reason]
        assert all(kernel.reason for kernel in explain_kernels(content))


@pytest.mark.parametrize(("name", "activations"), [("branches", 8), ("tokens", 8), ("conv net", None)])
def test_every_operation_is_accounted_for(name, activations):
    network, inputs = build(name)
    layers = find_layers(folded(network, inputs[:2]))
    allocation = hawq.Allocation(dict.fromkeys(layers, 3))
    quantized = hawq.quantize_model(network, allocation, (inputs, torch.zeros(len(inputs))), activations=activations)
    content = onnx_export.to_bytes(quantized, inputs[:2])
    kernels = explain_kernels(content)
    assert Counter(kernel.kernel for kernel in kernels) == runtime.kernels(content)
    found = {kernel.layer: kernel for kernel in kernels if kernel.layer in layers}
    assert set(found) == set(layers)
    assert all(kernel.integer == (activations == 8) for kernel in found.values())
    floats = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "QuantizeLinear", "DequantizeLinear", "Cast", "Sigmoid"}
    for kernel in kernels:
        assert kernel.integer == (kernel.reason is None)
        assert not (kernel.integer and kernel.kernel in floats)
        assert "did not fuse" not in (kernel.reason or "")


def test_reasons_in_a_network():
    network, inputs = build("a module called twice")
    allocation = hawq.Allocation({"stem": 4, "fc": 4})
    quantized = hawq.quantize_model(network, allocation, (inputs, torch.zeros(len(inputs))))
    kernels = explain_kernels(onnx_export.to_bytes(quantized, inputs[:2]))
    reasons = {kernel.name: kernel.reason for kernel in kernels}
    assert reasons["stem"] is None
    assert reasons["twice"] == "its weight twice.weight is stored in float"
    assert reasons["DequantizeLinear after stem"] == "its result is read by FusedConv in float"
    assert reasons["ReduceMean after twice"] == "onnxruntime has no integer kernel for ReduceMean"
    assert reasons["QuantizeLinear after twice"] == "rounds the result of ReduceMean to bytes"
    assert reasons["Mul after fc"] == "scales the sums of the integer product, whose result is float"


def test_equal_weights_are_told_apart():
    network = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False)).eval()
    with torch.no_grad():
        network[2].weight.copy_(network[0].weight)
    inputs = torch.randn(4, 8, 3, 3)
    quantized = hawq.quantize_model(network, hawq.Allocation({"0": 4, "2": 4}), (inputs, torch.zeros(4)), bias_correction=False)
    content = onnx_export.to_bytes(quantized, inputs)
    names = {tensor.name for tensor in onnx.load_from_string(content).graph.initializer}
    layers = [kernel.layer for kernel in explain_kernels(content) if kernel.layer]
    assert layers == (["0", "2"] if "2.scale" in names else ["0", "0"])
