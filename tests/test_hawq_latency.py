"""Measured latencies: kernels as exported, cached by machine, adding up to a network's time."""

import json
import logging

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import hawq
from hawq import onnx_export, runtime
from hawq.cost import latency
from hawq.cost.latency import LatencyTable, latency_table
from hawq.cost.single_layer import LayerShape, _at_width, single_layers
from hawq.fold import folded
from hawq.graph import find_layers
from hessian.doctor import products_are_exact
from tests.networks import build


@pytest.fixture(scope="module")
def alike():
    """The widths that run on the same kernels: all, but for 8 where its products need other kernels to be exact."""
    return (2, 4, 8) if products_are_exact() else (2, 4)


@pytest.fixture(scope="module")
def chain():
    """Layers of three shapes, the second one twice."""
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Flatten(),
        nn.Linear(16 * 32 * 32, 10),
    ).eval()
    inputs = torch.randn(2, 3, 32, 32)
    return network, inputs, find_layers(folded(network, inputs))


@pytest.fixture(scope="module")
def table(chain):
    return latency_table(chain[2], (2, 4, 8))


def test_shapes_follow_the_batch(chain):
    first = LayerShape.of(chain[2]["0"], 32)
    assert (first.input, first.weight, first.bias) == ((32, 3, 32, 32), (16, 3, 3, 3), True)
    network, inputs = build("time in the batch")
    layers = find_layers(folded(network, inputs[:2]))
    assert LayerShape.of(layers["c"], 1).input == (5, 3, 8, 8)
    assert LayerShape.of(layers["fc"], 4).input == (4, 6)


@pytest.mark.parametrize(
    ("name", "layer", "activations", "wanted"),
    [("conv net", "down", 8, ["QLinearConv"]), ("volume", "out", None, ["Conv"])],
)
def test_the_kernels_are_run_by_themselves(name, layer, activations, wanted, alike):
    network, inputs = build(name)
    shape = LayerShape.of(find_layers(folded(network, inputs[:2]))[layer], 3)
    state = torch.get_rng_state()
    narrow, middle, wide = single_layers(shape, (3, 4, 8), activations)
    assert torch.equal(torch.get_rng_state(), state)
    assert [node.op_type for node in onnx.load_from_string(wide.content).graph.node] == wanted
    assert narrow.kernels == middle.kernels
    assert (narrow.kernels == wide.kernels) is (8 in alike or activations is None)
    assert narrow.content != wide.content
    assert [value.shape[0] for value in narrow.inputs.values()] == [3]
    session = runtime.open_session(wide.content, level="none")
    np.testing.assert_array_equal(session.run(None, wide.inputs)[0], next(iter(wide.outputs.values())))


def test_a_narrow_layer_is_stored_as_an_exported_one():
    network, inputs = build("a layer by itself")
    (layer,) = find_layers(folded(network, inputs[:2])).values()
    data = (inputs[:3], torch.zeros(3))
    settings = {"rounding": "nearest", "symmetric": True}
    quantized = [hawq.quantize_model(network, hawq.Allocation({layer.name: bits}), data, **settings) for bits in (8, 3)]
    at_8_bits, exported = (onnx.load_from_string(onnx_export.to_bytes(model, inputs[:3])) for model in quantized)
    for tensor in at_8_bits.graph.initializer:
        tensor.name = tensor.name.replace(f"{layer.name}.codes", "layer.codes")
    for node in at_8_bits.graph.node:
        node.input[:] = [name.replace(f"{layer.name}.codes", "layer.codes") for name in node.input]
    narrowed = _at_width(at_8_bits, quantized[0].layers()[layer.name], 3)
    assert [node.op_type for node in narrowed.graph.node] == [node.op_type for node in exported.graph.node]
    stored = [[(list(tensor.dims), tensor.data_type) for tensor in model.graph.initializer] for model in (narrowed, exported)]
    assert sorted(stored[0]) == sorted(stored[1])


def test_layers_of_one_shape_share_a_measurement_and_widths_their_kernels(chain, table, alike):
    assert list(table) == list(chain[2])
    assert table["2"] == table["4"]
    assert all(len({row[width] for width in alike}) == 1 for row in table.values())
    widths = dict.fromkeys(table, 4)
    assert table.total(widths) == pytest.approx(sum(row[4] for row in table.values()))


