"""hessian.landscape: losses where they are said to be, the quadratic model, and a model that comes back bit by bit."""

import pytest
import torch
from torch import nn

from hessian.landscape import default_radius, line, plane
from hessian.objective import Objective
from hessian.operators.hessian import Hessian
from hessian.parameters import flatten


@pytest.fixture
def problem() -> tuple[nn.Module, nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A network in double precision and two batches of unequal size."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    inputs, targets = torch.randn(10, 4, dtype=torch.float64), torch.randint(0, 3, (10,))
    return model, nn.CrossEntropyLoss(), [(inputs[:7], targets[:7]), (inputs[7:], targets[7:])]


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def loss_at(model, loss, batches, vector):
    """The mean loss over all examples with the parameters moved by `vector`, without touching the model."""
    moved, start = {}, 0
    for name, parameter in model.named_parameters():
        moved[name] = parameter.detach() + vector[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return float(loss(torch.func.functional_call(model, moved, (inputs,)), targets))


def test_a_line_is_the_loss_along_the_unit_direction(problem):
    model, loss, data = problem
    direction = torch.randn(size(model), dtype=torch.float64)
    result = line(model, loss, data, 3 * direction, radius=0.7, num_points=9)
    unit = direction / direction.norm()
    assert result.offsets.tolist() == pytest.approx([0.7 * step / 4 for step in range(-4, 5)])
    expected = [loss_at(model, loss, data, t * unit) for t in result.offsets.tolist()]
    assert result.losses.tolist() == pytest.approx(expected, rel=1e-12)
    assert result.loss == pytest.approx(loss_at(model, loss, data, 0 * unit), rel=1e-12)


def test_the_quadratic_model_holds_to_third_order(problem):
    model, loss, data = problem
    torch.manual_seed(1)
    direction = torch.randn(size(model), dtype=torch.float64)
    errors = []
    for radius in (0.02, 0.01):
        result = line(model, loss, data, direction, radius=radius, num_points=3)
        errors.append(float((result.losses - result.quadratic).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.2)
    operator, unit = Hessian(model, loss, data), direction / direction.norm()
    assert result.curvature == pytest.approx(float(unit @ operator.to_dense() @ unit), rel=1e-10)
    assert result.slope == pytest.approx(float(unit @ operator.gradient()), rel=1e-10)


def test_a_plane_is_the_loss_over_both_directions(problem):
    model, loss, data = problem
    directions = torch.linalg.qr(torch.randn(size(model), 2, dtype=torch.float64)).Q
    result = plane(Objective(model, loss, data), directions=directions, radius=0.5, num_points=5)
    for i, one in enumerate(result.offsets.tolist()):
        for j, other in enumerate(result.offsets.tolist()):
            expected = loss_at(model, loss, data, directions @ torch.tensor([one, other], dtype=torch.float64))
            assert float(result.losses[i, j]) == pytest.approx(expected, rel=1e-12)


def test_the_default_radius_changes_the_quadratic_model_by_the_loss(problem):
    model, loss, data = problem
    direction = torch.randn(size(model), dtype=torch.float64)
    result = line(model, loss, data, direction)
    radius = float(result.offsets[-1])
    assert abs(result.slope) * radius + abs(result.curvature) * radius**2 / 2 == pytest.approx(result.loss)
    directions = torch.stack([direction, torch.randn_like(direction)], dim=1)
    each = [float(line(model, loss, data, one, num_points=3).offsets[-1]) for one in directions.T]
    assert float(plane(model, loss, data, directions, num_points=3).offsets[-1]) == pytest.approx(min(each))
    assert default_radius(2.0, 0.0, 4.0) == pytest.approx(1.0)
    assert default_radius(0.0, 2.0, 0.0) == pytest.approx(0.5)
    assert default_radius(3.0, 0.0, 0.0) == 1.0


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back_bit_by_bit(fails):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    data = (torch.randn(8, 3), torch.randint(0, 2, (8,)))
    calls = 0

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if fails and calls == 6:
            raise RuntimeError("no more")
        return nn.functional.cross_entropy(outputs, targets)

    loss(model(data[0]), data[1]).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    operator = Hessian(model.eval(), nn.CrossEntropyLoss(), data)
    vector = torch.randn(operator.shape[0])
    product = operator @ vector
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    directions = torch.randn(size(model), 2, generator=torch.Generator().manual_seed(1))
    if fails:
        with pytest.raises(RuntimeError, match="no more"):
            plane(model, loss, data, directions, radius=1.0, num_points=3)
    else:
        first = plane(model, loss, data, directions, radius=1.0, num_points=3)
        assert torch.equal(plane(model, loss, data, directions, radius=1.0, num_points=3).losses, first.losses)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    model.eval()
    assert torch.equal(operator @ vector, product)


def test_selected_parameters_alone_are_moved(problem):
    model, loss, data = problem
    chosen = [model[2].weight, model[2].bias]
    direction = flatten([torch.ones_like(parameter) for parameter in chosen])
    result = line(model, loss, data, direction, ["2.*"], radius=0.3, num_points=3)
    whole = torch.cat([torch.zeros(25, dtype=torch.float64), direction / direction.norm()])
    assert result.losses.tolist() == pytest.approx([loss_at(model, loss, data, t * whole) for t in (-0.3, 0.0, 0.3)])


def test_losses_that_overflow_are_shown_as_they_are(problem):
    model, _, data = problem

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.exp((outputs**2).mean()) + 0 * targets.sum()

    result = line(model, loss, data, torch.ones(size(model), dtype=torch.float64), radius=1e4, num_points=3)
    assert not result.losses[-1].isfinite()
    assert result.losses[1].isfinite()


def test_plots_show_the_numbers(problem):
    from matplotlib.figure import Figure

    model, loss, data = problem
    directions = torch.randn(size(model), 2, dtype=torch.float64)
    along = line(model, loss, data, directions[:, 0], num_points=5)
    axes = along.plot(Figure().add_subplot())
    assert axes.lines[0].get_ydata().tolist() == along.losses.tolist()
    assert axes.lines[1].get_ydata().tolist() == along.quadratic.tolist()
    axes = plane(model, loss, data, directions, num_points=5).plot(Figure().add_subplot())
    assert "first direction" in axes.get_xlabel()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"direction": torch.ones(7, dtype=torch.float64)}, "7 numbers for 43 parameters"),
        ({"direction": torch.zeros(43, dtype=torch.float64)}, "zero or not finite"),
        ({"direction": None}, "direction is missing"),
        ({"direction": torch.ones(43, dtype=torch.float64), "num_points": 4}, "odd number"),
        ({"direction": torch.ones(43, dtype=torch.float64), "radius": -1.0}, "positive distance"),
    ],
)
def test_what_does_not_fit_is_refused(problem, arguments, message):
    with pytest.raises(ValueError, match=message):
        line(*problem, **arguments)
