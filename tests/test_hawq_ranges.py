"""Affine arithmetic and the choice of ranges, against brute force."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hawq.affine import round_activation
from hawq.observers import activation_parameters, activation_range
from hawq.rounding.grid import choose_grid


def squared_error(rows, grid):
    return ((grid.codes(rows) * grid.expanded(rows.shape[2])[0] - rows).square()).sum((0, 2))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("heavy_tailed", [False, True])
def test_symmetric_grids_are_nearly_the_best_there_are(bits, heavy_tailed):
    """Against 5,000 scales a channel: the candidates lose little in a channel of 300 weights, on average next to nothing."""
    generator = torch.Generator().manual_seed(bits)
    rows = torch.randn(1, 6, 300, generator=generator, dtype=torch.float64)
    rows = rows**3 if heavy_tailed else rows
    found = choose_grid(rows, bits, symmetric=True)
    assert (found.low == -(2 ** (bits - 1))).all()
    largest = rows.abs().amax(2, keepdim=True)
    fractions = torch.linspace(0.02, 1.5, 5000, dtype=torch.float64)
    grids = [found.with_scale(fraction * largest / 2 ** (bits - 1)) for fraction in fractions]
    best = torch.stack([squared_error(rows, grid) for grid in grids]).amin(0)
    error = squared_error(rows, found)
    assert (error <= 1.2 * best).all()
    assert (error / best).mean() <= 1.1


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_asymmetric_grids_serve_skewed_channels_and_are_never_worse(bits):
    generator = torch.Generator().manual_seed(bits)
    rows = torch.randn(2, 5, 200, generator=generator, dtype=torch.float64)
    free, bound = choose_grid(rows, bits), choose_grid(rows, bits, symmetric=True)
    assert (squared_error(rows, free) <= squared_error(rows, bound) * (1 + 1e-9)).all()
    one_sided = rows.abs()
    free, bound = choose_grid(one_sided, bits), choose_grid(one_sided, bits, symmetric=True)
    assert (squared_error(one_sided, free) < 0.5 * squared_error(one_sided, bound)).all()
    codes = free.codes(one_sided)
    assert int(codes.min()) >= -128
    assert int(codes.max()) <= 127
    assert ((codes.amax(2) - codes.amin(2)) <= 2**bits - 1).all()


def test_importance_decides_which_weights_matter():
    rows = torch.tensor([[[1.0, 0.31, 0.1, -0.17]]], dtype=torch.float64)
    importance = torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    plain, weighted = choose_grid(rows, 2), choose_grid(rows, 2, importance=importance)

    def error(grid):
        return float(((grid.codes(rows) * grid.scale - rows).square() * importance).sum())

    assert error(weighted) < 0.5 * error(plain)


def test_groups_of_columns_have_scales_of_their_own():
    rows = torch.cat([torch.randn(1, 3, 8), 100 * torch.randn(1, 3, 8)], 2)
    grid = choose_grid(rows, 4, group_size=8)
    assert grid.scale.shape == (1, 3, 2)
    assert (grid.scale[..., 1] > 10 * grid.scale[..., 0]).all()
    each = [choose_grid(rows[:, :, part], 4) for part in (slice(0, 8), slice(8, 16))]
    torch.testing.assert_close(grid.scale, torch.cat([one.scale for one in each], 2))


def test_a_channel_of_zeros():
    weight = torch.zeros(1, 2, 4)
    weight[0, 1] = torch.tensor([1.0, -1.0, 0.5, 0.0])
    grid = choose_grid(weight, 4)
    assert 0 < float(grid.scale[0, 0, 0]) < 1e-6
    assert torch.isfinite(grid.scale).all()
    assert (grid.codes(weight.double())[0, 0] == 0).all()


@given(st.floats(-100, 0), st.floats(0.001, 100), st.floats(-150, 150))
def test_rounded_activations_are_on_the_grid_and_nearest(low, high, value):
    scale, zero_point = activation_parameters(low, high)
    x = torch.tensor([value, 0.0])
    rounded = round_activation(x, scale, zero_point, 255)
    assert rounded[1] == 0.0
    codes = rounded / scale + zero_point
    assert torch.allclose(codes, codes.round(), atol=1e-3)
    covered = (0 - int(zero_point)) * float(scale), (255 - int(zero_point)) * float(scale)
    expected = min(max(value, covered[0]), covered[1])
    assert abs(float(rounded[0]) - expected) <= 0.5001 * float(scale) + 1e-4 * abs(expected)


def test_ranges_by_every_method():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100_000, generator=generator).relu()
    values[0] = 1000.0
    assert activation_range([values], "min-max") == (0.0, 1000.0)
    low, high = activation_range([values], "percentile")
    assert low == 0.0
    assert high < 10
    low, high = activation_range([values[1:]], "mse")
    assert (low, 3 < high <= values[1:].max()) == (0.0, True)
    low, high = activation_range([-values[1:], values[1:]], "mse")
    assert low < 0 < high
    assert activation_range([torch.zeros(5)]) == (0.0, 1.0)


def test_the_mse_range_beats_the_full_range_on_long_tails():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100_000, generator=generator) ** 5

    def error(method):
        scale, zero_point = activation_parameters(*activation_range([values], method))
        return float((round_activation(values, scale, zero_point, 255) - values).square().mean())

    assert error("mse") <= error("min-max")
    assert error("mse") <= error("percentile")
