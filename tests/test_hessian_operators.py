"""Every curvature operator against dense float64 matrices, on every kind of network and loss."""

import copy
import functools
from itertools import product

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import hessian
from tests.cases import Attention, ConvNet, Depthwise, Recurrent, SmoothNet, Tied, classification, seeded
from tests.oracles import (
    CLASS_WEIGHTS,
    dense_gauss_newton,
    dense_hessian,
    empirical_fisher,
    in_batches,
    names_of,
    relative_error,
)

NETWORKS = {
    "mlp": (SmoothNet, (7, 4)),
    "cnn": (functools.partial(ConvNet, channels=2), (5, 1, 7, 6)),
    "depthwise": (Depthwise, (6, 2, 5, 6)),
    "lstm": (Recurrent, (5, 4, 2)),
    "attention": (Attention, (5, 4, 3)),
    "tied": (Tied, (6, 3)),
}


def custom(outputs, targets):
    return (outputs.sin() * F.one_hot(targets, 3)).exp().sum(1).log().mean()


def squared(outputs, targets):
    return F.mse_loss(outputs, F.one_hot(targets, 3).double())


def binary(outputs, targets):
    return F.binary_cross_entropy_with_logits(outputs, F.one_hot(targets, 3).double())


LOSSES = {
    "cross-entropy": nn.CrossEntropyLoss(),
    "smoothing": nn.CrossEntropyLoss(label_smoothing=0.1),
    "class weights": nn.CrossEntropyLoss(weight=CLASS_WEIGHTS),
    "ignore_index": nn.CrossEntropyLoss(ignore_index=1),
    "binary": binary,
    "squared": squared,
    "custom": custom,
}
EVERY_NETWORK = pytest.mark.parametrize(("build", "shape"), NETWORKS.values(), ids=NETWORKS)


def _pair(network: str, loss: str):
    """All of them nightly; before that every network with two losses, and every loss with one network."""
    marks = [] if network == "mlp" or loss in ("cross-entropy", "custom") else [pytest.mark.nightly]
    return pytest.param(*NETWORKS[network], LOSSES[loss], id=f"{network}-{loss}", marks=marks)


EVERY_PAIR = pytest.mark.parametrize(("build", "shape", "loss"), [_pair(*pair) for pair in product(NETWORKS, LOSSES)])


@EVERY_PAIR
def test_hessian(build, shape, loss):
    model, data = seeded(build), classification(*shape)
    operator = hessian.Hessian(model, loss, data)
    with sdpa_kernel(SDPBackend.MATH):
        dense = dense_hessian(model, lambda m: loss(m(data[0]), data[1]), names_of(model))
    assert relative_error(operator.to_dense(), dense) < 1e-10
    cut = hessian.Hessian(model, loss, in_batches(data, 2), micro_batch=1)
    assert relative_error(cut.to_dense(), dense) < 1e-10


@EVERY_PAIR
def test_gauss_newton(build, shape, loss):
    model, data = seeded(build), classification(*shape)
    with sdpa_kernel(SDPBackend.MATH):
        dense = dense_gauss_newton(model, loss, data, names_of(model))
    assert relative_error(hessian.GaussNewton(model, loss, data).to_dense(), dense) < 1e-10
    assert relative_error(hessian.GaussNewton(model, loss, in_batches(data, 3)).to_dense(), dense) < 1e-10
    assert relative_error(hessian.GaussNewton(model, loss, data, micro_batch=2).to_dense(), dense) < 1e-10


@EVERY_NETWORK
def test_empirical_fisher(build, shape):
    model, data = seeded(build), classification(*shape)
    with sdpa_kernel(SDPBackend.MATH):
        losses = F.cross_entropy(model(data[0]), data[1], reduction="none")
        dense = empirical_fisher(model, losses, torch.full_like(losses, 1 / len(losses)), names_of(model))
    assert relative_error(hessian.Fisher(model, nn.CrossEntropyLoss(), data).to_dense(), dense) < 1e-10
    cut = hessian.Fisher(model, lambda outputs, targets: F.cross_entropy(outputs, targets), in_batches(data, 2))
    assert relative_error(cut.to_dense(), dense) < 1e-10


