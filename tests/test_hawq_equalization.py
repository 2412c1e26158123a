"""Cross-layer equalisation: the same function, equal ranges, and nothing scaled that must not be."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq.channels import find_readers
from hawq.equalization import Pair, equalized
from hawq.fold import folded
from hawq.graph import find_layers, get_tensor
from tests.networks import ZOO, build
from tests.oracles import assert_unchanged, snapshot


def uneven(model, seed=0):
    """The model with the scales of its output channels spread over four orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 10 ** (4 * torch.rand(len(parameter), generator=generator) - 2)
            parameter.mul_(spread.view(-1, *(1,) * (parameter.dim() - 1)))
    return model.eval()


def changed(model, inputs):
    """The pairs and barriers, after checking in float64 that the network computes the same."""
    graph = folded(model, inputs[:2]).double()
    before = snapshot(graph)
    result, pairs, skipped = equalized(graph)
    assert_unchanged(graph, before)
    wanted, found = graph(inputs.double()), result(inputs.double())
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12 * float(wanted.abs().max()))
    return result, pairs, skipped


@torch.no_grad()
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_computes_the_same(name):
    model, inputs = build(name)
    graph = folded(model, inputs[:2])
    result, pairs, skipped = equalized(graph)
    torch.testing.assert_close(result(inputs), graph(inputs), rtol=1e-5, atol=1e-5)
    assert {pair.first for pair in pairs} | set(skipped) == set(find_layers(graph))
    changed(model, inputs)


class Grouped(nn.Sequential):
    """Depthwise, grouped and plain convolutions, pooling, padding, flattening in blocks."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(2, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(8, 12, 3, groups=4),
            nn.ReLU(),
            nn.MaxPool2d(2, padding=1),
            nn.ZeroPad2d(1),
            nn.Conv2d(12, 6, 3, stride=2),
            nn.AvgPool2d(2, padding=1),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(6 * 4, 10),
            nn.ReLU(),
            nn.Linear(10, 3),
        )


@torch.no_grad()
def test_ranges_become_equal():
    model = uneven(Grouped())
    result, pairs, skipped = changed(model, torch.randn(4, 2, 12, 12, generator=torch.Generator().manual_seed(1)))
    names = ["0", "3", "5", "9", "13", "15"]
    assert pairs == [Pair(a, b, c) for a, b, c in zip(names, names[1:], [8, 8, 12, 6, 10], strict=False)]
    assert skipped == {"15": "output"}
    weight = {name: get_tensor(result, f"{name}.weight") for name in names}
    torch.testing.assert_close(weight["0"].abs().amax((1, 2, 3)), weight["3"].abs().amax((1, 2, 3)), rtol=2e-3, atol=0)
    by_group = weight["5"].view(4, 3, 2, 9).abs().amax((1, 3)).flatten()  # of each of its 8 input channels
    torch.testing.assert_close(weight["3"].abs().amax((1, 2, 3)), by_group, rtol=2e-3, atol=0)
    blocks = weight["13"].view(10, 6, 4).abs().amax((0, 2))
    torch.testing.assert_close(weight["9"].abs().amax((1, 2, 3)), blocks, rtol=2e-3, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_deep_relu_networks(seed):
    torch.manual_seed(seed)
    widths = torch.randint(3, 20, (9,)).tolist()
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    _, pairs, _ = changed(uneven(nn.Sequential(*layers), seed), torch.randn(8, widths[0]))
    assert len(pairs) == 7


class Fire(nn.Module):
    """One layer read by two; their sum clipped."""

    def __init__(self):
        super().__init__()
        self.squeeze, self.a, self.b = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 1), nn.Conv2d(5, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = F.relu(self.squeeze(x))
        return self.last(F.relu6(self.a(x) + self.b(x)))


@torch.no_grad()
def test_two_readers_share_a_scale_and_sums_stay():
    result, pairs, skipped = changed(uneven(Fire()), torch.randn(4, 3, 6, 6))
    assert pairs == [Pair("squeeze", "a", 5), Pair("squeeze", "b", 5)]
    assert set(skipped) == {"a", "b", "last"}
    first, a, b = (get_tensor(result, f"{name}.weight").abs() for name in ("squeeze", "a", "b"))
    torch.testing.assert_close(first.amax((1, 2, 3)), torch.maximum(a.amax((0, 2, 3)), b.amax((0, 2, 3))), rtol=2e-3, atol=0)


class Attention(nn.Module):
    """Queries, keys and values from one layer: only the values may be scaled."""

    def __init__(self, fused):
        super().__init__()
        self.fused, self.qkv, self.project = fused, nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.project(y.transpose(1, 2).flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False])
def test_attention_scales_its_values_alone(fused):
    model = uneven(Attention(fused))
    result, pairs, skipped = changed(model, torch.randn(4, 5, 6))
    assert pairs == [Pair("qkv", "project", 6)]
    assert set(skipped) == {"project"}
    assert torch.equal(get_tensor(result, "qkv.weight")[:12], model.qkv.weight[:12].double())
    value, column = get_tensor(result, "qkv.weight")[12:], get_tensor(result, "project.weight")
    torch.testing.assert_close(value.abs().amax(1), column.abs().amax(0), rtol=2e-3, atol=0)


BARRIERS = {
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(0.0, 4.0),
    "gelu": nn.GELU(),
    "softmax": nn.Softmax(1),
    "pad": nn.ConstantPad2d(1, 0.5),
    "view": nn.Sequential(nn.Flatten(), nn.Unflatten(1, (9, 16))),
    "shuffle": nn.PixelShuffle(2),
}


@torch.no_grad()
@pytest.mark.parametrize("name", BARRIERS)
def test_nothing_passes_what_is_not_homogeneous_or_mixes_channels(name):
    reader = {"view": nn.Conv1d(9, 3, 1), "shuffle": nn.Conv2d(1, 3, 1)}.get(name, nn.Conv2d(4, 3, 1))
    model = nn.Sequential(nn.Conv2d(2, 4, 3), BARRIERS[name], reader)
    _, pairs, skipped = changed(uneven(model), torch.randn(3, 2, 8, 8))
    assert pairs == []
    assert "0" in skipped


@torch.no_grad()
def test_homogeneous_clips_pass():
    class Clips(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.b(2.0 * F.hardtanh(self.a(x), 0.0, torch.inf).clamp(min=0))

    _, pairs, _ = changed(uneven(Clips()), torch.randn(6, 4))
    assert pairs == [Pair("a", "b", 5)]


@torch.no_grad()
def test_dead_channels_stay():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].weight[1] = 0
    model[2].weight[:, 2] = 1e-12
    result, _, _ = changed(model, torch.randn(5, 3))
    assert torch.equal(get_tensor(result, "0.bias")[1:3], model[0].bias[1:3].double())


@torch.no_grad()
def test_readers_of_part_of_the_channels():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 2)

        def forward(self, x):
            y = self.a(x)
            return self.b(F.relu(y[:, :4])), y[:, 3:].exp()

    model = Split()
    graph = folded(model, torch.randn(2, 4))
    readers = find_readers(find_layers(graph)["a"].node, -1, find_layers(graph))
    assert readers.free.tolist() == [True, True, True, False, False, False]
    assert readers.layers["b"].tolist() == [0, 1, 2, 3]
