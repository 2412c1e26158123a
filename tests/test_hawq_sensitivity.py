"""Every sensitivity against its definition: closed forms, dense float64 Hessians, brute force."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hawq
from hawq.allocation import Allocation
from hawq.graph import get_tensor
from hawq.patches import MatrixForm
from hawq.rounding import round_to_nearest
from hawq.sensitivity import METHODS, SensitivityTable, automatic_method
from hawq.sensitivity.fisher import fisher, fisher_diagonals
from hawq.sensitivity.qbert import qbert
from hawq.sensitivity.rounded import rounding_errors, squares, weight_differences, with_bias_correction
from hawq.sensitivity.second_order import is_piecewise_linear, loss_terms
from hawq.sensitivity.top_eigenvalue import TopEigenvalue, finetuning_order, precision_order, top_eigenvalue, top_eigenvalues
from hessian.objective import Objective
from tests.networks import build, case, classes
from tests.oracles import assert_unchanged, dense_gauss_newton, dense_hessian, snapshot

BITS = (2, 4)
CROSS_ENTROPY = nn.CrossEntropyLoss()


def in_double(graph, data):
    """The same network and data in float64, for oracles."""
    inputs, targets = data
    return copy.deepcopy(graph).double(), (inputs.double(), targets)


def rounded(graph, layer, bits):
    """The layer's weight rounded to nearest, written out."""
    codes, scale = round_to_nearest(get_tensor(graph, layer.weight), bits, layer.form)
    return codes * scale.view(-1, *(1,) * (codes.dim() - 1))


def loss_with(graph, layer, weight, data, loss=CROSS_ENTROPY):
    """The loss, in float64, with one weight replaced."""
    other, (inputs, targets) = in_double(graph, data)
    with torch.no_grad():
        get_tensor(other, layer.weight).copy_(weight)
        return other(inputs), loss(other(inputs), targets)


def block(graph, layer, data, loss=CROSS_ENTROPY):
    """The dense Hessian in one layer's weight, in float64."""
    other, (inputs, targets) = in_double(graph, data)
    targets = targets.double() if targets.is_floating_point() else targets
    return dense_hessian(other, lambda m: loss(m(inputs), targets), [layer.weight])


def test_a_linear_model_with_squared_error_in_closed_form():
    """H = I_o x (2 / (N o)) X^T X: trace, top eigenvalue and the quadratic form, all exact in the loss's own increase."""
    model = nn.Linear(6, 4, bias=False)
    inputs = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    data = (inputs, model(inputs).detach())  # at the minimum: the second-order term is the whole increase
    X, W = inputs.double(), model.weight.detach().double()
    gram = 2 / (32 * 4) * X.T @ X
    tables = {
        method: hawq.sensitivity(model, nn.MSELoss(), data, bits=BITS, method=method, bias_correction=False)
        for method in METHODS
    }
    for bits in BITS:
        codes, scale = round_to_nearest(model.weight, bits, MatrixForm(torch.ops.aten.linear.default, (), model.weight.shape))
        d = (codes * scale.unsqueeze(1)).double() - W
        square = float(d.square().sum())
        increase = float(F.mse_loss(X @ (W + d).T, X @ W.T))
        assert tables["weight-error"]["weight"][bits] == pytest.approx(square, rel=1e-5)
        assert tables["hessian-trace"]["weight"][bits] == pytest.approx(4 * float(gram.trace()) / 24 * square, rel=1e-4)
        top = float(torch.linalg.eigvalsh(gram)[-1])
        assert tables["top-eigenvalue"]["weight"][bits] == pytest.approx(top / 24 * square, rel=1e-3)
        assert tables["second-order"]["weight"][bits] * tables["second-order"].predicts == pytest.approx(increase, rel=1e-4)
        assert tables["kl"]["weight"][bits] * tables["kl"].predicts == pytest.approx(increase, rel=1e-4)
    assert "no class scores" in tables["kl"].note
    assert tables["second-order"].note == ""
    assert tables["fisher"].predicts is None


