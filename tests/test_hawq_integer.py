"""Integer-only inference: dyadic numbers against fractions, networks against their emulation and onnxruntime."""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import cache

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hawq
from hawq import onnx_export
from hawq.fold import folded
from hawq.graph import find_layers
from hawq.integer import compare, dyadic, integer_model
from hawq.integer.dyadic import Dyadic, shift_right
from hawq.integer.observed import ObservedRuntime
from hawq.layers import LAYERS, ActivationQuantizer
from tests.networks import ZOO, build
from tests.oracles import assert_unchanged, snapshot

IN_FLOAT = {
    "a module called twice": ["conv2d_1", "relu_1", "conv2d_2", "relu_2", "mean"],
    "branches": ["hardswish", "silu", "cat", "mean", "sigmoid", "slice_1", "unsqueeze", "unsqueeze_1", "mul_22"],
    "tokens": ["add", "layer_norm", "gelu", "add_25"],
}


def quantized(model: nn.Module, inputs: torch.Tensor, bits: int = 8) -> hawq.QuantizedModel:
    graph = folded(model, inputs[:2])
    widths = hawq.Allocation(dict.fromkeys(find_layers(graph), bits))
    return hawq.quantize_model(graph, widths, (inputs, torch.zeros(len(inputs))), rounding="nearest")


@cache
def zoo(name: str) -> tuple[hawq.QuantizedModel, torch.Tensor]:
    """A quantized network of the zoo and its inputs."""
    model, inputs = build(name, 64)
    return quantized(model, inputs), inputs