@pytest.mark.parametrize("name", ["class weights", "ignore_index", "smoothing"])
def test_empirical_fisher_counts_items_as_the_loss_does(name):
    model, data, loss = seeded(SmoothNet), classification(9, 4), LOSSES[name]
    valid = data[1] != loss.ignore_index
    single = [copy.copy(loss) for _ in range(9)]
    losses = torch.stack(
        [one(model(x[None]), y[None]) for one, x, y, counts in zip(single, *data, valid, strict=True) if counts]
    )
    weights = torch.ones(9, dtype=torch.float64) if loss.weight is None else loss.weight[data[1]]
    shares = weights[valid] / weights[valid].sum()
    dense = empirical_fisher(model, losses, shares, names_of(model))
    assert relative_error(hessian.Fisher(model, loss, data).to_dense(), dense) < 1e-10
    assert relative_error(hessian.Fisher(model, loss, in_batches(data, 4)).to_dense(), dense) < 1e-10


def test_tokens_are_items():
    """Targets (N, T): a loss, and a gradient in the Fisher matrix, for every token that is not ignored."""
    model = nn.Conv1d(2, 3, 3, padding=1).double()
    inputs = torch.randn(4, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(0, 3, (4, 5), generator=torch.Generator().manual_seed(1))
    targets[0, 2:] = targets[3, 4:] = -100
    losses = F.cross_entropy(model(inputs), targets, reduction="none")[targets != -100]
    names, loss = names_of(model), nn.CrossEntropyLoss()
    fisher = empirical_fisher(model, losses, torch.full_like(losses, 1 / len(losses)), names)
    exact = dense_hessian(model, lambda m: loss(m(inputs), targets), names)
    for split in ((4,), (1, 3)):
        batches = in_batches((inputs, targets), split)
        assert relative_error(hessian.Fisher(model, loss, batches).to_dense(), fisher) < 1e-10
        assert relative_error(hessian.Hessian(model, loss, batches).to_dense(), exact) < 1e-10


@pytest.mark.parametrize(
    "loss",
    [nn.CrossEntropyLoss(), *(pytest.param(one, marks=pytest.mark.nightly) for one in (nn.BCEWithLogitsLoss(), nn.MSELoss()))],
    ids=str,
)
def test_sampled_fisher_has_the_gauss_newton_matrix_as_its_mean(loss):
    model, (inputs, targets) = seeded(Tied), classification(5, 3)
    if not isinstance(loss, nn.CrossEntropyLoss):
        targets = F.one_hot(targets, 3).double()
    expected = hessian.GaussNewton(model, loss, (inputs, targets)).to_dense()
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [hessian.Fisher(model, loss, (inputs, targets), kind="sampled", generator=generator).to_dense() for _ in range(400)]
    )
    errors = (draws.mean(0) - expected) / (draws.std(0) / 20).clamp(min=1e-12)
    assert errors.square().mean() < 1.3  # one, but for the noise of a few hundred dependent entries
    assert errors.square().mean() > 0.3


def test_sampled_fisher_is_one_fixed_matrix():
    model, data = seeded(SmoothNet), classification(8, 4)
    loss, batches = nn.CrossEntropyLoss(), in_batches(data, 3)
    operator = hessian.Fisher(model, loss, batches, kind="sampled", generator=torch.Generator().manual_seed(4))
    again = hessian.Fisher(model, loss, batches, kind="sampled", generator=torch.Generator().manual_seed(4))
    dense = operator.to_dense()
    assert torch.equal(operator.to_dense(), dense)
    assert torch.equal(again.to_dense(), dense)
    torch.testing.assert_close(operator.block("last.*").to_dense(), dense[-18:, -18:])
    with pytest.raises(ValueError, match="label smoothing is the negative logarithm of no distribution"):
        hessian.Fisher(model, nn.CrossEntropyLoss(label_smoothing=0.1), data, kind="sampled")
