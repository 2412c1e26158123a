"""Curvature operators on what users bring: checkpointing, autocast, missing derivatives, dropout, replaced buffers."""

import copy
import dataclasses
import functools
import warnings

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F

import hessian
from tests.cases import ConvNet, SmoothNet, Tied, classification, seeded
from tests.oracles import (
    CLASS_WEIGHTS,
    assert_unchanged,
    dense_hessian,
    empirical_fisher,
    in_batches,
    names_of,
    relative_error,
    snapshot,
)


@pytest.mark.parametrize("kind", [hessian.Hessian, hessian.GaussNewton, hessian.Fisher])
def test_operators_leave_everything_as_it_was(kind):
    model, data = seeded(ConvNet).train(), classification(6, 1, 8, 8)
    model.stem.weight.requires_grad_(False)
    before, state = snapshot(model), torch.get_rng_state()
    operator = kind(model, nn.CrossEntropyLoss(), data)
    vectors = torch.randn(operator.shape[0], 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    product = operator @ vectors
    assert torch.equal(operator @ vectors, product)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not product.requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    class Checkpointed(SmoothNet):
        def forward(self, x):
            hidden = torch.utils.checkpoint.checkpoint(
                lambda y: F.gelu(self.norm(self.first(y))), x.requires_grad_(True), use_reentrant=reentrant
            )
            return self.last(hidden)

    data, loss = classification(6, 4), nn.CrossEntropyLoss()
    expected = hessian.Hessian(seeded(SmoothNet), loss, data).to_dense()
    operator = hessian.Hessian(seeded(Checkpointed), loss, (data[0].clone(), data[1]))
    for _ in range(2):  # the kept graph is used again
        assert relative_error(operator.to_dense(), expected) < 1e-12


def test_channels_last_and_autocast():
    model, data, loss = seeded(ConvNet, dtype=torch.float32), classification(6, 1, 8, 8), nn.CrossEntropyLoss()
    inputs, targets = data[0].float(), data[1]
    plain = hessian.Hessian(model, loss, (inputs, targets))
    vectors = torch.randn(plain.shape[0], 2, generator=torch.Generator().manual_seed(0))
    expected = plain @ vectors
    last = hessian.Hessian(
        copy.deepcopy(model).to(memory_format=torch.channels_last),
        loss,
        (inputs.to(memory_format=torch.channels_last), targets),
    )
    assert relative_error(last @ vectors, expected) < 1e-5

    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x).float()

    mixed = Autocast()
    found = hessian.Hessian(mixed, loss, (inputs, targets)) @ vectors
    parameters = list(mixed.parameters())
    gradients = torch.autograd.grad(loss(mixed(inputs), targets), parameters, create_graph=True)
    directions = [piece.view(p.shape) for piece, p in zip(vectors[:, 0].split([p.numel() for p in parameters]), parameters)]
    product = torch.autograd.grad(gradients, parameters, grad_outputs=directions)
    assert relative_error(found[:, 0], torch.cat([part.reshape(-1) for part in product])) < 1e-2  # bfloat16's own rounding
    assert relative_error(found, expected) < 0.2


def test_dataclass_outputs_and_dict_batches():
    @dataclasses.dataclass
    class Outputs:
        logits: torch.Tensor
        hidden: torch.Tensor

    class Wrapped(SmoothNet):
        def forward(self, x):
            hidden = self.norm(self.first(x))
            return Outputs(self.last(F.gelu(hidden)), hidden)

    data = classification(7, 4)
    model = seeded(Wrapped)
    batches = [{"x": data[0][:5], "y": data[1][:5]}, {"x": data[0][5:], "y": data[1][5:]}]
    objective = hessian.Objective(
        model,
        lambda outputs, batch: F.cross_entropy(outputs.logits, batch["y"]),
        batches,
        forward=lambda network, batch: network(batch["x"]),
    )
    plain, loss = seeded(SmoothNet), nn.CrossEntropyLoss()
    for kind in (hessian.Hessian, hessian.GaussNewton, hessian.Fisher):
        assert relative_error(kind(objective).to_dense(), kind(plain, loss, data).to_dense()) < 1e-10
    cut = hessian.Objective(
        model, objective.loss, batches, forward=objective.forward, items=lambda batch: len(batch["y"]), micro_batch=2
    )
    assert relative_error(hessian.Hessian(cut).to_dense(), hessian.Hessian(plain, loss, data).to_dense()) < 1e-10


