"""Rounding by least squares, against brute force, closed forms and rounding to nearest."""

import itertools

import pytest
import torch
from torch import nn

import hawq
from hawq.augmentation import augmented
from hawq.graph import find_layers
from hawq.patches import MatrixForm
from hawq.rounding.gptq import gptq
from hawq.rounding.grid import choose_grid
from hawq.rounding.least_squares import descend, output_error, round_by_least_squares
from hawq.rounding.moments import MomentCollector

aten = torch.ops.aten


def problem(columns, rows=6, groups=2, seed=0):
    """Rows, and second moments of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, 3, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(groups, 500, 3, generator=generator, dtype=torch.float64) @ mix
    inputs = inputs + 0.3 * torch.randn(groups, 500, columns, generator=generator, dtype=torch.float64)
    weights = torch.randn(groups, rows, columns, generator=generator, dtype=torch.float64)
    return weights, inputs.transpose(1, 2) @ inputs / 500


def real(codes, grid):
    return codes * grid.expanded(codes.shape[2])[0]


def test_without_correlation_gptq_rounds_to_nearest():
    weights, _ = problem(70)
    grid = choose_grid(weights, 3)
    diagonal = torch.diag_embed(1 + torch.rand(2, 70, dtype=torch.float64))
    assert torch.equal(gptq(weights, diagonal, grid), grid.codes(weights))


def test_against_the_best_of_all_codes():
    """Of 4^5 codes for each row, at the same scale: more than half of the way from the nearest codes to the best ones."""
    weights, hessian = problem(5, rows=4)
    grid = choose_grid(weights, 2)
    every = torch.tensor(list(itertools.product(range(4), repeat=5)), dtype=torch.float64)
    best = 0.0
    for group in range(2):
        for row in range(4):
            candidates = (every + grid.low[group, row]) * grid.scale[group, row] - weights[group, row]
            best += float(((candidates @ hessian[group]) * candidates).sum(1).min())
    carried = gptq(weights, hessian, grid)
    found = float(output_error(real(descend(carried, weights, hessian, grid), grid), weights, hessian).sum())
    nearest = float(output_error(real(grid.codes(weights), grid), weights, hessian).sum())
    assert best <= found
    assert found - best < 0.5 * (nearest - best)


def test_each_sweep_lowers_the_error_of_every_row():
    weights, hessian = problem(150, rows=8)
    grid = choose_grid(weights, 3, group_size=64)
    before = None
    for sweeps in range(4):
        codes, fitted = round_by_least_squares(weights, hessian, grid, sweeps=sweeps)
        error = output_error(real(codes, fitted), weights, hessian)
        if before is not None:
            assert (error <= before * (1 + 1e-9)).all()
        before = error
        low, high = fitted.low.amin(), fitted.low.amax() + 7
        assert ((codes >= low) & (codes <= high)).all()
    nearest = output_error(real(grid.codes(weights), grid), weights, hessian)
    assert float(before.sum()) < 0.3 * float(nearest.sum())


def test_the_target_is_the_ridge_regression_of_the_float_outputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator)
    rounded = x + 0.2 * torch.randn(40, 6, generator=generator)
    weight = torch.randn(3, 6, generator=generator)
    form = MatrixForm(aten.linear.default, (), weight.shape)
    collector = MomentCollector(form, 2, None)
    for part in (slice(0, 10), slice(10, 40)):
        collector.add(x[part], rounded[part])
    moments = collector.moments()
    assert moments.count == 40
    wanted, hessian = moments.target(form.rows(weight), 0.1)
    level = float(rounded.double().square().mean()) * 0.1
    design = torch.cat([rounded.double() / 40**0.5, level**0.5 * torch.eye(6).double()])
    outputs = torch.cat([x.double() @ weight.T.double() / 40**0.5, level**0.5 * weight.T.double()])
    torch.testing.assert_close(wanted[0].T, torch.linalg.lstsq(design, outputs).solution, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hessian[0], design.T @ design, rtol=1e-5, atol=1e-6)


NETWORKS = {
    "linear": (nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 10)), (24,)),
    "convolutions": (nn.Sequential(nn.Conv1d(4, 16, 5, padding=2), nn.ReLU(), nn.Conv1d(16, 8, 5, groups=2)), (4, 30)),
    "transposed": (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 5, 3, stride=2, padding=1)),
        (3, 7, 7),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
@torch.no_grad()
def test_outputs_come_closer_than_by_rounding_to_nearest(name, rounding):
    model, shape = NETWORKS[name]
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(shape[0], shape[0], generator=generator)
    inputs = torch.einsum("nc...,cd->nd...", torch.randn(128, *shape, generator=generator), mix)
    model = model.eval()
    prepared = hawq.prepared(model, [inputs])
    allocation = hawq.Allocation(dict.fromkeys(find_layers(prepared), 3))

    def error(method):
        quantized = hawq.quantize_model(
            prepared, allocation, (inputs, inputs), rounding=method, activations=None, generator=generator, augment=False
        )
        return float((quantized(inputs) - model(inputs)).square().sum())

    assert error(rounding) < 0.8 * error("nearest")


def test_every_fourth_image_is_disturbed_within_its_range_and_nothing_else_is_touched():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(10, 3, 16, 20, generator=generator) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1) - 1
    copies = torch.cat(augmented(images.split([5, 2, 3]), generator))  # batches are counted through
    assert copies.shape == images.shape
    assert (copies.amin((0, 2, 3)) >= images.amin((0, 2, 3)) - 1e-6).all()
    assert (copies.amax((0, 2, 3)) <= images.amax((0, 2, 3)) + 1e-6).all()
    changed = [not torch.allclose(*pair) for pair in zip(copies, images, strict=True)]
    assert changed == [False, False, False, True, False, False, False, True, False, False]
    again = augmented([images], torch.Generator().manual_seed(1))[0]
    assert torch.equal(again, augmented([images], torch.Generator().manual_seed(1))[0])
    for other in (torch.rand(4, 1, 8, 8), torch.rand(4, 3, 8), torch.randint(0, 9, (4, 3, 8, 8))):
        assert augmented([other])[0] is other
