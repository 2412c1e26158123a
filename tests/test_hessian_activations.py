"""Traces in activations against dense Hessians in them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hessian
from tests.cases import ConvNet, SmoothNet, classification, seeded
from tests.oracles import assert_unchanged, snapshot


def dense_trace(model, loss, data, name):
    """The mean over examples of the trace of each example's Hessian in the output of one module."""
    total = 0.0
    for x, y in zip(*data, strict=True):
        module, shapes = model.get_submodule(name), []
        handle = module.register_forward_hook(lambda _m, _i, output, shapes=shapes: shapes.append(output.shape))
        model(x[None])
        handle.remove()

        def of(perturbation, x=x, y=y, module=module):
            handle = module.register_forward_hook(lambda _m, _i, output: output + perturbation.view(output.shape))
            value = loss(model(x[None]), y[None])
            handle.remove()
            return value

        zero = torch.zeros(shapes[0], dtype=torch.float64).reshape(-1)
        total += float(torch.autograd.functional.hessian(of, zero).diagonal().sum()) / len(data[1])
    return total


def test_exact_traces_of_a_piecewise_linear_network():
    model, data, loss = seeded(ConvNet), classification(4, 1, 6, 6), nn.CrossEntropyLoss()
    before, state = snapshot(model), torch.get_rng_state()
    for batches in (data, [(data[0][:3], data[1][:3]), (data[0][3:], data[1][3:])]):
        report = hessian.activation_report(model, loss, batches)
        assert list(report) == ["stem", "depthwise", "project", "down", "fc"]
        for name, row in report.items():
            assert row.exact, row.reason
            assert row.trace == pytest.approx(dense_trace(model, loss, data, name), rel=1e-9), name
    assert report["fc"].num_params == 3
    assert report["stem"].num_params == 4 * 36
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_sampled_traces_of_a_smooth_network():
    model, data, loss = seeded(SmoothNet), classification(6, 4), nn.CrossEntropyLoss()
    report = hessian.activation_report(model, loss, data, rtol=0.0, generator=torch.Generator().manual_seed(0))
    assert report["last"].exact
    assert not report["first"].exact
    assert "LayerNorm" in report["first"].reason
    assert report["last"].trace == pytest.approx(dense_trace(model, loss, data, "last"), rel=1e-9)
    hits = 0
    expected = dense_trace(model, loss, data, "first")
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        row = hessian.activation_report(model, loss, data, "first", rtol=0.0, max_probes=64, generator=generator)["first"]
        hits += abs(row.trace - expected) <= 1.96 * row.trace_stderr
    assert hits >= 52  # 95%, less three binomial deviations


def test_modules_that_are_called_twice_and_many_outputs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.wide = nn.Linear(3, 3), nn.Linear(3, 80)

        def forward(self, x):
            return self.wide(self.inner(F.relu(self.inner(x))))

    model, data = seeded(Twice), classification(3, 3, classes=80)
    report = hessian.activation_report(model, nn.CrossEntropyLoss(), data, max_probes=8)
    assert not report["inner"].exact
    assert "80" in report["inner"].reason or "64" in report["inner"].reason
    assert report["inner"].num_params == 6


def test_examples_that_mix_are_sampled():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x):
            hidden = F.relu(self.inner(x))
            return self.outer(hidden + hidden.mean(0))

    report = hessian.activation_report(seeded(Mixed), nn.CrossEntropyLoss(), classification(4, 3), max_probes=8)
    assert report["outer"].exact
    assert "rows do not belong to one example each" in report["inner"].reason


def test_errors():
    model, data = seeded(ConvNet), classification(4, 1, 6, 6)
    with pytest.raises(ValueError, match="no module matches 'steem'; the nearest names are stem"):
        hessian.activation_report(model, nn.CrossEntropyLoss(), data, "steem")
    recurrent = nn.Sequential(nn.LSTM(2, 3, batch_first=True))
    objective = hessian.Objective(
        recurrent.double(), nn.CrossEntropyLoss(), classification(4, 5, 2), forward=lambda m, b: m(b[0])[0][:, -1]
    )
    with pytest.raises(ValueError, match="output of module '0' is a tuple"):
        hessian.activation_report(objective, modules="0")
