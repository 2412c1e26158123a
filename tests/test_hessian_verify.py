"""verify names the culprit; predictions equal their definition; the tracker follows a moving top eigenvalue."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hessian
from hessian.operators.base import LinearOperator
from tests.cases import Attention, ConvNet, SmoothNet, Tied, classification, seeded
from tests.oracles import assert_unchanged, dense_hessian, snapshot


def failed(verification):
    return {check.name: check.detail for check in verification.checks if not check.passed}


@pytest.mark.parametrize("build", [ConvNet, SmoothNet, Attention, Tied])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [hessian.Hessian, hessian.GaussNewton, hessian.Fisher])
def test_sound_operators_pass(build, dtype, kind):
    shape = {ConvNet: (9, 1, 8, 8), SmoothNet: (9, 4), Attention: (9, 4, 3), Tied: (9, 3)}[build]
    model, (inputs, targets) = seeded(build, dtype=dtype), classification(*shape, dtype=dtype)
    before, state = snapshot(model), torch.get_rng_state()
    batches = [(inputs[:5], targets[:5]), (inputs[5:], targets[5:])]
    operator = kind(model, nn.CrossEntropyLoss(), batches)
    verification = hessian.verify(operator, generator=torch.Generator().manual_seed(0))
    assert verification.ok, verification
    verification.raise_if_failed()
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert verification.to_dict()["ok"] is True
    assert len(verification.cells()) == len(verification.checks) >= 5


def test_dropout_is_named():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    problems = failed(hessian.verify(hessian.Hessian(model, nn.CrossEntropyLoss(), classification(9, 4))))
    assert "dropout '1' is on; call model.eval()" in problems["determinism"]
    assert "'1' in training mode" in problems["evaluation mode"]
    assert hessian.verify(hessian.Hessian(model.eval(), nn.CrossEntropyLoss(), classification(9, 4))).ok


def test_batch_norm_in_training_mode_is_named():
    model = seeded(ConvNet).train()
    problems = failed(hessian.verify(hessian.Hessian(model, nn.CrossEntropyLoss(), classification(10, 1, 8, 8))))
    assert "batch norm 'bn' is in training mode" in problems["batch invariance"]
    assert "'bn', 'bn2' in training mode" in problems["evaluation mode"]


def test_data_that_change_are_noticed():
    class Shuffled:
        def __init__(self):
            self.passes = 0

        def __iter__(self):
            self.passes += 1
            yield classification(9, 4, seed=self.passes)

    operator = hessian.Hessian(seeded(SmoothNet), nn.CrossEntropyLoss(), Shuffled())
    assert "data or model change from pass to pass" in failed(hessian.verify(operator))["determinism"]


def test_losses_that_are_no_means_are_noticed():
    def contrastive(outputs, targets):
        return F.cross_entropy(outputs @ outputs.T, torch.arange(len(targets)))

    operator = hessian.Hessian(seeded(SmoothNet), contrastive, classification(8, 4))
    assert "no mean over examples" in failed(hessian.verify(operator))["batch invariance"]


class _WrongBackward(torch.autograd.Function):
    """x^2 whose backward hides its dependence on x from autograd."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.x * gradient


def test_a_backward_that_cannot_be_differentiated_is_noticed():
    class Net(SmoothNet):
        def forward(self, x):
            return self.last(_WrongBackward.apply(self.first(x)))

    operator = hessian.Hessian(seeded(Net), nn.CrossEntropyLoss(), classification(8, 4))
    problems = failed(hessian.verify(operator, generator=torch.Generator().manual_seed(0)))
    assert "not the derivative of the gradient" in problems["finite differences"]
    with pytest.raises(ValueError, match="not the derivative of the gradient"):
        hessian.verify(operator, generator=torch.Generator().manual_seed(1)).raise_if_failed()


