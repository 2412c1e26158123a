"""Every network of the zoo through folding, rounding, saving, loading, exporting and onnxruntime."""

import copy
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import hawq
import hessian
from hawq import onnx_export, runtime, storage
from hawq.fold import folded
from hawq.graph import find_layers, float_weights, tied_layers, trace, unreached_weights
from tests.networks import ZOO, FoldedTime, Shared, build
from tests.oracles import assert_unchanged, snapshot


def all_at(model: nn.Module, inputs: torch.Tensor, bits: int) -> hawq.Allocation:
    """`model` may be its folded graph, which is not traced again."""
    return hawq.Allocation(dict.fromkeys(find_layers(folded(model, inputs[:2])), bits))


def unlabelled(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch for calibration, which reads no targets."""
    return inputs, torch.zeros(len(inputs))


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture(params=ZOO, scope="module")
def network(request):
    """A network as it is and as a folded graph, the network's state before it was traced, and inputs."""
    model, inputs = build(request.param)
    before = snapshot(model)
    return model, folded(model, inputs[:2]), before, inputs


@torch.no_grad()
def test_folding_changes_nothing(network):
    model, graph, before, inputs = network
    torch.testing.assert_close(graph(inputs), model(inputs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(graph(inputs[:3]), model(inputs[:3]), rtol=1e-4, atol=1e-5)
    assert folded(graph, inputs[:2]) is graph
    assert_unchanged(model, before)


@torch.no_grad()
@pytest.mark.parametrize("activations", [8, pytest.param(None, marks=pytest.mark.nightly)])
def test_eight_bits_stay_close_and_onnxruntime_computes_the_same(network, activations):
    model, graph, _, inputs = network
    before, state = snapshot(graph), torch.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    quantized = hawq.quantize_model(
        graph, all_at(graph, inputs, 8), unlabelled(inputs), activations=activations, generator=generator
    )
    assert_unchanged(graph, before)
    assert torch.equal(torch.get_rng_state(), state)
    wanted, outputs = model(inputs), quantized(inputs)
    assert relative_error(outputs, wanted) < (0.05 if activations else 0.01)
    in_runtime = runtime.network(onnx_export.to_bytes(quantized, inputs[:2]))
    step = relative_error(in_runtime(inputs), outputs)
    assert step < (0.02 if activations else 1e-5)  # a code may differ by one where a value lies between two
    assert relative_error(in_runtime(inputs[:1]), outputs[:1]) < (0.05 if activations else 1e-4)


@pytest.mark.nightly
@torch.no_grad()
def test_onnxruntime_computes_the_float_network(network):
    model, graph, _, inputs = network
    in_runtime = runtime.network(onnx_export.to_bytes(graph, inputs[:2]))
    torch.testing.assert_close(in_runtime(inputs), model(inputs), rtol=1e-3, atol=1e-4)


def quantized_and_loaded(model, graph, inputs: torch.Tensor, folder: Path) -> tuple[nn.Module, nn.Module]:
    """A network whose layers have all the widths, and what is loaded from its file into a network of other weights."""
    layers, before = find_layers(graph), snapshot(model)
    widths = hawq.Allocation({name: 2 + index % 7 for index, name in enumerate(layers)})
    quantized = hawq.quantize_model(model, widths, unlabelled(inputs))
    assert_unchanged(model, before)
    hawq.save(quantized, folder)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.fill_(0.5)
    return quantized, hawq.load(folder, other)


@torch.no_grad()
def test_files_give_the_same_bits_back(network, tmp_path):
    model, graph, _, inputs = network
    quantized, loaded = quantized_and_loaded(model, graph, inputs, tmp_path)
    assert torch.equal(loaded(inputs), quantized(inputs))
    assert storage.to_bytes(loaded) == storage.to_bytes(quantized)
    copied = copy.deepcopy(quantized)
    assert storage.to_bytes(copied) == storage.to_bytes(quantized)


@torch.no_grad()
def test_a_loaded_network_is_exported_as_the_saved_one(tmp_path):
    model, inputs = build("branches")
    quantized, loaded = quantized_and_loaded(model, folded(model, inputs[:2]), inputs, tmp_path)
    assert onnx_export.to_bytes(loaded, inputs[:2]) == onnx_export.to_bytes(quantized, inputs[:2])


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        *("branches", "audio, padded inside", "direct convolutions"),
        *(pytest.param(name, marks=pytest.mark.nightly) for name in ("conv net", "volume", "in place")),
    ],
)
def test_every_convolution_runs_on_integers(name):
    model, inputs = build(name)
    graph = folded(model, inputs[:2])
    quantized = hawq.quantize_model(graph, all_at(graph, inputs, 3), unlabelled(inputs))
    kernels = runtime.kernels(onnx_export.to_bytes(quantized, inputs[:2]))
    layers = find_layers(graph).values()
    convolutions = sum("conv" in str(layer.node.target) for layer in layers)
    assert kernels.get("QLinearConv", 0) == convolutions
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "BitwiseAnd"} & set(kernels)
    assert kernels.get("MatMulInteger", 0) == len(layers) - convolutions


