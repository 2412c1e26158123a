"""Operators made of operators: blocks, scalings and inverses."""

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import hessian
from tests.cases import SmoothNet, classification, seeded


def test_submatrices_and_block_diagonals():
    model, data, loss = seeded(SmoothNet), classification(7, 4), nn.CrossEntropyLoss()
    operator = hessian.Hessian(model, loss, data)
    dense = operator.to_dense()
    sizes = {name: parameter.numel() for name, parameter in operator.parameters.items()}
    starts = dict(zip(sizes, torch.tensor([0, *sizes.values()]).cumsum(0).tolist(), strict=False))

    def rows(name):
        return torch.arange(starts[name], starts[name] + sizes[name])

    chosen = torch.cat([rows("first.weight"), rows("last.weight")])
    torch.testing.assert_close(operator.block("*t.weight").to_dense(), dense[chosen][:, chosen])
    corner = hessian.submatrix(operator, rows="last.*", columns="norm.bias")
    wanted = dense[torch.cat([rows("last.weight"), rows("last.bias")])][:, rows("norm.bias")]
    torch.testing.assert_close(corner.to_dense(), wanted)
    torch.testing.assert_close(corner.T.to_dense(), wanted.T)
    blocks = hessian.block_diagonal(operator, ["first.*", "norm.*", "last.*"])
    expected = torch.block_diag(*(operator.block(glob).to_dense() for glob in ("first.*", "norm.*", "last.*")))
    torch.testing.assert_close(blocks.to_dense(), expected)
    each = hessian.block_diagonal(operator)
    torch.testing.assert_close(each.to_dense().diagonal(), dense.diagonal())
    with pytest.raises(ValueError, match=r"'first\.bias' is in two blocks"):
        hessian.block_diagonal(operator, ["first.*", "*.bias"])


def test_preconditioned_by_adam():
    model, data, loss = seeded(SmoothNet), classification(7, 4), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.99), eps=1e-6)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model(data[0]), data[1]).backward()
        optimizer.step()
    operator = hessian.Hessian(model, loss, data)
    diagonal = hessian.adam_preconditioner(optimizer, operator)
    expected = [(optimizer.state[p]["exp_avg_sq"] / (1 - 0.99**3)).sqrt().add(1e-6).reshape(-1) for p in model.parameters()]
    torch.testing.assert_close(diagonal, torch.cat(expected))
    scaled = hessian.preconditioned(operator, diagonal)
    dense = operator.to_dense() / diagonal.sqrt() / diagonal.sqrt()[:, None]
    torch.testing.assert_close(scaled.to_dense(), dense)
    with pytest.raises(ValueError, match="positive"):
        hessian.preconditioned(operator, torch.zeros_like(diagonal))


def test_inverses():
    model, data, loss = seeded(SmoothNet), classification(7, 4), nn.CrossEntropyLoss()
    operator = hessian.GaussNewton(model, loss, data)
    dense = operator.to_dense()
    inverse = torch.linalg.inv(dense + 0.1 * torch.eye(len(dense), dtype=torch.float64))
    found = hessian.inverse(operator, damping=0.1, tol=1e-10)
    torch.testing.assert_close(found.to_dense(), inverse, rtol=1e-7, atol=1e-8)
    values, vectors = torch.linalg.eigh(dense)
    low_rank = hessian.LowRankPlusShift(values[-9:], vectors[:, -9:], 0.03)
    torch.testing.assert_close(
        low_rank.inverse(damping=0.07).to_dense(),
        torch.linalg.inv(low_rank.to_dense() + 0.07 * torch.eye(len(dense), dtype=torch.float64)),
        rtol=1e-9,
        atol=1e-10,
    )
    with pytest.raises(ValueError, match="not positive definite"):
        hessian.inverse(hessian.Hessian(model, loss, data) - 100.0 * operator, damping=0.0).to_dense()