class _OnceOnly(torch.autograd.Function):
    """x^3, differentiable once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("kind", [hessian.Hessian, hessian.GaussNewton])
def test_finite_differences_where_there_is_no_second_derivative(kind, scale):
    class Cubic(SmoothNet):
        once = True

        def forward(self, x):
            hidden = self.first(x)
            return self.last(_OnceOnly.apply(hidden) if self.once else hidden**3)

    model, data, loss = seeded(Cubic), classification(6, 4), nn.CrossEntropyLoss()
    model.once = False
    reference = kind(model, loss, data)
    vector = scale * torch.randn(reference.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = reference @ vector
    assert reference.method == "double backward"
    model.once = True
    operator, before = kind(model, loss, data), snapshot(model)
    with pytest.warns(RuntimeWarning, match="no second derivative .* finite differences"):
        found = operator @ vector
    assert operator.method == "finite differences"
    assert relative_error(found, expected) < 1e-6
    assert_unchanged(model, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(operator @ vector, found)


def test_errors_of_the_model_are_not_taken_for_missing_derivatives():
    data = classification(6, 5)
    with pytest.raises(ValueError, match="cannot be multiplied"):
        hessian.Hessian(seeded(SmoothNet), nn.CrossEntropyLoss(), data) @ torch.ones(53, dtype=torch.float64)


def test_the_kept_graph_notices_every_change():
    model, loss = seeded(ConvNet), nn.CrossEntropyLoss(weight=CLASS_WEIGHTS.clone())
    inputs, targets = classification(6, 1, 8, 8)
    operator = hessian.Hessian(model, loss, (inputs, targets))
    vector = torch.ones(operator.shape[0], dtype=torch.float64)

    def check():
        torch.testing.assert_close(
            operator @ vector, hessian.Hessian(model, loss, (inputs.clone(), targets)) @ vector, rtol=1e-12, atol=1e-14
        )

    check()
    model.stem.weight.data.mul_(1.1)  # invisible to autograd's version counter
    check()
    model.bn.running_var.mul_(2)
    check()
    inputs.add_(0.1)
    check()
    loss.weight.mul_(torch.tensor([1.0, 2.0, 1.0]))
    check()
    before = operator @ vector
    model.train()
    check()
    assert not torch.allclose(operator @ vector, before)


def test_losses_that_have_no_gauss_newton_matrix():
    model, data = seeded(SmoothNet), classification(7, 4)

    def regularized(outputs, targets):
        return F.cross_entropy(outputs, targets) + 0.1 * model.first.weight.square().sum()

    with pytest.raises(ValueError, match=r"depends on 'first\.weight' other than through the outputs"):
        hessian.GaussNewton(model, regularized, data).to_dense()
    own = hessian.Objective(
        model, lambda value, _: value, data, forward=lambda m, batch: F.cross_entropy(m(batch[0]), batch[1])
    )
    with pytest.raises(ValueError, match="the model computes its own loss"):
        hessian.GaussNewton(own).to_dense()
    assert relative_error(hessian.Hessian(own).to_dense(), hessian.Hessian(model, nn.CrossEntropyLoss(), data).to_dense()) == 0

    def contrastive(outputs, targets):
        return F.cross_entropy(outputs @ outputs.T, torch.arange(len(targets)))

    with pytest.raises(ValueError, match="is not the mean"):
        hessian.Fisher(model, contrastive, data).to_dense()


def test_memory_is_checked_before_it_is_used(monkeypatch):
    model, loss = seeded(ConvNet), nn.CrossEntropyLoss()
    data = classification(400, 1, 16, 16)
    operator = hessian.Hessian(model, loss, data)
    vector = torch.ones(operator.shape[0], dtype=torch.float64)
    monkeypatch.setattr("hessian.memory.available_bytes", lambda _: 20 * 2**20)
    with pytest.raises(MemoryError, match=r"a batch of 400 examples needs about .* use micro_batch=(\d+)") as caught:
        operator @ vector
    fits = int(str(caught.value).split("micro_batch=")[1].split(",")[0])
    assert 10 < fits < 400
    small = hessian.Hessian(model, loss, data, micro_batch=fits) @ vector
    monkeypatch.undo()
    torch.testing.assert_close(small, operator @ vector, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("parametrized", [True, False])
def test_weight_norm_whose_second_derivative_torch_gets_wrong(parametrized):
    norm = nn.utils.parametrizations.weight_norm if parametrized else nn.utils.weight_norm
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(norm(nn.Linear(4, 3, bias=False).double()))
    data, loss = classification(6, 4), nn.CrossEntropyLoss()
    names = names_of(model)
    direction_name = names[1] if parametrized else "0.weight_v"

    def by_formula(g, v):
        return loss(F.linear(data[0], v * g / v.norm(dim=1, keepdim=True)), data[1])

    tensors = [dict(model.named_parameters())[name].detach() for name in names]
    assert direction_name in names
    blocks = torch.autograd.functional.hessian(by_formula, tuple(tensors))
    sizes = [tensor.numel() for tensor in tensors]
    dense = torch.cat([torch.cat([blocks[i][j].reshape(sizes[i], sizes[j]) for j in range(2)], 1) for i in range(2)])
    assert relative_error(hessian.Hessian(model, loss, data).to_dense(), dense) < 1e-10


def test_dropout_masks_are_the_same_in_every_product():
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3)).double()
    data, loss = classification(8, 4), nn.CrossEntropyLoss()
    for batches in (data, in_batches(data, 3)):
        operator = hessian.Hessian(model, loss, batches)
        dense = operator.to_dense()
        assert torch.equal(operator.to_dense(), dense)
        assert relative_error(dense.T, dense) < 1e-12
        vector = torch.randn(len(dense), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        assert relative_error(operator.difference_product(vector), dense @ vector) < 1e-5


def test_finite_differences_see_one_dropout_mask():
    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.drop, self.last = nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3)
            self.once = True

        def forward(self, x):
            hidden = self.first(x)
            return self.last(self.drop(_OnceOnly.apply(hidden) if self.once else hidden**3))

    model, data = Once().double(), classification(8, 4)
    for kind in (hessian.Hessian, hessian.GaussNewton):
        model.once = False
        operator = kind(model, nn.CrossEntropyLoss(), data)
        vector = torch.ones(operator.shape[0], dtype=torch.float64)
        expected = operator @ vector
        model.once = True
        with pytest.warns(RuntimeWarning, match="finite differences"):
            found = kind(model, nn.CrossEntropyLoss(), data) @ vector
        assert relative_error(found, expected) < 1e-5


def test_attributes_of_modules_and_losses_count():
    model, loss = nn.Sequential(nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 3)).double(), nn.CrossEntropyLoss()
    data = classification(8, 4)
    operator = hessian.Hessian(model, loss, data)
    vector = torch.ones(operator.shape[0], dtype=torch.float64)
    for module, name, value in ((loss, "label_smoothing", 0.5), (model[1], "beta", 5.0)):
        before = operator @ vector
        setattr(module, name, value)
        assert not torch.allclose(operator @ vector, before)
        assert torch.equal(operator @ vector, hessian.Hessian(model, loss, data) @ vector)


@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        functools.partial(F.cross_entropy, ignore_index=1),
        functools.partial(F.cross_entropy, weight=CLASS_WEIGHTS),
        functools.partial(F.cross_entropy, reduction="sum"),
    ],
    ids=["function", "ignore_index", "weight", "sum"],
)
def test_functional_losses_are_weighted_as_the_modules_are(loss):
    model, (inputs, targets) = seeded(SmoothNet), classification(9, 4)
    targets[:2] = loss.keywords.get("ignore_index", -100) if isinstance(loss, functools.partial) else -100
    if isinstance(loss, functools.partial) and "weight" in loss.keywords:
        targets[:2] = 0
    whole = hessian.Hessian(model, loss, (inputs, targets)).to_dense()
    assert relative_error(hessian.Hessian(model, loss, (inputs, targets), micro_batch=2).to_dense(), whole) < 1e-10


@pytest.mark.nightly
def test_sampled_fisher_keeps_class_weights():
    model, (inputs, targets) = seeded(Tied), classification(5, 3)
    loss = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)
    expected = hessian.GaussNewton(model, loss, (inputs, targets)).to_dense()
    generator = torch.Generator().manual_seed(0)
    draws = [hessian.Fisher(model, loss, (inputs, targets), kind="sampled", generator=generator).to_dense() for _ in range(300)]
    assert relative_error(torch.stack(draws).mean(0), expected) < 0.25
    with pytest.raises(ValueError, match="weighted binary cross-entropy"):
        hessian.Fisher(model, nn.BCEWithLogitsLoss(pos_weight=CLASS_WEIGHTS), (inputs, targets), kind="sampled")


def test_buffers_that_are_replaced_come_back():
    class Counting(SmoothNet):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

        def forward(self, x):
            outputs = super().forward(x)
            self.mean = 0.9 * self.mean + 0.1 * outputs.detach().mean(0)
            return outputs

    model = seeded(Counting)
    buffer = model.mean
    operator = hessian.Hessian(model, nn.CrossEntropyLoss(), classification(6, 4))
    operator @ torch.ones(operator.shape[0], dtype=torch.float64)
    assert model.mean is buffer
    assert not bool(buffer.any())


def test_regression_on_one_number():
    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 1)

        def forward(self, x):
            return self.fc(x).squeeze(-1)

    model, inputs = Scalar().double(), classification(6, 4)[0]
    targets = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses = (model(inputs) - targets).square()
    dense = empirical_fisher(model, losses, torch.full_like(losses, 1 / 6), names_of(model))
    assert relative_error(hessian.Fisher(model, nn.MSELoss(), (inputs, targets)).to_dense(), dense) < 1e-12


def test_derivatives_and_transforms_inside_the_model():
    class Forces(nn.Module):
        """The derivative of a convolutional energy in the input, as models of forces have it."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 2, 3)

        def forward(self, x):
            x = x.detach().requires_grad_(True)
            (force,) = torch.autograd.grad(self.conv(x).tanh().square().sum(), x, create_graph=True)
            return force.flatten(1)[:, :3]

    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 3, 1, 3, generator=torch.Generator().manual_seed(0)))

        def forward(self, x):
            return torch.func.vmap(lambda w: F.conv1d(x, w).tanh().mean(2))(self.weight).mean(0)

    for build in (Forces, Mapped):
        model, data, loss = seeded(build), classification(4, 1, 6), nn.CrossEntropyLoss()
        operator = hessian.Hessian(model, loss, data)
        dense = dense_hessian(model, lambda m, data=data, loss=loss: loss(m(data[0]), data[1]), names_of(model))
        assert relative_error(operator.to_dense(), dense) < 1e-10
        assert operator.method == "double backward"


def test_losses_without_a_second_derivative_and_changed_precision():
    model, data = seeded(SmoothNet), classification(6, 4)
    with pytest.raises(ValueError, match="cannot be differentiated twice in the outputs"):
        hessian.GaussNewton(model, nn.MultiMarginLoss(), data).to_dense()
    operator = hessian.Hessian(model, nn.CrossEntropyLoss(), data)
    model.float()
    with pytest.raises(ValueError, match=r"the parameters are torch\.float32 now"):
        operator @ torch.ones(53, dtype=torch.float64)