def test_multiply_accumulates():
    model, inputs = build("conv net")
    layers = find_layers(folded(model, inputs[:2]))
    assert {name: layer.macs for name, layer in layers.items()} == {
        "stem": 12 * 12 * 4 * 9,
        "depthwise": 12 * 12 * 4 * 9,
        "project": 12 * 12 * 4 * 4,
        "down": 5 * 5 * 8 * 2 * 9,
        "fc": 8 * 3,
    }
    folded_time = FoldedTime().eval()
    layers = find_layers(folded(folded_time, torch.zeros(2, 5, 3, 8, 8)))
    assert layers["c"].macs == 5 * 6 * 6 * 6 * 27
    assert layers["fc"].macs == 6 * 5
    tokens = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    assert [layer.macs for layer in find_layers(folded(tokens, torch.zeros(2, 7, 6))).values()] == [7 * 48, 7 * 24]


def test_layers_that_read_the_same_tensor_are_tied():
    resnet20 = hessian.load_task("digits-resnet20", pretrained=False).model
    layers = find_layers(trace(resnet20, torch.zeros(2, 1, 16, 16)))
    assert len(layers) == 22
    assert tied_layers(layers) == [
        ("layer2.0.conv1", "layer2.0.downsample.0"),
        ("layer3.0.conv1", "layer3.0.downsample.0"),
    ]


def test_a_module_called_twice_stays_in_float():
    model, inputs = build("a module called twice")
    graph = folded(model, inputs[:2])
    layers = find_layers(graph)
    assert list(layers) == ["stem", "fc"]
    assert float_weights(graph, layers) == {"twice.weight": 6 * 6 * 9}


def test_bias_correction_restores_the_means():
    model, inputs = build("time in the batch", examples=64)
    outputs = {}
    for corrected in (False, True):
        quantized = hawq.quantize_model(
            model, all_at(model, inputs, 2), unlabelled(inputs), activations=None, bias_correction=corrected
        )
        outputs[corrected] = (quantized(inputs) - model(inputs)).mean(0).abs().max().item()
    assert outputs[True] < 1e-5 < outputs[False]


def test_a_channel_of_zeros_keeps_its_bias():
    model, inputs = (
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)).eval(),
        torch.rand(8, 1, 6, 6) * 255,
    )
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = 0.45
        model[0].weight[0] *= 0.01
        model[0].weight[2] *= 0.01
    quantized = hawq.quantize_model(model, all_at(model, inputs, 8), unlabelled(inputs), bias_correction=False)
    layer = quantized.layers()["0"]
    assert float(layer.real_bias()[1]) == pytest.approx(0.45, rel=1e-5)
    runtime_outputs = runtime.network(onnx_export.to_bytes(quantized, inputs[:2]))(inputs)
    assert relative_error(runtime_outputs, quantized(inputs).detach()) < 0.02


def test_tiny_weights_beside_a_large_bias_fit_32_bits():
    model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        model[0].weight[0] = 1e-12
        model[0].bias[0] = 5.0
    inputs = torch.randn(16, 4)
    quantized = hawq.quantize_model(model, all_at(model, inputs, 8), unlabelled(inputs))
    assert float(quantized.layers()["0"].real_bias()[0]) == pytest.approx(5.0, rel=1e-3)
    assert relative_error(quantized(inputs), model(inputs)) < 0.05


