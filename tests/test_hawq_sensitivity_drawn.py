"""Sensitivities of networks with many outputs, from labels that are drawn, against dense float64 matrices."""

import math

import pytest
import torch
from torch import nn

import hawq
from hawq.fold import folded
from hawq.graph import find_layers, get_tensor
from hawq.sensitivity import second_order
from tests.networks import case, classes
from tests.oracles import dense_gauss_newton
from tests.test_hawq_sensitivity import CROSS_ENTROPY, in_double, rounded


class Positions(nn.Module):
    """A layer whose output has no row for each example."""

    def __init__(self):
        super().__init__()
        self.positions, self.head = nn.Embedding(5, 4), nn.Linear(20, 3)

    def forward(self, x):
        return self.head((x + self.positions(torch.arange(5))).tanh().flatten(1))


def positions(examples):
    inputs = torch.randn(examples, 5, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    graph = folded(Positions(), inputs)
    return graph, find_layers(graph), (inputs, classes(3, examples))


@pytest.mark.parametrize(
    "name",
    ["conv net", "positions", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("tokens", "time in the batch"))],
)
def test_gauss_newton_of_many_outputs_has_the_quadratic_form_as_its_mean(monkeypatch, name):
    """Labels are drawn for each example; where a layer has no row for each, the whole batch's sum is squared."""
    monkeypatch.setattr(second_order, "MAX_OUTPUTS", 1)
    graph, layers, data = case(name, 6) if name != "positions" else positions(6)
    own = torch.Generator().manual_seed(0)
    tables = [
        hawq.sensitivity(graph, CROSS_ENTROPY, data, bits=(3,), method="gauss-newton", bias_correction=False, generator=own)
        for _ in range(64)
    ]
    errors = []
    for layer_name, layer in layers.items():
        other, exact = in_double(graph, data)
        matrix = dense_gauss_newton(other, CROSS_ENTROPY, exact, [layer.weight])
        d = (rounded(graph, layer, 3).double() - get_tensor(other, layer.weight).detach()).reshape(-1)
        values = torch.tensor([table[layer_name][3] for table in tables], dtype=torch.float64)
        errors.append(float((values.mean() - d @ matrix @ d) / (values.std() / len(values) ** 0.5)))
    assert max(map(abs, errors)) < 4
    assert all(0 < stderr < math.inf for stderr in (table.stderr[layer_name][3] for table in tables))


def test_auto_looks_at_outputs_and_loss():
    """65 outputs would take as many backward passes; a loss that is linear in the outputs has a Gauss-Newton matrix of zero."""
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    linear = (nn.CrossEntropyLoss(), nn.Identity())
    logarithmic = (nn.NLLLoss(), nn.LogSoftmax(1))
    for outputs, (loss, last), method in (
        (64, linear, "second-order"),
        (65, linear, "gauss-newton"),
        (64, logarithmic, "second-order"),
        (65, logarithmic, "hessian-trace"),
    ):
        model = nn.Sequential(nn.Linear(3, outputs), last)
        table = hawq.sensitivity(model, loss, (inputs, classes(outputs, 8)), method="auto")
        assert table.method == method
        assert all(omega > 0 for omega in table["0"].values())


def test_gauss_newton_needs_one_tensor():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x):
            return self.linear(x), x

    data = (torch.randn(8, 3), classes(4, 8))
    with pytest.raises(TypeError, match=r"returns a tuple.*use 'second-order'"):
        hawq.sensitivity(Two(), lambda outputs, targets: CROSS_ENTROPY(outputs[0], targets), data, method="gauss-newton")


def test_a_loss_that_sums_counts_the_examples_that_are_not_looked_at():
    data = (torch.randn(200, 3, generator=torch.Generator().manual_seed(0)), classes(70, 200))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 70))
    mean, total = (
        hawq.sensitivity(model, loss, data, method="gauss-newton", generator=torch.Generator().manual_seed(0))["0"]
        for loss in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"))
    )
    assert total == pytest.approx({bits: 200 * omega for bits, omega in mean.items()}, rel=1e-4)
