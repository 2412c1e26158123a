"""Batch-norm re-estimation, against torch's own training mode and closed forms."""

import copy

import pytest
import torch
from torch import nn

from hawq.batch_norm import reestimated
from hawq.fold import folded
from hawq.graph import find_layers, get_tensor
from hawq.rounding.grid import choose_grid
from tests.networks import ZOO, build
from tests.oracles import assert_unchanged, snapshot


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.Flatten(1)
    )
    model.append(nn.Sequential(nn.Linear(5 * 16, 4), nn.BatchNorm1d(4)))
    return model.eval(), torch.randn(40, 2, 8, 8) + 0.5


@torch.no_grad()
def test_naive_is_what_torch_measures_in_training_mode():
    model, inputs = network()
    before = snapshot(model)
    graph, moves = reestimated(model, inputs.split(16), shrinkage=0)
    assert_unchanged(model, before)
    wanted = copy.deepcopy(model).train()
    for module in wanted.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = None
    wanted(inputs)  # one batch, its variance as training stores it; unbiased ones normalise what follows here
    torch.testing.assert_close(get_tensor(graph, "1.running_mean"), wanted[1].running_mean)
    torch.testing.assert_close(get_tensor(graph, "1.running_var"), wanted[1].running_var)
    for name in ("4", "6.1"):
        norm = wanted.get_submodule(name)
        torch.testing.assert_close(get_tensor(graph, f"{name}.running_mean"), norm.running_mean, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(get_tensor(graph, f"{name}.running_var"), norm.running_var, rtol=5e-3, atol=1e-4)
    assert all(move.mean == move.variance == 1 for move in moves.values())


@torch.no_grad()
def test_full_shrinkage_and_measuring_nothing_new_change_nothing():
    model, inputs = network()
    for options in ({"shrinkage": 1}, {"rounded": {"0": model[0].weight, "3": model[3].weight}}):
        graph, _ = reestimated(model, inputs.split(20), **options)
        torch.testing.assert_close(graph(inputs), model(inputs))


@torch.no_grad()
def test_chance_moves_little_and_a_shift_moves_all():
    torch.manual_seed(1)
    model = nn.Sequential(nn.BatchNorm1d(200)).eval()
    still, noise = reestimated(model, [torch.randn(8, 200)])
    naive, _ = reestimated(model, [torch.randn(8, 200)], shrinkage=0)
    distance = [float(get_tensor(graph, "0.running_mean").norm()) for graph in (still, naive)]
    assert distance[0] < 0.3 * distance[1]
    _, moves = reestimated(model, [3 + 2 * torch.randn(100, 200)])
    assert noise["0.running_mean"].mean < 0.3
    assert moves["0.running_mean"].mean > 0.95
    assert moves["0.running_mean"].variance > 0.9


@torch.no_grad()
def test_a_rescaled_weight_is_undone():
    model, inputs = network()
    reestimated_on_data, _ = reestimated(model, [inputs], shrinkage=0)
    factor = torch.linspace(0.5, 2, 6).view(-1, 1, 1, 1)
    graph, _ = reestimated(reestimated_on_data, [inputs], rounded={"0": model[0].weight * factor}, shrinkage=0)
    old, new = (get_tensor(g, "1.running_var") for g in (reestimated_on_data, graph))
    torch.testing.assert_close(new, old * factor.flatten() ** 2)
    assert torch.equal(get_tensor(graph, "0.weight"), model[0].weight)
    with_weight = copy.deepcopy(graph)
    with_weight.get_submodule("0").weight.mul_(factor)
    torch.testing.assert_close(with_weight(inputs), reestimated_on_data(inputs), rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["conv net", "audio, padded inside", "tokens", "volume"])
def test_the_result_folds(name):
    model, inputs = build(name)
    graph, moves = reestimated(model, [inputs])
    assert len(moves) == sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    result = folded(graph, inputs[:2])
    assert list(find_layers(result)) == list(find_layers(folded(model, inputs[:2])))
    torch.testing.assert_close(result(inputs), graph(inputs), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rounding_before_and_after_folding_agree():
    model, inputs = network()
    rows = model[0].weight.detach().reshape(1, 6, -1).double()
    grid = choose_grid(rows, 3)
    weight = (grid.codes(rows) * grid.expanded(18)[0]).view_as(model[0].weight).float()
    graph, _ = reestimated(model, [inputs], rounded={"0": weight}, shrinkage=0)
    norm = graph.get_submodule("1")
    result = folded(graph, inputs[:2])
    after = get_tensor(result, "0.weight").reshape(1, 6, -1).double()
    factor = (norm.weight / (norm.running_var + 1e-5).sqrt()).double()
    assert torch.equal(choose_grid(after, 3).codes(after) * factor.sign()[None, :, None], grid.codes(rows))


def test_errors():
    model, inputs = network()
    with pytest.raises(ValueError, match="1 calibration examples"):
        reestimated(model, [inputs[:1]])
    with pytest.raises(ValueError, match="shrinkage=2"):
        reestimated(model, [inputs], shrinkage=2)
    with pytest.raises(ValueError, match="'7'"):
        reestimated(model, [inputs], rounded={"7": inputs})
    with pytest.raises(ValueError, match="NaN or Inf"):
        reestimated(model, [inputs * torch.inf])

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(self.norm(x).relu())

    with pytest.raises(ValueError, match="several operations"):
        reestimated(Twice(), [torch.randn(4, 3)])
    assert ZOO