def test_top_eigenvalues_equal_those_of_the_dense_hessian():
    graph, layers, data = case("conv net")
    found = top_eigenvalues(Objective(graph, CROSS_ENTROPY, data), layers, generator=torch.Generator().manual_seed(0))
    truth = {name: float(torch.linalg.eigvalsh(block(graph, layer, data))[-1]) for name, layer in layers.items()}
    for name, value in truth.items():
        assert abs(found[name].value - value) <= found[name].residual + 1e-4 * value
        assert found[name].residual <= 0.011 * value
    sizes = {name: layer.num_params for name, layer in layers.items()}
    assert precision_order(layers, found) == sorted(truth, key=lambda name: truth[name] / sizes[name], reverse=True)
    errors = rounding_errors(graph, layers, BITS)
    table = hawq.sensitivity(graph, CROSS_ENTROPY, data, bits=BITS, method="top-eigenvalue")
    for name, value in truth.items():
        assert table[name][2] == pytest.approx(value / sizes[name] * errors[name][2], rel=2e-3)
    order = finetuning_order(errors, found, dict.fromkeys(layers, 2))
    assert order == sorted(truth, key=lambda name: truth[name] * errors[name][2], reverse=True)
    assert order != precision_order(layers, found)


def test_qbert_takes_the_spread_of_eigenvalues_over_disjoint_subsamples():
    """Of ten examples each is a tenth: the statistic of the ten dense matrices' top eigenvalues."""
    graph, layers, (inputs, targets) = case("functional weights", 10)
    table = hawq.sensitivity(
        graph, CROSS_ENTROPY, [(inputs[:7], targets[:7]), (inputs[7:], targets[7:])], bits=(3,), method="q-bert"
    )
    errors = rounding_errors(graph, layers, (3,))
    for name, layer in layers.items():
        values = torch.stack(
            [torch.linalg.eigvalsh(block(graph, layer, (inputs[n : n + 1], targets[n : n + 1])))[-1] for n in range(10)]
        )
        expected = float(values.mean().abs() + values.std(correction=0))
        assert table[name][3] == pytest.approx(expected / layer.num_params * errors[name][3], rel=2e-3)
        assert 0 < table.stderr[name][3] < table[name][3]


def test_qbert_error_is_the_jackknife():
    """The mean's jackknife error is s / sqrt(n); without spread |mean| + std is the mean, without error."""
    _, layers, _ = case("a layer by itself")
    (name,) = layers
    same = qbert(layers, {name: {2: 24.0}}, {name: torch.full((10,), 3.0, dtype=torch.float64)})
    assert (same[name][2], same.stderr[name][2]) == (3.0, 0.0)
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    left_out = [float(v.mean() + v.std(correction=0)) for v in (values[torch.arange(4) != index] for index in range(4))]
    mean = sum(left_out) / 4
    expected = math.sqrt(3 / 4 * sum((value - mean) ** 2 for value in left_out))
    found = qbert(layers, {name: {2: 24.0}}, {name: values})
    assert found.stderr[name][2] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["conv net", "tokens", "branches"])
def test_fisher_equals_per_example_gradients(name):
    graph, layers, data = case(name, 6)
    table = hawq.sensitivity(graph, CROSS_ENTROPY, data, bits=BITS, method="fisher")
    other, (inputs, targets) = in_double(graph, data)
    for layer_name, layer in layers.items():
        weight = get_tensor(other, layer.weight)
        gradients = [torch.autograd.grad(CROSS_ENTROPY(other(x[None]), y[None]), weight)[0] for x, y in zip(inputs, targets)]
        diagonal = torch.stack(gradients).square().mean(0)
        for bits in BITS:
            d = rounded(graph, layer, bits).double() - weight.detach()
            assert table[layer_name][bits] == pytest.approx(float((diagonal * d.square()).sum()), rel=1e-3)


def test_fisher_of_a_weight_whose_examples_cannot_be_told_apart_is_sampled_with_an_error():
    """Mean over the batch inside the network: a diagonal by products, which for few weights is exact."""
    graph, layers, data = case("time in the batch", 6)
    objective = Objective(graph, lambda outputs, targets: CROSS_ENTROPY(outputs, targets), data)
    diagonals = fisher_diagonals(objective, layers, generator=torch.Generator().manual_seed(0))
    exact = fisher_diagonals(Objective(graph, CROSS_ENTROPY, data), layers)
    errors = weight_differences(graph, layers, (2,))
    table, truth = (fisher(layers, errors, found, CROSS_ENTROPY) for found in (diagonals, exact))
    for name in layers:
        assert table[name][2] == pytest.approx(truth[name][2], abs=4 * table.stderr[name][2] + 1e-3 * truth[name][2])