def emulated_codes(model: hawq.QuantizedModel, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """The codes of every quantizer in the emulation in float32."""
    codes = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if n.op == "call_module" and isinstance(module := self.fetch_attr(n.target), ActivationQuantizer):
                codes[n.name] = (torch.round(result / module.scale) + module.zero_point).to(torch.uint8)
            return result

    with torch.no_grad():
        Recorder(model).run(inputs)
    return codes


class NoFloat(TorchDispatchMode):
    """Raises where an operation reads or writes a tensor of floating point."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
                raise AssertionError(f"{func} in floating point")
        return result


@contextmanager
def only_integers() -> Iterator[None]:
    with NoFloat():
        yield


@given(st.floats(1e-9, 200.0), st.integers(8, 31))
@example(1 - 2.0**-40, 31)
@example(1.0, 31)
def test_a_dyadic_number_is_near_its_ratio(ratio, bits):
    number = dyadic(torch.tensor(ratio, dtype=torch.float64), bits)
    m, c = int(number.multiplier), int(number.shift)
    assert 0 < m < 2**bits
    assert 0 <= c <= 62
    error = abs(Fraction(m, 2**c) - Fraction(ratio)) / Fraction(ratio)
    assert error <= Fraction(1, 2**bits)
    if bits == 31:
        assert error <= Fraction(1, 2**30)


@given(st.integers(-(2**31), 2**31), st.integers(0, 2**31 - 1), st.integers(0, 62))
@example(3, 1, 1)
@example(5, 1, 1)
@example(-3, 1, 1)
@example(-1, 1, 1)
@example(-7, 2**30, 32)
@example(2**31, 2**31 - 1, 62)
@example(9, 7, 0)
def test_integer_rescaling_rounds_as_fractions_do(x, m, c):
    number = Dyadic(torch.tensor(m), torch.tensor(c))
    assert int(number(torch.tensor(x))) == round(Fraction(x * m, 2**c))
    assert int(shift_right(torch.tensor(x), torch.tensor(c))) == round(Fraction(x, 2**c))


def test_ratios_without_a_dyadic_number():
    with pytest.raises(ValueError, match="not finite"):
        dyadic(torch.tensor([1.0, torch.inf]))
    with pytest.raises(ValueError, match="needs more than 31 bits"):
        dyadic(torch.tensor(2.0**32))


def test_a_network_computed_in_fractions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    inputs = torch.randn(40, 6)
    network = quantized(model, inputs)
    quantizers = list(network.quantizers().values())
    values = torch.round(inputs / quantizers[0].scale).clamp(
        -int(quantizers[0].zero_point), 255 - int(quantizers[0].zero_point)
    )
    rows = [[int(value) for value in row] for row in values]
    for layer, before, after in zip(network.layers().values(), quantizers, [*quantizers[1:], None], strict=True):
        step = [Fraction(float(before.scale)) * Fraction(float(scale)) for scale in layer.scale]
        weights, bias = layer.codes.tolist(), layer.bias.tolist()
        sums = [[sum(w * v for w, v in zip(weights[c], row, strict=True)) + bias[c] for c in range(len(bias))] for row in rows]
        if after is None:
            break
        low, high = -int(after.zero_point), 255 - int(after.zero_point)
        out = Fraction(float(after.scale))
        rows = [
            [min(max(round(max(total, 0) * scale / out), low), high) for total, scale in zip(row, step, strict=True)]
            for row in sums
        ]
    wanted = torch.tensor([[float(n * scale) for n, scale in zip(row, step, strict=True)] for row in sums])
    found = integer_model(network)
    last = [name for name, grid in found.grids.items() if not grid.is_uniform][-1]
    assert found.run_integers(inputs)[last].tolist() == sums
    torch.testing.assert_close(found(inputs), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ZOO)
def test_networks_agree_with_their_emulation(name):
    network, inputs = zoo(name)
    before = snapshot(network)
    integer = integer_model(network)
    there = emulated_codes(network, inputs)
    here = integer.run_forced(inputs, there)
    assert_unchanged(network, before)
    assert list(integer.float_operations) == IN_FLOAT.get(name, [])
    assert there.keys() <= here.keys()
    apart = [(here[key].int() - codes.int()).abs() for key, codes in there.items()]
    assert max(int(item.max()) for item in apart) <= 1
    assert sum(int(item.sum()) for item in apart) <= 2
    outputs = network(inputs).detach()
    assert float((integer(inputs) - outputs).norm() / outputs.norm()) < 0.01
    assert all(grid.bound < 2**31 for grid in integer.grids.values())


@pytest.mark.parametrize("name", sorted(ZOO.keys() - IN_FLOAT.keys()))
def test_nothing_is_float_behind_the_input_quantizer(name):
    network, inputs = zoo(name)
    integer = integer_model(network)
    everything = integer.run_integers(inputs)
    codes = everything[next(iter(everything))]
    assert codes.dtype == torch.uint8
    with only_integers():
        again = integer.run_integers(codes)
    assert again.keys() == everything.keys()
    assert all(torch.equal(again[key], everything[key]) for key in again)


def test_a_float_operation_is_noticed():
    network, inputs = zoo("branches")
    integer = integer_model(network)
    codes = integer.run_integers(inputs)["activation_quantizers_x"]
    with pytest.raises(AssertionError, match="in floating point"), only_integers():
        integer.run_integers(codes)


@pytest.mark.parametrize("name", ["conv net", "branches"])
def test_codes_of_onnxruntime_differ_at_ties_alone(name):
    network, inputs = zoo(name)
    found = compare(network, inputs)
    assert found.as_shipped
    assert found.not_in_runtime == ()
    assert len(found.runtime) == len(found.emulation)
    for row in (*found.runtime, *found.emulation):
        assert row.codes > 0
        assert row.largest <= 1
        assert row.explained == row.different <= row.codes / 1000
        assert row.from_tie <= row.tolerance < 0.01
    assert found.runtime_agreement == found.emulation_agreement == 1.0
    assert list(found.float_operations) == IN_FLOAT.get(name, [])
    assert "explained by ties" in str(found)


def test_a_difference_that_is_no_tie_is_not_explained():
    network, inputs = zoo("direct convolutions")
    rough = compare(network, inputs, bits=8)
    different = sum(row.different for row in rough.runtime)
    assert different > 10
    assert sum(row.explained for row in rough.runtime) < different
    assert max(row.from_tie for row in rough.runtime) > max(row.tolerance for row in rough.runtime)


def test_the_file_of_another_network_is_refused():
    network, inputs = zoo("a layer by itself")
    model, _ = build("a layer by itself", 64)
    with pytest.raises(RuntimeError, match=r"scale in the file is not what .* has in the network"):
        compare(network, inputs, exported=onnx_export.to_bytes(quantized(model, 2 * inputs), inputs[:2]))


@torch.no_grad()
def test_the_rule_by_which_onnxruntime_rescales_a_convolution():
    network, _ = zoo("conv net")
    _, inputs = build("conv net", 512)
    seen = ObservedRuntime(network, onnx_export.to_bytes(network, inputs[:2]))(inputs)
    sums = integer_model(network).run_forced(inputs, seen.codes)
    sources, differences = network.input_quantizers(), 0
    reads = {"stem": "relu", "depthwise": "relu6", "project": "quantized_layers_project", "down": "relu_2"}
    for name, quantizer in reads.items():
        layer, after = network.layers()[name], network.quantizers()[quantizer]
        factor = network.get_submodule(sources[name]).scale * layer.scale / after.scale
        z, node = int(after.zero_point), f"activation_quantizers_{quantizer}"
        totals = sums[f"{LAYERS}_{name}"].float()
        codes = torch.round(totals * factor.view(1, -1, 1, 1)).clamp(-z, 255 - z) + z
        assert torch.equal(codes.to(torch.uint8), seen.codes[node])
        differences += int((sums[node] != seen.codes[node]).sum())
    assert differences < 50  # from exact arithmetic


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        nn.AvgPool2d((2, 3), (2, 1), (1, 1), ceil_mode=True, count_include_pad=False),
        nn.AvgPool2d(2, divisor_override=3),
        nn.AdaptiveAvgPool2d((3, 4)),
        nn.AdaptiveAvgPool2d((None, 1)),
    ],
    ids=str,
)
def test_averages_are_exact(pool):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), pool, nn.Conv2d(3, 2, 1)).eval()
    inputs = torch.randn(4, 2, 8, 7)
    integer = integer_model(quantized(model, inputs))
    values = integer.run_integers(inputs)
    pooled = next(name for name in values if name.startswith(("avg_pool", "adaptive")))
    before, grid = integer.grids["activation_quantizers_relu"], integer.grids[pooled]
    codes = values["activation_quantizers_relu"].double()  # a relu's zero point is 0
    torch.testing.assert_close(values[pooled] * grid.scale, pool(codes) * before.scale, rtol=1e-12, atol=0)
    assert int(values[pooled].max()) <= grid.bound
    assert not integer.float_operations


class Mixture(nn.Module):
    """Operations with an integer form that the zoo does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(2, 4, 3, padding=2, dilation=2)
        self.b = nn.Conv1d(2, 4, 3, padding=1)
        self.c = nn.Conv1d(8, 8, 3, groups=4)
        self.norm = nn.BatchNorm1d(8)
        self.d = nn.Conv1d(8, 4, 2, stride=2, padding="valid")
        self.fc = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = F.relu(self.a(x)), self.b(x)
        x = F.pad(F.max_pool1d(torch.cat([a, 3 * b], 1), 3, 2, 1), (1, 1), mode="reflect")
        x = self.norm(F.hardtanh(self.c(x), -0.5, 0.7))
        x = self.d(torch.clamp(x, min=-1.3) - x / 4 + 0.25)
        return 2.0 - self.fc((x * x).transpose(1, 2).flatten(1))


def test_operations_with_an_integer_form():
    torch.manual_seed(0)
    model, inputs = Mixture().eval(), torch.randn(64, 2, 16)
    network = quantized(model, inputs)
    integer = integer_model(network)
    assert not integer.float_operations
    outputs = network(inputs).detach()
    there = emulated_codes(network, inputs)
    here = integer.run_forced(inputs, there)
    apart = [(here[name].int() - codes.int()).abs() for name, codes in there.items()]
    assert max(int(item.max()) for item in apart) <= 1
    assert sum(int(item.sum()) for item in apart) <= 10
    assert float((integer(inputs) - outputs).norm() / outputs.norm()) < 1e-3
    codes = integer.run_integers(inputs)["activation_quantizers_x"]
    with only_integers():
        integer.run_integers(codes)


@torch.no_grad()
def test_layers_with_scales_for_groups_of_columns_stay_in_float():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(32, 16)
    allocation = hawq.Allocation({"0": 4, "2": 4})
    network = hawq.quantize_model(model, allocation, (inputs, inputs), group_size=8, rounding="nearest")
    integer = integer_model(network)
    assert list(integer.float_operations) == ["quantized_layers_0", "relu"]
    torch.testing.assert_close(integer(inputs), network(inputs), rtol=0, atol=1e-4)


def test_what_cannot_run_on_integers():
    model, inputs = build("a layer by itself")
    network = quantized(model, inputs)
    for bits in (7, 32):
        with pytest.raises(ValueError, match=f"multipliers of {bits} bits"):
            integer_model(network, bits=bits)
    floating = hawq.quantize_model(model, hawq.Allocation({"weight": 8}), (inputs, torch.zeros(16)), activations=None)
    with pytest.raises(ValueError, match="activations are in float"):
        integer_model(floating)


@pytest.mark.nightly
def test_a_trained_residual_network(resnet20):
    calibration = torch.stack([resnet20.train[index][0] for index in range(128)])
    inputs = torch.stack([example[0] for example in resnet20.evaluation])
    network = quantized(resnet20.model, calibration, bits=4)
    integer = integer_model(network)
    assert not integer.float_operations
    with torch.no_grad():
        assert torch.equal(integer(inputs).argmax(1), network(inputs).argmax(1))
    found = compare(network, inputs[:16])
    assert found.as_shipped
    assert found.runtime_agreement == 1.0
    assert {row.kernel for row in found.runtime} >= {"QLinearConv", "QLinearAdd"}
    for rows in (found.runtime, found.emulation):
        codes, different = sum(row.codes for row in rows), sum(row.different for row in rows)
        assert codes > 1_000_000
        assert different <= 1e-5 * codes
        assert all(row.explained == row.different and row.largest <= 1 for row in rows)