def test_layers_add_up_to_the_network(chain, table):
    network, inputs, layers = chain
    widths = dict.fromkeys(layers, 4)
    quantized = hawq.quantize_model(network, hawq.Allocation(widths), (inputs, torch.zeros(2)))
    content = onnx_export.to_bytes(quantized, inputs)
    measured = runtime.latencies({"quantized": content}, inputs, threads=(1,), batches=(1,))["quantized"]
    comparison = table.compare(widths, measured)
    assert comparison.layers == pytest.approx(2 * table["2"][4] + table["0"][4] + table["6"][4])
    assert comparison.measured == pytest.approx(measured["1_1"] / 1e3)
    assert comparison.layers + comparison.other == pytest.approx(comparison.measured)
    assert comparison.ratio == pytest.approx(comparison.layers / comparison.measured)
    with pytest.raises(ValueError, match=r"not measured at '1_1' \(threads_batch\), only at 2_8"):
        table.compare(widths, {"2_8": 1.0})


def test_a_budget(chain, table):
    narrow = {name: {2: 1.0, 4: 0.5, 8: 0.0} for name in chain[2]}
    total = table.total(dict.fromkeys(table, 8))
    allocation = hawq.allocate(narrow, [hawq.Budget("latency", table, total)])
    assert set(allocation.bits.values()) == {8}
    with pytest.raises(ValueError, match="latency"):
        hawq.allocate(narrow, [hawq.Budget("latency", table, 0.5 * total)])


def test_the_cache(chain, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HESSIANWARE_CACHE", str(tmp_path))
    layers = {"6": chain[2]["6"]}
    measured = []

    def fixed(shape, activations, threads):
        measured.append((shape, activations, threads))
        return {width: (1e-3 * len(measured), 1e-6) for width in range(2, 9)}

    monkeypatch.setattr(latency, "_measure", fixed)
    assert latency_table(layers, (8,))["6"] == {8: 1e-3}
    assert latency_table(layers, (2, 3))["6"] == {2: 1e-3, 3: 1e-3}
    assert len(measured) == 1
    for other in ({"threads": 2}, {"batch": 2}, {"activations": None}):
        latency_table(layers, (8,), **other)
    assert len(measured) == 4
    monkeypatch.setattr(latency, "cpu_name", lambda: "another processor")
    assert latency_table(layers, (8,)).cpu == "another processor"
    assert len(measured) == 5
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 4
    path = next(path for path in paths if json.loads(path.read_text())["machine"]["cpu"] == "another processor")
    whole = path.read_text()
    foreign = next(other for other in paths if other != path).read_text()
    negative = whole.replace("0.005", "-0.005")
    damages = [whole[:-40], "[]", foreign, negative, whole.replace('"8"', '"9"'), "\x00"]
    for damaged in damages:
        path.write_text(damaged)
        caplog.clear()
        before = len(measured)
        with caplog.at_level(logging.WARNING):
            latency_table(layers, (8,))
        assert len(measured) == before + 1
        assert "is made anew" in caplog.text
        path.write_text(whole)
    assert latency_table(layers, (8,))["6"] == {8: 5e-3}


def test_a_cache_that_cannot_be_written(chain, tmp_path, monkeypatch, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("HESSIANWARE_CACHE", str(blocked))
    monkeypatch.setattr(latency, "_measure", lambda *_: dict.fromkeys(range(2, 9), (1e-3, 1e-6)))
    with caplog.at_level(logging.WARNING):
        assert latency_table({"6": chain[2]["6"]}, (8,))["6"] == {8: 1e-3}
    assert "cannot keep latencies" in caplog.text


def test_what_cannot_be_measured(chain):
    with pytest.raises(ValueError, match="a width of 9 bits"):
        latency_table(chain[2], (9,))
    with pytest.raises(ValueError, match="0 threads and a batch of 1"):
        latency_table(chain[2], (8,), threads=0)


def test_standard_errors_are_those_of_medians():
    generator = torch.Generator().manual_seed(0)
    samples = 5 + torch.randn(400, 101, generator=generator, dtype=torch.float64)
    found = [latency._median(row.tolist()) for row in samples]
    spread = float(torch.tensor([median for median, _ in found]).std())
    assert np.mean([error for _, error in found]) == pytest.approx(spread, rel=0.15)


def test_turns_take_a_run_at_a_time():
    calls = []
    times = runtime.time_in_turns([lambda: calls.append("a"), lambda: calls.append("b")], seconds=1e-4)
    assert all(len(turns) >= 5 for turns in times)
    blocks = [name for position, name in enumerate(calls) if position == 0 or calls[position - 1] != name]
    assert blocks[-4:] == ["a", "b", "a", "b"]


def test_table_holds_what_was_measured():
    given = LatencyTable({"a": {2: (1.0, 0.1), 8: (2.0, 0.2)}}, cpu="c", runtime="r", threads=1, batch=1, activations=8)
    assert dict(given) == {"a": {2: 1.0, 8: 2.0}}
    assert given.stderr == {"a": {2: 0.1, 8: 0.2}}
    comparison = given.compare({"a": 8}, {"1_1": 2500.0})
    assert (comparison.other, comparison.ratio, comparison.stderr) == (0.5, 0.8, 0.2)