def test_kl_equals_brute_force_with_the_error_of_its_mean():
    graph, layers, data = case("conv net")
    table = hawq.sensitivity(graph, CROSS_ENTROPY, data, bits=BITS, method="kl", bias_correction=False)
    before = in_double(graph, data)[0](data[0].double()).log_softmax(1)
    for name, layer in layers.items():
        for bits in BITS:
            after = loss_with(graph, layer, rounded(graph, layer, bits), data)[0].log_softmax(1)
            values = (before.exp() * (before - after)).sum(1)
            assert table[name][bits] == pytest.approx(float(values.mean()), rel=1e-3, abs=1e-9)
            assert table.stderr[name][bits] == pytest.approx(float(values.std() / math.sqrt(len(values))), rel=1e-3, abs=1e-9)
    assert table.predicts == 1.0


def test_kl_with_bias_correction_is_that_of_the_quantized_model():
    graph, layers, data = case("in place")
    table = hawq.sensitivity(graph, CROSS_ENTROPY, data, bits=(2,), method="kl")
    before = graph(data[0]).double().log_softmax(1)
    for name in layers:
        model = hawq.quantize_model(graph, Allocation({name: 2}), data, rounding="nearest", activations=None, augment=False)
        after = model(data[0]).double().log_softmax(1)
        assert table[name][2] == pytest.approx(float((before.exp() * (before - after)).sum(1).mean()), rel=1e-3)


