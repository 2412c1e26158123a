"""Rates from curvature against dense eigenvalues, and stability against iterations that diverge or do not."""

import math

import pytest
import torch
from torch import nn

import hessian
from parallel.learning_rate import (
    CurvatureRates,
    relative_rates,
    reported_rates,
    scaled_rate,
    scaled_warmup,
    stability_threshold,
)


class Quadratic(nn.Module):
    """Half of a quadratic form in the parameters of two layers, the second of two tensors."""

    def __init__(self, matrix):
        super().__init__()
        torch.manual_seed(0)
        self.matrix = matrix
        self.first, self.second = nn.Module(), nn.Module()
        self.first.weight = nn.Parameter(torch.randn(4, dtype=torch.float64))
        self.second.weight = nn.Parameter(torch.randn(2, 2, dtype=torch.float64))
        self.second.bias = nn.Parameter(torch.randn(2, dtype=torch.float64))

    def forward(self, _):
        everything = torch.cat([parameter.reshape(-1) for parameter in self.parameters()])
        return everything @ self.matrix @ everything / 2


def operator(matrix):
    model = Quadratic(matrix)
    batch = (torch.zeros(1), torch.zeros(1))
    return dict(model.named_parameters()), hessian.Hessian(model, lambda outputs, _: outputs, batch)


def matrix(coupling):
    torch.manual_seed(1)
    rotations = [torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q for size in (4, 6)]
    spectra = [[8.0, 2.0, 1.0, 0.0], [0.5, 0.3, 0.2, 0.1, 0.1, -0.2]]
    blocks = [q @ torch.diag(torch.tensor(one, dtype=torch.float64)) @ q.T for q, one in zip(rotations, spectra, strict=True)]
    whole = torch.block_diag(*blocks)
    cross = coupling * torch.randn(4, 6, dtype=torch.float64)
    whole[:4, 4:], whole[4:, :4] = cross, cross.T
    return whole


