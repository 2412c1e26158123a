"""Hessian-vector products against dense float64 matrices."""

import numpy as np
import pytest
import torch
from torch import nn

import hessian
from tests.cases import ConvNet, SmoothNet, classification, seeded
from tests.oracles import assert_unchanged, dense_hessian, snapshot


@pytest.fixture
def smooth() -> tuple[nn.Module, nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    return seeded(SmoothNet), nn.CrossEntropyLoss(), classification(7, 4)


def test_products_equal_the_dense_matrix(smooth):
    model, loss, data = smooth
    operator = hessian.Hessian(model, loss, data)
    names = [name for name, _ in model.named_parameters()]
    dense = dense_hessian(model, lambda m: loss(m(data[0]), data[1]), names)
    torch.testing.assert_close(operator.to_dense(), dense, rtol=1e-10, atol=1e-12)
    vectors = torch.randn(operator.shape[0], 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(operator @ vectors, dense @ vectors, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(operator @ vectors[:, 0], dense @ vectors[:, 0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("split", [(7,), (4, 3), (1, 5, 1)])
def test_any_split_into_batches_gives_the_same_matrix(smooth, split):
    model, loss, data = smooth
    whole = hessian.Hessian(model, loss, data).to_dense()
    batches = list(zip(data[0].split(split), data[1].split(split), strict=True))
    torch.testing.assert_close(hessian.Hessian(model, loss, batches).to_dense(), whole, rtol=1e-10, atol=1e-12)


def test_block_and_algebra(smooth):
    model, loss, data = smooth
    operator = hessian.Hessian(model, loss, data)
    dense = operator.to_dense()
    block = operator.block("last.*")
    size = block.shape[0]
    torch.testing.assert_close(block.to_dense(), dense[-size:, -size:])
    vector = torch.ones(operator.shape[0], dtype=torch.float64)
    torch.testing.assert_close((2 * operator - operator + operator * 0.5) @ vector, 1.5 * dense @ vector)
    scipy_operator = operator.to_scipy()
    np.testing.assert_allclose(scipy_operator @ vector.numpy(), (dense @ vector).numpy(), rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="cannot add operators"):
        operator + block


def test_fused_attention_has_a_hessian_too():
    """torch's fused attention kernels have no second derivative; its formula does."""
    model = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True).double().eval()
    inputs, targets = classification(3, 5, 4)
    data = (inputs, targets.double())

    def loss(outputs, wanted):
        return (outputs.mean((1, 2)) - wanted).square().mean()

    operator = hessian.Hessian(model, loss, data, params="linear2.*")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        dense = dense_hessian(model, lambda m: loss(m(data[0]), data[1]), list(operator.parameters))
        attention = dense_hessian(model, lambda m: loss(m(data[0]), data[1]), ["self_attn.in_proj_bias"])
    torch.testing.assert_close(operator.to_dense(), dense, rtol=1e-10, atol=1e-12)
    found = hessian.Hessian(model, loss, data, params="self_attn.in_proj_bias").to_dense()
    torch.testing.assert_close(found, attention, rtol=1e-9, atol=1e-12)


def test_a_linear_loss_has_no_curvature():
    model = nn.Linear(3, 1, bias=False).double()
    data = classification(5, 3)
    operator = hessian.Hessian(model, lambda outputs, targets: outputs.mean() + 0 * targets.sum(), data)
    assert torch.equal(operator.to_dense(), torch.zeros(3, 3, dtype=torch.float64))


def test_unused_and_frozen_parameters():
    model = seeded(SmoothNet)
    model.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    model.first.weight.requires_grad_(False)
    data, loss = classification(6, 4), nn.CrossEntropyLoss()
    before = snapshot(model)
    operator = hessian.Hessian(model, loss, data)
    assert "first.weight" not in operator.parameters
    assert torch.equal(operator.block("unused").to_dense(), torch.zeros(2, 2, dtype=torch.float64))
    frozen = hessian.Hessian(model, loss, data, params="first.weight").to_dense()
    assert_unchanged(model, before)
    model.first.weight.requires_grad_(True)
    expected = dense_hessian(model, lambda m: loss(m(data[0]), data[1]), ["first.weight"])
    torch.testing.assert_close(frozen, expected, rtol=1e-10, atol=1e-12)


def test_the_model_and_the_global_generator_are_left_alone():
    model = seeded(ConvNet).train()
    model.eval()
    data = classification(4, 1, 8, 8)
    nn.CrossEntropyLoss()(model(data[0]), data[1]).backward()
    before, state = snapshot(model), torch.get_rng_state()
    first, second = (hessian.Hessian(model, nn.CrossEntropyLoss(), data) for _ in range(2))
    vector = torch.ones(first.shape[0], dtype=torch.float64)
    product = first @ vector
    assert torch.equal(second @ vector, product)
    assert torch.equal(first @ vector, product)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_current_values_count(smooth):
    model, loss, data = smooth
    operator = hessian.Hessian(model, loss, data, params="last.weight")
    old = operator.to_dense()
    with torch.no_grad():
        model.first.weight.mul_(2)
    assert not torch.allclose(operator.to_dense(), old)


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (torch.ones(3, dtype=torch.float64), r"shape \(3,\) for an operator of size 53"),
        (torch.ones(53), "torch.float32"),
        (torch.ones(53, 2, 2, dtype=torch.float64), "shape"),
    ],
)
def test_wrong_vectors(smooth, vector, message):
    with pytest.raises(ValueError, match=message):
        hessian.Hessian(*smooth) @ vector


def test_wrong_arguments(smooth):
    model, loss, data = smooth
    with pytest.raises(ValueError, match=r"no parameter matches 'lats\.weight'; the nearest names are last\.weight"):
        hessian.Hessian(model, loss, data, params="lats.weight")
    with pytest.raises(ValueError, match="does not belong to the model"):
        hessian.Hessian(model, loss, data, params=[nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match="a loss and data are needed"):
        hessian.Hessian(model)
    with pytest.raises(TypeError, match="not both"):
        hessian.Hessian(hessian.Objective(model, loss, data), loss)
    mixed = nn.Sequential(nn.Linear(4, 4).double(), nn.Linear(4, 3))
    with pytest.raises(TypeError, match="select parameters of one kind"):
        hessian.Hessian(mixed, loss, data)
