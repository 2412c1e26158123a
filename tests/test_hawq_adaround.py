"""AdaRound on second moments, against every rounding there is."""

import itertools

import pytest
import torch

from hawq.rounding.adaround import adaround
from hawq.rounding.grid import Grid, choose_grid
from hawq.rounding.least_squares import output_error


def problem(groups, rows, columns, seed=0):
    """Weights and moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(groups, columns, 1 + columns // 2, dtype=torch.float64, generator=generator)
    hessian = factors @ factors.transpose(1, 2) + 0.1 * torch.eye(columns)
    return torch.randn(groups, rows, columns, dtype=torch.float64, generator=generator), hessian


def error(codes, wanted, hessian, grid):
    return output_error(codes * grid.expanded(wanted.shape[2])[0], wanted, hessian)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_close_to_the_best_of_all_roundings(bits):
    wanted, hessian = problem(2, 20, 8)
    grid = choose_grid(wanted, bits)
    scale, low, high = grid.expanded(8)
    up_or_down = torch.tensor(list(itertools.product([0, 1], repeat=8)), dtype=torch.float64)
    choices = (wanted / scale).floor().clamp(low, high - 1)[:, None] + up_or_down[None, :, None]
    every = torch.stack([error(choices[:, i], wanted, hessian, grid) for i in range(len(up_or_down))])
    best = every.amin(0)
    codes = adaround(wanted, hessian, grid)
    found, nearest = (error(c, wanted, hessian, grid) for c in (codes, grid.codes(wanted)))
    assert (found >= best * (1 - 1e-9)).all()
    assert (found <= nearest * (1 + 1e-9)).all()
    assert (found.sum() - best.sum()) < 0.4 * (nearest.sum() - best.sum())
    assert (found <= best * (1 + 1e-9)).double().mean() > 0.3  # of the rows, the best of 256


def test_without_correlations_nearest_is_best():
    wanted, _ = problem(2, 10, 12)
    grid = choose_grid(wanted, 3)
    hessian = torch.diag_embed(torch.rand(2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1)
    assert torch.equal(adaround(wanted, hessian, grid), grid.codes(wanted))


def test_codes_are_neighbours_within_the_grid_whatever_the_scales():
    wanted, hessian = problem(3, 6, 20)
    wanted[0, 0] = 0
    scale = torch.rand(3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.3
    grid = Grid(scale, torch.full_like(scale, -1), 2)  # many weights lie beyond its ends
    codes = adaround(wanted, hessian, grid, steps=200)
    spread, low, high = grid.expanded(20)
    assert torch.equal(codes, codes.round())
    assert ((codes >= low) & (codes <= high)).all()
    inside = (wanted / spread > low) & (wanted / spread < high)
    assert ((codes - wanted / spread).abs()[inside] <= 1).all()
    assert (error(codes, wanted, hessian, grid) <= error(grid.codes(wanted), wanted, hessian, grid) * (1 + 1e-9)).all()
    assert torch.equal(codes[0, 0], torch.zeros(20))


def test_the_unit_of_weights_and_moments_does_not_matter():
    wanted, hessian = problem(1, 10, 16)
    grid = choose_grid(wanted, 4)
    tiny = adaround(wanted * 2.0**-20, hessian * 2.0**-30, grid.with_scale(grid.scale * 2.0**-20))
    assert torch.equal(adaround(wanted, hessian, grid), tiny)


def test_no_step_is_an_error():
    wanted, hessian = problem(1, 2, 3)
    with pytest.raises(ValueError, match="0 steps"):
        adaround(wanted, hessian, choose_grid(wanted, 4), steps=0)
