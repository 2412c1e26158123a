"""Sensitivities of activations against dense Hessians in them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hawq
from hawq.allocation import Allocation
from hawq.observers import activation_parameters, activation_range
from hawq.sensitivity import activation_sensitivity
from tests.networks import case, classes
from tests.oracles import assert_unchanged, snapshot

BITS = (2, 4)
CROSS_ENTROPY = nn.CrossEntropyLoss()


class TwoLayers(nn.Module):
    """Convolutions with a ReLU and a max pool between them, GELU where asked for, and a linear layer."""

    def __init__(self, curved: bool) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Conv1d(1, 2, 3), nn.Conv1d(2, 2, 2), nn.Linear(2, 3)
        self.curved = curved

    def parts(self, x):
        """The activations that are rounded, with the rest of the network behind each."""

        def behind_second(a):
            return self.fc((F.gelu(a) if self.curved else a).mean(2))

        def behind_first(a):
            return behind_second(self.second(F.max_pool1d(a, 2)))

        first = F.relu(self.first(x))
        return [
            ("x", x, lambda a: behind_first(F.relu(self.first(a)))),
            ("relu", first, behind_first),
            ("quantized_layers_second", self.second(F.max_pool1d(first, 2)), behind_second),
        ]

    def forward(self, x):
        _, activation, rest = self.parts(x)[1]
        return rest(activation)


@pytest.mark.parametrize("curved", [False, True])
def test_activation_rows_equal_the_dense_hessian_in_the_activation(curved):
    torch.manual_seed(0)
    model, inputs, targets = TwoLayers(curved).eval(), torch.randn(8, 1, 6), classes(3, 8)
    before = snapshot(model)
    batches = [(inputs[:5], targets[:5]), (inputs[5:], targets[5:])]
    table = activation_sensitivity(
        model, CROSS_ENTROPY, batches, rtol=0.02, max_probes=256, generator=torch.Generator().manual_seed(0)
    )
    assert_unchanged(model, before)
    quantized = hawq.quantize_model(model, Allocation({"first": 8, "second": 8, "fc": 8}), batches)
    assert [f"activation:{name}" for name in quantized.quantizers()] == list(table)
    other = copy.deepcopy(model).double()
    for name, activation, rest in other.parts(inputs.double()):
        activation = activation.detach()
        matrix = torch.autograd.functional.hessian(lambda a, rest=rest: CROSS_ENTROPY(rest(a), targets), activation)
        size = activation.numel()
        trace = float(matrix.reshape(size, size).trace())
        for bits in (4, 8):
            low, high = activation_range([activation.float()], bits=bits)
            scale, zero_point = activation_parameters(low, high, bits=bits)
            codes = torch.clamp(torch.round(activation / scale) + zero_point, 0, 2**bits - 1)
            error = float(((codes - zero_point) * scale - activation).square().mean())
            found, stderr = table[f"activation:{name}"][bits], table.stderr[f"activation:{name}"][bits]
            assert found == pytest.approx(max(trace * error, stderr), rel=2e-3, abs=4 * stderr)
            assert (stderr > 0) == curved
    assert table.predicts == 0.5


def test_activation_rows_predict_the_loss_of_a_linear_model():
    """y = W x with squared error: rounding x adds |W e|^2 / D, whose mean over many errors is the table's half."""
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(8, 4, bias=False)), torch.randn(4096, 8)
    data = (inputs, model(inputs).detach())
    table = activation_sensitivity(model, nn.MSELoss(), data, bits=(3, 4))
    for bits in (3, 4):
        scale, zero_point = activation_parameters(*activation_range([inputs], bits=bits), bits=bits)
        codes = torch.clamp(torch.round(inputs / scale) + zero_point, 0, 2**bits - 1)
        increase = float(F.mse_loss(model((codes - zero_point) * scale), data[1]))
        assert table.predicts * sum(row[bits] for row in table.values()) == pytest.approx(increase, rel=0.05)


def test_activation_rows_of_a_quantized_model():
    """Its own quantizers, and the curvature at its rounded weights."""
    graph, layers, data = case("in place")
    quantized = hawq.quantize_model(graph, Allocation(dict.fromkeys(layers, 8)), data)
    before = snapshot(quantized)
    found, floating = activation_sensitivity(quantized, CROSS_ENTROPY, data), activation_sensitivity(graph, CROSS_ENTROPY, data)
    assert_unchanged(quantized, before)
    assert list(found) == list(floating) == [f"activation:{name}" for name in quantized.quantizers()]
    for name in found:
        assert found[name][4] == pytest.approx(floating[name][4], rel=0.1)
    weights_only = hawq.quantize_model(graph, Allocation(dict.fromkeys(layers, 8)), data, activations=None)
    with pytest.raises(ValueError, match="float activations"):
        activation_sensitivity(weights_only, CROSS_ENTROPY, data)
    with pytest.raises(ValueError, match="a width of 9 bits"):
        activation_sensitivity(graph, CROSS_ENTROPY, data, bits=(9,))
