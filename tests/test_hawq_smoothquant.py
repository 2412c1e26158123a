"""SmoothQuant: the same function, the scales of the formula, and what must stay stays."""

import pytest
import torch
from torch import nn

from hawq.fold import folded
from hawq.graph import get_tensor
from hawq.smoothquant import smoothed
from tests.networks import ZOO, build
from tests.oracles import assert_unchanged, snapshot


class Block(nn.Module):
    """A pre-norm block: queries, keys and values read one norm; the last norm is read by a residual sum too."""

    def __init__(self):
        super().__init__()
        self.before, self.after, self.bare = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8, elementwise_affine=False)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.project, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.before(x)
        x = x + self.project((self.q(y) @ self.k(y).transpose(1, 2)).softmax(-1) @ self.v(y))
        y = self.after(x)
        return self.out(self.bare(torch.tanh(self.out_of(y)) + y))

    def out_of(self, y):
        return y.exp()


def block():
    torch.manual_seed(0)
    model = Block()
    with torch.no_grad():
        model.before.weight.mul_(torch.logspace(-1, 1, 8))
        model.before.bias.normal_()
    return model, [torch.randn(4, 5, 8) for _ in range(2)]


@torch.no_grad()
def test_scales_are_those_of_the_formula():
    model, batches = block()
    graph = folded(model, batches[0]).double()
    batches = [batch.double() for batch in batches]
    before = snapshot(graph)
    result, names, skipped = smoothed(graph, batches, alpha=0.3)
    assert_unchanged(graph, before)
    torch.testing.assert_close(result(batches[0]), graph(batches[0]), rtol=1e-9, atol=1e-10)
    assert names == ["before", "v"]
    assert {"after", "q", "k", "project", "out"} < set(skipped)
    assert len(skipped) == 6  # and the norm without a weight
    inputs = torch.stack([model.double().before(batch) for batch in batches]).abs().flatten(0, 2).amax(0)
    weights = torch.stack([layer.weight.abs().amax(0) for layer in (model.q, model.k, model.v)]).amax(0)
    scale = inputs**0.3 / weights**0.7
    torch.testing.assert_close(get_tensor(result, "before.weight"), model.before.weight / scale)
    torch.testing.assert_close(get_tensor(result, "before.bias"), model.before.bias / scale)
    torch.testing.assert_close(get_tensor(result, "k.weight"), model.k.weight * scale)


@torch.no_grad()
def test_half_makes_activations_and_weights_alike():
    model, batches = block()
    graph = folded(model, batches[0]).double()
    result, _, _ = smoothed(graph, [batch.double() for batch in batches])
    found = get_tensor(result, "before.weight"), get_tensor(result, "before.bias")
    y = torch.stack([nn.functional.layer_norm(batch.double(), (8,), *found) for batch in batches])
    columns = torch.stack([get_tensor(result, f"{name}.weight").abs().amax(0) for name in "qk"]).amax(0)
    value = get_tensor(result, "v.weight").abs()
    assert value.shape == (8, 8)  # its rows were scaled again for `project`, so that only q and k tell
    assert (y.abs().flatten(0, 2).amax(0) >= columns * (1 - 1e-9)).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_computes_the_same(name):
    model, inputs = build(name)
    graph = folded(model, inputs[:2])
    result, _, _ = smoothed(graph, [inputs])
    torch.testing.assert_close(result(inputs), graph(inputs), rtol=1e-5, atol=1e-5)


def test_errors():
    model, batches = block()
    graph = folded(model, batches[0])
    with pytest.raises(ValueError, match=r"alpha=1\.5"):
        smoothed(graph, batches, alpha=1.5)
    with pytest.raises(ValueError, match="no calibration inputs"):
        smoothed(graph, [])
    with pytest.raises(ValueError, match="NaN or Inf"):
        smoothed(graph, [batches[0] * torch.nan])