def test_kl_leaves_out_ignored_positions():
    """Segmentation, a target a position: the mean over positions that count, whatever the batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1)).eval()
    inputs, targets = torch.randn(5, 2, 4, 4), torch.randint(0, 3, (5, 4, 4))
    targets[0, :3], targets[1:, 0] = -100, -100
    after = copy.deepcopy(model)
    with torch.no_grad():
        form = MatrixForm(torch.ops.aten.conv2d.default, (), model[0].weight.shape)
        codes, scale = round_to_nearest(model[0].weight, 2, form)
        after[0].weight.copy_(codes * scale.view(-1, 1, 1, 1))
        before, moved = model(inputs).log_softmax(1), after(inputs).log_softmax(1)
        values = (before.exp() * (before - moved)).sum(1)[targets != -100]
    batches = [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]
    table = hawq.sensitivity(model, CROSS_ENTROPY, batches, bits=(2,), method="kl", bias_correction=False)
    assert table["0"][2] == pytest.approx(float(values.mean()), rel=1e-4)


@pytest.mark.parametrize("name", ["conv net", "tokens", "branches", "time in the batch"])
def test_second_order_is_the_quadratic_form_of_the_dense_hessian(name):
    """Piecewise linear, curved (GELU, products), and with several rows an example; gradients likewise."""
    graph, layers, data = case(name, 6)
    errors = weight_differences(graph, layers, BITS)
    halves = [tuple(part[:2] for part in data), tuple(part[2:] for part in data)]
    first, second = loss_terms(Objective(graph, CROSS_ENTROPY, halves), layers, errors)
    table = hawq.sensitivity(graph, CROSS_ENTROPY, data, bits=BITS, method="second-order", bias_correction=False)
    other, (inputs, targets) = in_double(graph, data)
    for layer_name, layer in layers.items():
        matrix = block(graph, layer, data)
        (gradient,) = torch.autograd.grad(CROSS_ENTROPY(other(inputs), targets), get_tensor(other, layer.weight))
        for bits in BITS:
            d = (rounded(graph, layer, bits).double() - get_tensor(other, layer.weight).detach()).reshape(-1)
            truth = float(d @ matrix @ d)
            scale = float(d.square().sum() * torch.linalg.matrix_norm(matrix, 2))
            assert second[layer_name][bits] == pytest.approx(truth, rel=1e-3, abs=1e-5 * scale)
            assert table[layer_name][bits] == pytest.approx(max(truth, 0.0), rel=1e-3, abs=1e-5 * scale)
            expected = float(gradient.reshape(-1) @ d)
            assert first[layer_name][bits] == pytest.approx(expected, rel=1e-3, abs=1e-5 * float(gradient.norm() * d.norm()))
    assert "not at a minimum" in table.note


@pytest.mark.parametrize("name", ["conv net", "tokens", "branches", "time in the batch"])
def test_gauss_newton_is_the_quadratic_form_of_the_dense_matrix(name):
    graph, layers, data = case(name, 6)
    _, second = loss_terms(Objective(graph, CROSS_ENTROPY, data), layers, weight_differences(graph, layers, BITS))
    halves = [tuple(part[:2] for part in data), tuple(part[2:] for part in data)]
    table = hawq.sensitivity(graph, CROSS_ENTROPY, halves, bits=BITS, method="gauss-newton", bias_correction=False)
    curved = False
    for layer_name, layer in layers.items():
        other, exact = in_double(graph, data)
        matrix = dense_gauss_newton(other, CROSS_ENTROPY, exact, [layer.weight])
        for bits in BITS:
            d = (rounded(graph, layer, bits).double() - get_tensor(other, layer.weight).detach()).reshape(-1)
            assert table[layer_name][bits] == pytest.approx(float(d @ matrix @ d), rel=1e-3)
            curved |= second[layer_name][bits] != pytest.approx(float(d @ matrix @ d), rel=0.01)
    assert curved == (not is_piecewise_linear(graph, layers, data[0]))
    assert automatic_method(Objective(graph, CROSS_ENTROPY, data), layers) == ("gauss-newton" if curved else "second-order")


def test_second_order_with_bias_correction_is_the_quadratic_form_in_weight_and_bias():
    graph, layers, data = case("conv net")
    table = hawq.sensitivity(graph, CROSS_ENTROPY, data, bits=(2,), method="second-order")
    plain = hawq.sensitivity(graph, CROSS_ENTROPY, data, bits=(2,), method="second-order", bias_correction=False)
    other, (inputs, targets) = in_double(graph, data)
    for name, layer in layers.items():
        model = hawq.quantize_model(graph, Allocation({name: 2}), data, rounding="nearest", activations=None, augment=False)
        quantized = model.layers()[name]
        moves = [
            (quantized.weight().double() - get_tensor(other, layer.weight)).reshape(-1),
            (quantized.real_bias().double() - get_tensor(other, layer.bias)).reshape(-1),
        ]
        names = [layer.weight, layer.bias]
        matrix = dense_hessian(other, lambda m: CROSS_ENTROPY(m(inputs), targets), names)
        d = torch.cat(moves).detach()
        assert table[name][2] == pytest.approx(float(d @ matrix @ d), rel=2e-3)
    assert any(table[name][2] != pytest.approx(plain[name][2], rel=0.05) for name in layers)


def test_bias_correction_takes_up_the_mean_change():
    graph, layers, (inputs, targets) = case("audio, padded inside")
    errors = weight_differences(graph, layers, (2,))
    objective = Objective(graph, CROSS_ENTROPY, [(inputs[:5], targets[:5]), (inputs[5:], targets[5:])])
    corrected = with_bias_correction(objective, layers, errors)
    moved = copy.deepcopy(graph)
    layer = layers["first"]
    seen = {}
    for network, change in ((graph, None), (moved, corrected["first"][2])):
        if change is not None:
            with torch.no_grad():
                get_tensor(network, layer.weight).add_(change.weight)
                get_tensor(network, layer.bias).add_(change.bias)
        run = torch.fx.Interpreter(network, garbage_collect_values=False)
        run.run(inputs)
        seen[network] = next(value for node, value in run.env.items() if node.name == layer.node.name).mean((0, 2))
    assert torch.allclose(seen[graph], seen[moved], atol=1e-5)
    assert squares(corrected) == squares(errors)


def test_a_given_rounding_is_the_one_that_is_weighed():
    """A rounding that changes one weight by one hundredth: d is known, and so is every table."""
    graph, layers, data = case("conv net")

    def moved(name, bits):
        weight = get_tensor(graph, layers[name].weight).detach().clone()
        weight.view(-1)[0] += bits / 100
        return weight

    error = hawq.sensitivity(graph, CROSS_ENTROPY, data, bits=BITS, method="weight-error", rounded=moved)
    second = hawq.sensitivity(
        graph, CROSS_ENTROPY, data, bits=BITS, method="second-order", rounded=moved, bias_correction=False
    )
    for name, layer in layers.items():
        curvature = float(block(graph, layer, data)[0, 0])
        for bits in BITS:
            assert error[name][bits] == pytest.approx((bits / 100) ** 2, rel=1e-3)
            assert second[name][bits] == pytest.approx(max(curvature, 0) * (bits / 100) ** 2, rel=1e-2, abs=1e-9)
    with pytest.raises(ValueError, match=r"layer 'stem' at 2 bits has shape \(1,\)"):
        hawq.sensitivity(graph, CROSS_ENTROPY, data, bits=BITS, method="kl", rounded=lambda *_: torch.ones(1))


def test_a_table_survives_json():
    table = SensitivityTable({"a": {2: 0.5, 4: 0.25}}, {"a": {2: 0.1, 4: 0.0}}, "kl", 1.0, "a <note>")
    again = SensitivityTable.from_dict(json.loads(json.dumps(table.to_dict())))
    assert (dict(again), again.stderr) == (dict(table), table.stderr)
    assert (again.method, again.predicts, again.note) == ("kl", 1.0, "a <note>")
    assert "0.5 ± 0.1" in table._repr_html_()
    assert "a &lt;note&gt;" in table._repr_html_()
    for spoiled in ({}, table.to_dict() | {"version": 0}, table.to_dict() | {"stderr": {}}, table.to_dict() | {"omega": 3}):
        with pytest.raises(ValueError, match="no sensitivity table"):
            SensitivityTable.from_dict(spoiled)


def test_tables_join_in_the_units_of_the_left():
    weights = SensitivityTable({"a": {2: 4.0}}, {"a": {2: 0.0}}, "hessian-trace", 0.5)
    activations = SensitivityTable({"activation:a": {8: 1.0}}, {"activation:a": {8: 0.5}}, "activation-trace", 0.5)
    joined = weights | activations
    assert dict(joined) == {"a": {2: 4.0}, "activation:a": {8: 1.0}}
    assert (joined.stderr["activation:a"][8], joined.predicts) == (0.5, 0.5)
    divergence = SensitivityTable({"b": {2: 3.0}}, {"b": {2: 1.0}}, "kl", 1.0)
    assert (weights | divergence)["b"] == {2: 6.0}
    assert (divergence | weights)["a"] == {2: 2.0}
    with pytest.raises(ValueError, match="'weight-error' predicts no increase"):
        weights | SensitivityTable({"b": {2: 3.0}}, {"b": {2: 0.0}}, "weight-error")
    with pytest.raises(ValueError, match="row 'a' is in both tables"):
        weights | weights


@pytest.mark.parametrize("method", METHODS)
def test_no_method_depends_on_batches(method):
    graph, layers, data = case("conv net")
    before = snapshot(graph)
    batches = [tuple(part[:5] for part in data), tuple(part[5:] for part in data)]
    whole, cut = (
        hawq.sensitivity(graph, CROSS_ENTROPY, given, bits=(2, 3), method=method, generator=torch.Generator().manual_seed(0))
        for given in (data, batches)
    )
    assert_unchanged(graph, before)
    assert list(whole) == list(layers)
    for name, row in whole.items():
        assert row == pytest.approx(cut[name], rel=3e-3)
        assert all(value > 0 and math.isfinite(whole.stderr[name][bits]) for bits, value in row.items())
    assert sum(row[2] for row in whole.values()) > sum(row[3] for row in whole.values())


def test_the_model_comes_back_as_it_was():
    model, inputs = build("conv net")
    model.train()
    before = snapshot(model)
    table = hawq.sensitivity(model, CROSS_ENTROPY, (inputs, classes(3, 16)), method="auto")
    assert_unchanged(model, before)
    assert table.method == "second-order"
    with pytest.raises(ValueError, match="method 'hesian' is none of 'auto', 'hessian-trace'"):
        hawq.sensitivity(model, CROSS_ENTROPY, (inputs, classes(3, 16)), method="hesian")


def test_images_are_disturbed_only_where_labels_are_drawn():
    images = torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for outputs, loss, targets, disturbed in (
        (70, CROSS_ENTROPY, classes(70, 40), True),
        (70, nn.MSELoss(), torch.zeros(40, 70), False),
        (5, CROSS_ENTROPY, classes(5, 40), False),
    ):
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, outputs))
        asked, plain = (
            hawq.sensitivity(
                model,
                loss,
                (images, targets),
                method="hessian-trace",
                augment=augment,
                generator=torch.Generator().manual_seed(0),
            )
            for augment in (True, False)
        )
        assert (dict(asked) != dict(plain)) == disturbed


def test_traces_of_curved_networks_with_targets_of_any_shape():
    """Targets without a row for each example cannot be cut to the first examples: the batch stays whole."""
    model, inputs = build("tokens", 70)
    outputs = model(inputs)

    def loss(found, targets):
        return sum(F.cross_entropy(found, part) for part in targets) / 2

    labels = classes(outputs.shape[1], 70) if outputs.dim() == 2 else torch.zeros(70, *outputs.shape[2:], dtype=torch.long)
    table = hawq.sensitivity(model, loss, [(inputs, (labels, labels))], bits=(4,), method="hessian-trace")
    assert all(math.isfinite(row[4]) for row in table.values())


def test_residuals_bound_the_eigenvalues_error():
    _, layers, _ = case("a layer by itself")
    (name,) = layers
    table = top_eigenvalue(layers, {name: {2: 24.0}}, {name: TopEigenvalue(-1.0, 0.25)})
    assert (table[name][2], table.stderr[name][2]) == (0.25, 0.25)
