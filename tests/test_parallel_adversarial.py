"""Attacks on networks whose worst inputs are known."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from parallel.adversarial import fgsm, pgd, trust_region


def linear():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).double()
    x = torch.randn(20, 3, 2, 2, dtype=torch.float64)
    return model, x, model(x).argmax(1)


def curved():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3)).double()
    x = torch.randn(40, 6, dtype=torch.float64)
    return model, x, model.eval()(x).argmax(1)


def test_fgsm_is_the_worst_of_a_box_for_two_classes():
    torch.manual_seed(0)
    model, x = nn.Linear(5, 2).double(), torch.randn(9, 5, dtype=torch.float64)
    targets = torch.arange(9) % 2
    direction = (model.weight[1] - model.weight[0]).sign() * (1 - 2 * targets[:, None])
    torch.testing.assert_close(fgsm(model, F.cross_entropy, x, targets, 0.1), (x + 0.1 * direction).detach())


@pytest.mark.parametrize("problem", [linear, curved])
def test_projected_ascent_stays_in_the_box_and_beats_one_step(problem):
    model, x, targets = problem()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    one = fgsm(model, F.cross_entropy, x, targets, 0.3)
    many = pgd(model, F.cross_entropy, x, targets, 0.3, steps=20, seed=0)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert float((many - x).abs().max()) <= 0.3 + 1e-12
    model.eval()
    losses = [F.cross_entropy(model(found), targets).item() for found in (x, one, many)]
    assert losses[0] < losses[1] <= losses[2] + 1e-9


def test_the_trust_region_finds_the_nearest_boundary_of_a_linear_network():
    model, x, targets = linear()
    found = trust_region(model, x, targets, candidates=3)
    weight, bias = model[1].weight.detach(), model[1].bias.detach()
    scores = x.flatten(1) @ weight.T + bias
    for n in range(len(x)):
        own = targets[n]
        distances = [
            float((scores[n, own] - scores[n, other]) / (weight[own] - weight[other]).norm())
            for other in range(4)
            if other != own
        ]
        moved = float((found[n] - x[n]).norm())
        assert min(distances) <= moved <= 1.03 * min(distances)
    assert not bool((model(found).argmax(1) == targets).any())


def test_the_trust_region_changes_every_class_of_a_curved_network_by_less_than_a_box():
    model, x, targets = curved()
    found = trust_region(model, x, targets, candidates=2)
    assert not bool((model(found).argmax(1) == targets).any())
    epsilon = next(one for one in torch.linspace(0.05, 5, 100).tolist() if _fooled(model, x, targets, one) > 0.9)
    assert float((found - x).norm(dim=1).mean()) < epsilon * 6**0.5
    wrong = (targets + 1) % 3
    assert torch.equal(trust_region(model, x, wrong), x)  # of which nothing is left to change


def _fooled(model, x, targets, epsilon):
    return float((model(fgsm(model, F.cross_entropy, x, targets, epsilon)).argmax(1) != targets).double().mean())


def test_refusals():
    model, x, targets = linear()
    with pytest.raises(ValueError, match="epsilon=-1"):
        fgsm(model, F.cross_entropy, x, targets, -1)
    with pytest.raises(ValueError, match="floating-point"):
        pgd(model, F.cross_entropy, x.long(), targets, 0.1)
    with pytest.raises(ValueError, match="steps=0"):
        pgd(model, F.cross_entropy, x, targets, 0.1, steps=0)
    with pytest.raises(ValueError, match="radius=0"):
        trust_region(model, x, targets, radius=0)
