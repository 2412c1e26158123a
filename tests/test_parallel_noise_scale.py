"""Noise scales against sums over single examples and dense matrices, in float64."""

import math

import pytest
import torch
from torch import distributed, nn

import hessian
from parallel.noise_scale import noise_scale
from tests.ranks import run_on_ranks


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(48, 4, dtype=torch.float64)
    return model, x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def by_example(model, x, targets):
    """tr(A Sigma) and G'AG, less what noise adds to it, for A the identity and the Hessian."""
    loss = nn.CrossEntropyLoss()
    operator = hessian.Hessian(model, loss, (x, targets))
    rows = [hessian.Hessian(model, loss, (x[n : n + 1], targets[n : n + 1])).gradient() for n in range(len(x))]
    gradients = torch.stack(rows)
    mean = gradients.mean(0)
    covariance = (gradients - mean).T @ (gradients - mean) / (len(x) - 1)
    found = []
    for matrix in (torch.eye(len(mean), dtype=torch.float64), operator.to_dense()):
        noise = float((matrix @ covariance).trace())
        found.append((noise, float(mean @ matrix @ mean) - noise / len(x)))
    return found


def test_chunks_of_one_example_are_a_direct_computation():
    model, x, targets = problem()
    found = noise_scale(model, nn.CrossEntropyLoss(), list(zip(x.split(1), targets.split(1), strict=True)))
    (trace, square), (weighted_trace, weighted_square) = by_example(model, x, targets)
    for one, other in (
        (found.trace, trace),
        (found.square, square),
        (found.weighted_trace, weighted_trace),
        (found.weighted_square, weighted_square),
        (found.simple, trace / square),
        (found.weighted, weighted_trace / weighted_square),
    ):
        assert one == pytest.approx(other, rel=1e-9)


def test_chunks_give_the_same_within_their_errors():
    model, x, targets = problem()
    (trace, square), (weighted_trace, weighted_square) = by_example(model, x, targets)
    z = []
    for seed in range(20):
        order = torch.randperm(48, generator=torch.Generator().manual_seed(seed))
        cuts = [order[start : start + 6] for start in range(0, 48, 6)]
        found = noise_scale(model, nn.CrossEntropyLoss(), [(x[cut], targets[cut]) for cut in cuts])
        z.append((found.simple - trace / square) / found.simple_stderr)
        z.append((found.weighted - weighted_trace / weighted_square) / found.weighted_stderr)
    assert sum(abs(one) < 2 for one in z) >= 36
    assert abs(sum(z) / len(z)) < 1


def on_ranks():
    model, x, targets = problem()
    rank = distributed.get_rank()
    cuts = [slice(start + (0, 5)[rank], start + (5, 8)[rank]) for start in range(0, 48, 8)]
    return noise_scale(model, nn.CrossEntropyLoss(), [(x[cut], targets[cut]) for cut in cuts])


def test_ranks_have_parts_of_each_chunk():
    model, x, targets = problem()
    expected = noise_scale(model, nn.CrossEntropyLoss(), list(zip(x.split(8), targets.split(8), strict=True)))
    for found in run_on_ranks(on_ranks, 2):
        for name in ("trace", "square", "weighted_trace", "weighted_square", "simple_stderr", "weighted_stderr"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-9)


def test_refusals_and_noise_alone():
    model, x, targets = problem()
    with pytest.raises(ValueError, match="give at least 2"):
        noise_scale(model, nn.CrossEntropyLoss(), [(x, targets)])
    with pytest.raises(ValueError, match="reduction='mean'"):
        noise_scale(model, nn.CrossEntropyLoss(reduction="sum"), [(x[:9], targets[:9]), (x[9:], targets[9:])])
    linear = nn.Linear(4, 1, bias=False).double()
    nn.init.zeros_(linear.weight)
    opposite = [(x[:1], torch.ones(1, 1, dtype=torch.float64)), (x[:1], -torch.ones(1, 1, dtype=torch.float64))]
    found = noise_scale(linear, nn.MSELoss(), opposite)
    assert found.simple == math.inf
    assert found.simple_stderr == math.inf
    assert "curvature-weighted" in found._repr_html_()
    assert noise_scale(linear, nn.MSELoss(), opposite * 2).simple_stderr == math.inf  # nor does any of the chunks less one tell
