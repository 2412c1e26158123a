"""Random numbers of examples."""

import torch

from hessian.draws import ExampleDraws


def batch(count=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, generator=generator), torch.randint(0, 4, (count,), generator=generator)


def test_any_division_draws_the_same():
    """Two calls each; also where an example has two rows, and whatever the order."""
    inputs, targets = batch()
    whole = ExampleDraws((inputs, targets), 7)
    first, second = whole.uniform((6, 2, 5)), whole.signs((12, 3))
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part = ExampleDraws((inputs[rows], targets[rows]), 7)
        assert torch.equal(part.uniform((len(inputs[rows]), 2, 5)), first[rows])
        assert torch.equal(part.signs((2 * len(inputs[rows]), 3)), second[2 * rows.start : 2 * rows.stop])
    assert torch.equal(ExampleDraws((inputs.flip(0), targets.flip(0)), 7).uniform((6, 2, 5)), first.flip(0))


def test_examples_calls_and_seeds_differ():
    draws = ExampleDraws(batch(), 7)
    first, second = draws.uniform((6, 4)), draws.uniform((6, 4))
    other = ExampleDraws(batch(), 8).uniform((6, 4))
    assert len(torch.cat([first, second, other]).unique()) == 3 * 24
    assert torch.equal(ExampleDraws(batch(), 7).uniform((6, 4)), first)


def test_rows_that_belong_to_no_example_are_drawn_for_the_batch():
    found = ExampleDraws(batch(), 7).uniform((5, 4))
    assert len(found.unique()) == 20
    assert torch.equal(ExampleDraws(batch(), 7).uniform((5, 4)), found)
    assert ExampleDraws(batch(0), 7).uniform((0, 4)).shape == (0, 4)


def test_signs_are_fair_and_independent():
    """4096 examples of two signs: means and correlation within four standard errors."""
    signs = ExampleDraws(batch(4096), 7).signs((4096, 2)).double()
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    moments = torch.stack([*signs.mean(0), signs.prod(1).mean(), (signs[1:, 0] * signs[:-1, 0]).mean()])
    assert float(moments.abs().max()) < 4 / 4096**0.5