def test_equal_tensors_are_stored_once_and_still_shaped_for_each_reader():
    model = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.Flatten(), nn.Linear(8, 8, bias=False)).eval()
    with torch.no_grad():
        model[2].weight.copy_(model[0].weight.view(8, 8))
    inputs = torch.randn(4, 8, 1, 1)
    for activations in (8, None):
        quantized = hawq.quantize_model(
            model, all_at(model, inputs, 4), unlabelled(inputs), activations=activations, bias_correction=False
        )
        outputs = runtime.network(onnx_export.to_bytes(quantized, inputs[:2]))(inputs)
        torch.testing.assert_close(outputs, quantized(inputs), rtol=1e-3, atol=0.05)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_networks_that_cannot_be_quantized():
    inputs = torch.randn(8, 6)
    with pytest.raises(ValueError, match="must not branch on values of tensors"):
        trace(Branching(), inputs)
    with pytest.raises(ValueError, match=r"'weight' is torch\.float64: quantization starts from float32"):
        trace(nn.Linear(6, 2).double(), inputs.double())
    with pytest.raises(ValueError, match="no quantizable layer"):
        hawq.sensitivity(nn.ReLU(), nn.CrossEntropyLoss(), (inputs, torch.zeros(8).long()))
    model = nn.Linear(6, 2)
    with pytest.raises(ValueError, match="names 'fc', which is no quantizable layer; those are weight"):
        hawq.quantize_model(model, hawq.Allocation({"fc": 4}), unlabelled(inputs))
    with pytest.raises(ValueError, match="allocation is empty"):
        hawq.quantize_model(model, hawq.Allocation({}), unlabelled(inputs))
    for bits in (1, 9, 4.5):
        with pytest.raises(ValueError, match=f"a width of {bits} bits"):
            hawq.quantize_model(model, hawq.Allocation({"weight": bits}), unlabelled(inputs))
    with pytest.raises(ValueError, match="not to 1"):
        hawq.quantize_model(model, hawq.Allocation({"weight": 4}), unlabelled(inputs), activations=1)
    with pytest.raises(ValueError, match="'stochastic' is none of"):
        hawq.quantize_model(model, hawq.Allocation({"weight": 4}), unlabelled(inputs), rounding="stochastic")
    for activations in (8, None):
        with pytest.raises(ValueError, match="calibration batch 0 holds NaN or Inf"):
            hawq.quantize_model(model, hawq.Allocation({"weight": 4}), unlabelled(inputs / 0), activations=activations)
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="weight 'weight' holds NaN or Inf"):
        hawq.quantize_model(model, hawq.Allocation({"weight": 4}), unlabelled(inputs))


def test_weights_that_no_operation_uses_are_found():
    model = Shared()
    model.spare = nn.Linear(3, 3)
    assert unreached_weights(model, folded(model, torch.zeros(2, 3, 8, 8))) == ["spare.weight"]


def test_exporting_leaves_the_mode_alone():
    model, inputs = build("in place")
    model.train()
    before = snapshot(model)
    onnx_export.to_bytes(model, inputs[:2])
    assert_unchanged(model, before)


@torch.no_grad()
def test_preparations_keep_the_function_and_compose():
    model, inputs = build("tokens")
    prepared = hawq.prepared(model, [inputs], equalize=True, smooth=True)
    torch.testing.assert_close(prepared(inputs), model(inputs), rtol=1e-4, atol=1e-5)
    quantized = hawq.quantize_model(prepared, all_at(prepared, inputs, 8), unlabelled(inputs))
    assert relative_error(quantized(inputs), model(inputs)) < 0.05
    model, inputs = build("conv net")
    moved = hawq.prepared(model, [inputs + 1], reestimate_batch_norm=True)
    assert moved.meta == folded(model, inputs[:2]).meta
    assert not torch.allclose(moved(inputs), model(inputs), atol=1e-3)


def test_weights_above_what_one_file_holds_lie_beside_it(tmp_path, monkeypatch):
    model, inputs = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 5)), torch.randn(4, 32)
    hawq.export_onnx(model, tmp_path / "whole.onnx", inputs[:2])
    monkeypatch.setattr(onnx_export, "LARGEST_FILE", 1000)
    with pytest.raises(ValueError, match="more than one ONNX file holds"):
        onnx_export.to_bytes(model, inputs[:2])
    hawq.export_onnx(model, tmp_path / "model.onnx", inputs[:2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data", "whole.onnx"]
    assert (tmp_path / "model.onnx").stat().st_size < (tmp_path / "whole.onnx").stat().st_size
    onnx.checker.check_model(tmp_path / "model.onnx")
    whole, two = (onnxruntime.InferenceSession(tmp_path / name) for name in ("whole.onnx", "model.onnx"))
    for found, wanted in zip(two.run(None, {"input": inputs.numpy()}), whole.run(None, {"input": inputs.numpy()}), strict=True):
        assert (found == wanted).all()