def test_asymmetry_and_nonlinearity_are_noticed():
    class Odd(LinearOperator):
        shape, dtype, device = (30, 30), torch.float64, torch.device("cpu")

        def __init__(self, function):
            self.function = function

        def _matmat(self, vectors):
            return self.function(vectors)

    matrix = torch.randn(30, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert "symmetry" in failed(hessian.verify(Odd(lambda vectors: matrix @ vectors)))
    assert "linearity" in failed(hessian.verify(Odd(lambda vectors: vectors**3)))
    assert hessian.verify(Odd(lambda vectors: (matrix + matrix.T) @ vectors)).ok


@pytest.mark.parametrize("by_name", [False, True])
def test_predicted_increase_equals_its_definition(by_name):
    model, data, loss = seeded(SmoothNet), classification(9, 4), nn.CrossEntropyLoss()
    names = [name for name, _ in model.named_parameters()]
    generator = torch.Generator().manual_seed(1)
    delta = {name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in model.named_parameters()}
    flat = torch.cat([part.reshape(-1) for part in delta.values()])
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(model(data[0]), data[1]), list(model.parameters()))])
    product = dense_hessian(model, lambda m: loss(m(data[0]), data[1]), names) @ flat
    batches = [(data[0][:4], data[1][:4]), (data[0][4:], data[1][4:])]
    found = hessian.predict_increase(model, loss, batches, delta if by_name else flat)
    assert found.first_order == pytest.approx(float(gradient @ flat), rel=1e-12)
    assert found.second_order == pytest.approx(float(flat @ product) / 2, rel=1e-12)
    assert float(found) == pytest.approx(found.first_order + found.second_order)
    sizes = [part.numel() for part in delta.values()]
    for name, g, h, d in zip(names, gradient.split(sizes), product.split(sizes), flat.split(sizes), strict=True):
        assert found.layers[name].total == pytest.approx(float(g @ d + h @ d / 2), rel=1e-10)
    assert found.cells()[-1][0] == "all"


def test_predicted_increase_is_the_loss_to_third_order():
    model, data, loss = seeded(SmoothNet), classification(9, 4), nn.CrossEntropyLoss()
    direction = torch.randn(53, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    errors = []
    for length in (1e-2, 5e-3):
        moved = copy.deepcopy(model)
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(moved.parameters()) + length * direction, moved.parameters()
        )
        true = float((loss(moved(data[0]), data[1]) - loss(model(data[0]), data[1])).detach())
        errors.append(abs(true - float(hessian.predict_increase(model, loss, data, length * direction))))
    assert errors[1] < errors[0] / 6  # a third-order remainder falls by eight


def test_predicted_increase_rejects_what_does_not_fit():
    model, data, loss = seeded(SmoothNet), classification(9, 4), nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=r"delta has shape \(3,\): pass \(53,\)"):
        hessian.predict_increase(model, loss, data, torch.ones(3))
    with pytest.raises(ValueError, match=r"delta of 'last\.bias' has shape \(2,\), the parameter \(3,\)"):
        hessian.predict_increase(model, loss, data, {"last.bias": torch.ones(2)})
    with pytest.raises(ValueError, match=r"nearest names are last\.bias"):
        hessian.predict_increase(model, loss, data, {"last.bia": torch.ones(3)})
    with pytest.raises(TypeError, match="delta is needed"):
        hessian.predict_increase(model, loss, data)


@pytest.mark.parametrize("adam", [False, True])
def test_the_tracker_follows_training_at_three_products_a_check(adam):
    model, data, loss = seeded(SmoothNet), classification(40, 4), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3) if adam else torch.optim.SGD(model.parameters(), lr=0.02)
    tracker = hessian.SharpnessTracker(model, loss, data, optimizer=optimizer if adam else None)
    state = torch.get_rng_state()
    for step in range(60):
        optimizer.zero_grad()
        loss(model(data[0]), data[1]).backward()
        optimizer.step()
        if step < 20:  # Adam's second moments change fast at first
            continue
        found = tracker.update(step)
        dense = hessian.Hessian(model, loss, data).to_dense()
        if adam:
            scale = hessian.adam_preconditioner(optimizer, hessian.Hessian(model, loss, data)).rsqrt()
            dense = scale[:, None] * dense * scale
        true = float(torch.linalg.eigvalsh(dense)[-1])
        assert abs(found.value - true) <= 0.05 * true, step
    assert all(row.num_matvecs <= 3 for row in tracker.history[1:])
    assert [row.step for row in tracker.history] == list(range(20, 60))
    assert torch.equal(torch.get_rng_state(), state)
    ax = tracker.plot()
    assert ax.get_xlabel() == "step"
    assert ax.get_legend() is None
    tracker.plot(ax, label="again")
    one, other = (container.lines[0].get_color() for container in ax.containers)
    assert one != other
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["again"]
    assert len(tracker.cells()) == 40