@pytest.mark.parametrize(("coupling", "tolerance"), [(0.0, 1e-2), (0.03, 0.2)])
def test_curvatures_of_layers_and_of_all_under_their_rates(coupling, tolerance):
    whole = matrix(coupling)
    parameters, product = operator(whole)
    rates = CurvatureRates(parameters, 2.0, ratio=100.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        rates.update(product, generator=generator)
    assert rates.curvatures["first"] == pytest.approx(8.0, rel=tolerance)
    assert rates.curvatures["second"] == pytest.approx(0.5, rel=tolerance)
    factors = torch.cat([torch.full((size,), rates.relative[name]).double() for name, size in (("first", 4), ("second", 6))])
    largest = torch.linalg.eigvalsh(factors.sqrt()[:, None] * whole * factors.sqrt()).abs().max()
    assert rates.largest == pytest.approx(float(largest), rel=1e-2)
    assert rates.safe_rate == pytest.approx(1 / float(largest), rel=1e-2)
    assert rates.rates(1e9) == {name: rates.safe_rate * factor for name, factor in rates.relative.items()}
    assert rates.rates(1e-9)["first"] == pytest.approx(1e-7)


def test_preconditioned():
    whole = matrix(0.0)
    parameters, product = operator(whole)
    scale = torch.rand(10, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.5
    rates = CurvatureRates(parameters, 38.0, ratio=1.0)
    for _ in range(120):
        rates.update(product, scale, torch.Generator().manual_seed(0))
    expected = torch.linalg.eigvalsh(scale.rsqrt()[:, None] * whole * scale.rsqrt()).abs().max()
    assert rates.largest == pytest.approx(float(expected), rel=1e-3)


def test_a_rise_counts_at_once_and_a_fall_by_most():
    parameters, product = operator(matrix(0.0))
    rates = CurvatureRates(parameters, 2.0, ratio=1.0)
    for _ in range(40):
        rates.update(product)
    product.objective.model.matrix = 5 * product.objective.model.matrix
    rates.update(product.anew())
    assert rates.largest == pytest.approx(40.0, rel=1e-3)
    product.objective.model.matrix = product.objective.model.matrix / 5
    rates.update(product.anew())
    assert rates.largest == pytest.approx(40 / 4 + 8 * 3 / 4, rel=1e-3)


def test_a_loss_that_saturates_halves_the_rate():
    """log(1 + |x|^2) curves ever less, and downward, as it grows."""

    class Saturating(Quadratic):
        def forward(self, inputs):
            return torch.log1p(super().forward(inputs))

    model = Saturating(torch.eye(10, dtype=torch.float64))
    product = hessian.Hessian(model, lambda outputs, _: outputs, (torch.zeros(1), torch.zeros(1)))
    rates = CurvatureRates(dict(model.named_parameters()), 2.0)
    generator = torch.Generator().manual_seed(0)

    def scale(factor):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)

    scale(0.1)
    for _ in range(10):
        rates.update(product, None, generator)
    before = rates.safe_rate
    scale(100)
    rates.update(product, None, generator)
    assert rates.safe_rate == pytest.approx(before / 2)
    for _ in range(10):
        rates.update(product, None, generator)
    assert rates.safe_rate > 10 * before  # it is a plateau, where nothing rises any more


def test_going_on_from_a_checkpoint():
    parameters, product = operator(matrix(0.3))
    through = CurvatureRates(parameters, 2.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        through.update(product, generator=generator)
    later = CurvatureRates(parameters, 2.0)
    later.load(through.state(), through.blocks.clone(), through.whole.clone())
    for rates in (through, later):
        rates.update(product, generator=torch.Generator().manual_seed(1))
    assert through.state() == later.state()


def test_curvature_that_is_zero_negative_or_not_finite():
    parameters, product = operator(torch.zeros(10, 10, dtype=torch.float64))
    rates = CurvatureRates(parameters, 2.0)
    rates.update(product)
    assert rates.safe_rate == math.inf
    assert rates.rates(0.1) == pytest.approx({"first": 1.0, "second": 1.0})
    parameters, product = operator(-torch.eye(10, dtype=torch.float64))
    rates = CurvatureRates(parameters, 2.0)
    rates.update(product)
    assert rates.safe_rate == pytest.approx(1.0)
    assert rates.relative == pytest.approx({"first": 1.0, "second": 1.0})
    parameters, product = operator(torch.full((10, 10), 1e200, dtype=torch.float64))
    with pytest.raises(ArithmeticError, match="not finite"):
        CurvatureRates(parameters, 2.0).update(1e200 * product)


def diverges(rate, optimizer, eigenvalue):
    """Whether 4,000 steps on half of eigenvalue x^2 leave the start."""
    x = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    made = optimizer([x], rate)
    for _ in range(4000):
        made.zero_grad()
        (eigenvalue * x.square().sum() / 2).backward()
        made.step()
        if not float(x.detach().abs()) < 1e3:
            return True
    return False


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_threshold_of_momentum_is_where_it_diverges(momentum):
    def make(parameters, rate):
        return torch.optim.SGD(parameters, rate, momentum=momentum)

    stable = stability_threshold(make([nn.Parameter(torch.ones(1))], 0.1)) / 7.0
    assert not diverges(0.99 * stable, make, 7.0)
    assert diverges(1.01 * stable, make, 7.0)


def test_the_threshold_of_adam_is_where_averaged_gradients_diverge():
    beta, eigenvalue = 0.9, 3.0
    stable = stability_threshold(torch.optim.AdamW([nn.Parameter(torch.ones(1))], betas=(beta, 0.999))) / eigenvalue
    for factor, expected in ((0.99, False), (1.01, True)):
        x, mean = 1.0, 0.0
        for _ in range(4000):
            mean = beta * mean + (1 - beta) * eigenvalue * x
            x -= factor * stable * mean
        assert (abs(x) > 1e3) is expected
    with pytest.raises(ValueError, match="not for RMSprop"):
        stability_threshold(torch.optim.RMSprop([nn.Parameter(torch.ones(1))]))


def test_relative_rates():
    found = relative_rates({"a": 4.0, "b": 1.0}, {"a": 1, "b": 1}, 10.0)
    assert found == pytest.approx({"a": 0.5, "b": 2.0})
    assert relative_rates({"a": 4.0, "b": -1.0}, {"a": 10**6, "b": 1}, 3.0) == pytest.approx({"a": 1.0, "b": 3.0}, rel=1e-4)
    with pytest.raises(ValueError, match=r"a ratio of 0\.5"):
        relative_rates({"a": 4.0}, {"a": 1}, 0.5)


def test_rates_from_a_report():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batch = (torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 2)
    parameters = dict(model.named_parameters())
    report = hessian.layer_report(model, nn.CrossEntropyLoss(), batch, eigenvalues=True)
    found = reported_rates(report, parameters, 100.0)
    tops = {
        layer: max(
            float(
                torch.linalg.eigvalsh(hessian.Hessian(model, nn.CrossEntropyLoss(), batch, [f"{layer}.{one}"]).to_dense())[-1]
            )
            for one in ("weight", "bias")
        )
        for layer in ("0", "2")
    }
    assert found["0"] / found["2"] == pytest.approx(tops["2"] / tops["0"], rel=1e-2)
    with pytest.raises(ValueError, match="eigenvalues=True"):
        reported_rates(hessian.layer_report(model, nn.CrossEntropyLoss(), batch), parameters, 10.0)
    with pytest.raises(ValueError, match="no parameter 'other'"):
        reported_rates(report, {"other": torch.zeros(1)}, 10.0)


def test_rules_for_other_batches():
    assert scaled_rate(0.1, 256, 64, "linear") == pytest.approx(0.4)
    assert scaled_rate(0.1, 256, 64, "sqrt") == scaled_rate(0.1, 256, 64, "legw") == pytest.approx(0.2)
    assert scaled_rate(0.1, 256, 64, "none") == scaled_rate(0.1, 256, None, "linear") == 0.1
    assert scaled_warmup(0.05, 256, 64, "legw") == pytest.approx(0.2)
    assert scaled_warmup(0.05, 2048, 64, "legw") == 0.5
    assert scaled_warmup(0.05, 256, 64, "linear") == 0.05
