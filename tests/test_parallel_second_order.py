"""Newton-CG and Newton-MR against closed forms, SciPy and dense algebra, and on several ranks, in float64."""

import copy
from itertools import pairwise
from math import sqrt

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import hessian
from hessian.operators.base import Dense
from parallel import curvature
from parallel.optimizers import NewtonCG, NewtonMR
from parallel.optimizers.newton_cg import steihaug
from parallel.optimizers.newton_mr import minres
from tests.ranks import run_on_ranks


class Point(nn.Module):
    """Coordinates, which the loss takes as they are; data is of no consequence."""

    def __init__(self, *coordinates: float) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor(coordinates, dtype=torch.float64))

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.x.unsqueeze(0)


NOTHING = (torch.zeros(1, 1), torch.zeros(1, 1))


def symmetric(values, seed=0):
    """A matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))[0]
    matrix = basis @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ basis.T
    return (matrix + matrix.T) / 2


def quadratic(matrix, linear):
    return lambda outputs, _: 0.5 * outputs[0] @ matrix @ outputs[0] - linear @ outputs[0]


def rosenbrock(outputs, _):
    x, y = outputs[0]
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def random(size, seed=1):
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def advance(optimizer, model, loss, data=NOTHING):
    optimizer.observe(hessian.Hessian(model, loss, data))
    optimizer.step()
    return optimizer.last


def test_a_convex_quadratic_is_minimised_by_one_step():
    matrix, linear = symmetric(np.linspace(1, 3, 8)), random(8) * 1e-14  # a gradient so small asks for a small residual
    model = Point(*[0.0] * 8)
    optimizer = NewtonCG(model.parameters(), radius=10.0, max_radius=10.0)
    last = advance(optimizer, model, quadratic(matrix, linear))
    assert (last.accepted, last.stopped_by) == (True, "converged")
    assert last.ratio == pytest.approx(1, abs=1e-6)
    exact = torch.linalg.solve(matrix, linear)
    assert float((model.x.detach() - exact).norm()) < 3 * sqrt(1e-14) * float(exact.norm())


@pytest.mark.parametrize("radius", [0.05, 0.3, 5.0])
@pytest.mark.parametrize("lowest", [0.5, -2.0])
def test_a_step_is_that_of_trust_ncg(radius, lowest):
    """One iteration of SciPy's method on the same quadratic, whose forcing term is the same."""
    matrix, gradient = symmetric(np.linspace(lowest, 4, 9)), random(9)
    norm = float(gradient.norm())
    found = steihaug(Dense(matrix), gradient, radius, min(0.5, sqrt(norm)) * norm, 50)
    result = minimize(
        lambda x: 0.5 * x @ matrix.numpy() @ x + gradient.numpy() @ x,
        np.zeros(9),
        jac=lambda x: matrix.numpy() @ x + gradient.numpy(),
        hess=lambda _: matrix.numpy(),
        method="trust-ncg",
        options={"initial_trust_radius": radius, "max_trust_radius": 10.0, "maxiter": 1},
    )
    np.testing.assert_allclose(found.step.numpy(), result.x, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.image, matrix @ found.step)
    assert found.length == pytest.approx(float(found.step.norm()), rel=1e-12)


def test_negative_curvature_is_followed_to_the_boundary():
    matrix = symmetric([-3.0, -2.0, -1.0, 0.5])
    model = Point(*random(4).tolist())
    before = model.x.detach().clone()
    last = advance(NewtonCG(model.parameters(), radius=0.7), model, quadratic(matrix, torch.zeros(4, dtype=torch.float64)))
    assert last.stopped_by == "negative curvature"
    assert last.trial_loss < last.loss
    assert float((model.x.detach() - before).norm()) == pytest.approx(0.7, rel=1e-12)
    assert last.ratio == pytest.approx(1, rel=1e-9)


def test_rosenbrock_is_minimised():
    model = Point(-1.2, 1.0)
    optimizer = NewtonCG(model.parameters())
    losses = [advance(optimizer, model, rosenbrock) for _ in range(50)]
    assert all(after.loss <= before.loss for before, after in pairwise(losses))
    torch.testing.assert_close(model.x.detach(), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-8)
    assert losses[-1].gradient_norm < 1e-8


def test_a_rejected_step_leaves_the_parameters_and_shrinks_the_radius():
    """The logarithm has no value where a long step ends."""
    model = Point(1.5, 0.2)
    before = model.x.detach().clone()
    optimizer = NewtonCG(model.parameters(), radius=50.0)

    def barrier(outputs, _):
        return -outputs[0].log().sum() + outputs[0, 0] ** 4 - 100 * outputs[0, 1] ** 2

    last = advance(optimizer, model, barrier)
    assert not last.accepted
    assert last.trial_loss == float("inf")
    assert torch.equal(model.x.detach(), before)
    assert optimizer.radius == last.length / 4
    for _ in range(10):
        last = advance(optimizer, model, barrier)
    assert last.loss < float(barrier(before.unsqueeze(0), None))


def test_the_radius_follows_the_ratio_and_the_state_keeps_it():
    matrix, linear = symmetric([1.0, 2.0, 3.0]), 100 * random(3)
    model = Point(0.0, 0.0, 0.0)
    optimizer = NewtonCG(model.named_parameters(), radius=1.0, max_radius=3.0)
    assert [advance(optimizer, model, quadratic(matrix, linear)).radius for _ in range(4)] == [1.0, 2.0, 3.0, 3.0]
    other = NewtonCG(model.named_parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.radius == 3.0


def test_the_learning_rate_is_a_share_of_the_step():
    matrix, linear = symmetric([1.0, 2.0, 3.0]), 1e-8 * random(3)
    ends = []
    for lr in (1.0, 0.25):
        model = Point(0.0, 0.0, 0.0)
        optimizer = NewtonCG(model.parameters())
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _, lr=lr: lr)
        last = advance(optimizer, model, quadratic(matrix, linear))
        assert last.ratio == pytest.approx(1, rel=1e-6)
        ends.append(model.x.detach())
    torch.testing.assert_close(ends[1], ends[0] / 4, rtol=1e-12, atol=0)


def examples():
    """A curved network, a convex one, and 11 examples."""
    torch.manual_seed(0)
    smooth = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(11, 5, dtype=torch.float64)
    return smooth, x, torch.tensor([0, 1, 2, 2, 1, 1, 0, 2, 0, 1, 2])


def part(*tensors):
    """This rank's share: 7 examples and 4."""
    if not distributed.is_initialized():
        return tensors
    return tuple(tensor[:7] if distributed.get_rank() == 0 else tensor[7:] for tensor in tensors)


def trajectory(kind, optimizer_type):
    """Losses and, at the end, whole parameters of three steps on split data."""
    model, x, y = examples()
    wrapped = model
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (2,))
        for module in (model[0], model):
            fully_shard(module, mesh=mesh)
    if kind == "tensor parallel":
        parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    data = (x, y) if kind == "tensor parallel" else part(x, y)
    # MINRES of few iterations, for each lets rounding grow
    optimizer = (
        NewtonCG(model.named_parameters()) if optimizer_type is NewtonCG else NewtonMR(model.named_parameters(), rtol=0.3)
    )
    options = {"shard_vectors": True} if kind == "vectors in parts" else {}
    found = []
    for _ in range(3):
        optimizer.observe(curvature.hessian(wrapped, nn.CrossEntropyLoss(), data, **options))
        optimizer.step()
        found.append(torch.tensor([optimizer.last.loss, optimizer.last.gradient_norm], dtype=torch.float64))
    parameters = [one.full_tensor() if isinstance(one, DTensor) else one for one in model.parameters()]
    return torch.cat([*found, *(one.detach().reshape(-1) for one in parameters)])


KINDS = ("ddp", "vectors in parts", "fsdp", "tensor parallel")


def trajectories():
    return {(kind, one): trajectory(kind, one) for kind in KINDS for one in (NewtonCG, NewtonMR)}


def test_two_ranks_step_as_one():
    expected = {one: trajectory("plain", one) for one in (NewtonCG, NewtonMR)}
    assert all(float(one[5]) < float(one[1]) for one in expected.values())
    for rank in run_on_ranks(trajectories, 2):
        for (kind, one), found in rank.items():
            torch.testing.assert_close(
                found, expected[one], rtol=1e-9, atol=1e-10, msg=lambda text, at=(kind, one): f"{at}: {text}"
            )


@pytest.mark.parametrize("compatible", [True, False])
@pytest.mark.parametrize(("size", "rank"), [(5, 3), (12, 9), (60, 40)])
def test_minres_finds_the_pseudo_inverse_solution(size, rank, compatible):
    values = np.zeros(size)
    values[:rank] = np.linspace(0.5, 3, rank) * np.where(np.arange(rank) % 2, 1, -1)
    matrix, right = symmetric(values), random(size)
    right = matrix @ right if compatible else right
    found = minres(Dense(matrix), right, 1e-12, 4 * size)
    assert found.stopped_by == ("converged" if compatible else "least squares")
    assert found.num_matvecs <= 2 * size
    expected = torch.as_tensor(np.linalg.pinv(matrix.numpy(), rcond=1e-10)) @ right
    assert float((found.solution - expected).norm()) < 1e-7 * float(expected.norm())
    torch.testing.assert_close(found.residual, right - matrix @ expected, rtol=1e-6, atol=1e-6)
    assert found.residual_norm == pytest.approx(float(found.residual.norm()), rel=1e-6, abs=1e-10)


def test_minimal_residuals_are_the_least_in_their_krylov_space():
    matrix, right = symmetric(np.linspace(-2, 3, 20)), random(20)
    krylov = [right]
    for number in range(1, 8):
        found = minres(Dense(matrix), right, 1e-14, number)
        basis = torch.linalg.qr(torch.stack(krylov, 1))[0]
        best = torch.linalg.lstsq(matrix @ basis, right.unsqueeze(1)).solution
        torch.testing.assert_close(found.solution, (basis @ best)[:, 0], rtol=1e-8, atol=1e-10)
        krylov.append(matrix @ krylov[-1])
    assert minres(Dense(matrix), torch.zeros_like(right), 0.1, 5).stopped_by == "converged"


def test_logistic_regression_converges_to_a_gradient_of_nothing():
    _, x, y = examples()
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()  # adding a constant to all classes changes nothing: the Hessian is singular
    data = (torch.cat([x, x + 0.3]), torch.cat([y, (y + 1) % 3]))
    for optimizer in (NewtonMR(model.parameters()), NewtonCG(copy.deepcopy(model).parameters())):
        fitted = model
        if isinstance(optimizer, NewtonCG):
            fitted = nn.Linear(5, 3).double()
            fitted.weight, fitted.bias = optimizer.param_groups[0]["params"]
        norms = [advance(optimizer, fitted, nn.CrossEntropyLoss(), data).gradient_norm for _ in range(12)]
        assert norms[-1] < 1e-8, type(optimizer)
    assert all(after <= before for before, after in pairwise(norms))


def test_a_saddle_point_is_what_minimal_residuals_find():
    """And conjugate gradients leave."""
    matrix = symmetric([-1.0, 2.0, 3.0])
    zero = torch.zeros(3, dtype=torch.float64)
    model = Point(1.0, 2.0, 3.0)
    optimizer = NewtonMR(model.parameters(), rtol=1e-10)
    assert advance(optimizer, model, quadratic(matrix, zero)).rate == 1
    assert advance(optimizer, model, quadratic(matrix, zero)).gradient_norm < 1e-9
    away = NewtonCG(model.parameters())
    with torch.no_grad():
        model.x.add_(1e-3)
    assert [advance(away, model, quadratic(matrix, zero)).loss for _ in range(6)][-1] < -1


def test_a_gradient_in_the_null_space_stops_minimal_residuals():
    model = Point(1.0, 2.0)
    before = model.x.detach().clone()
    matrix = torch.zeros(2, 2, dtype=torch.float64)
    last = advance(NewtonMR(model.parameters()), model, quadratic(matrix, torch.ones(2, dtype=torch.float64)))
    assert (last.stopped_by, last.accepted) == ("stationary", False)
    assert torch.equal(model.x.detach(), before)


def test_steps_of_minimal_residuals_that_do_not_help_are_not_taken():
    """Newton's step for the root of atan, from too far away, and one that the search is not allowed to halve enough."""
    model = Point(3.0)

    def loss(outputs, _):
        return (outputs * outputs.atan() - 0.5 * (1 + outputs**2).log()).sum()

    impatient = NewtonMR(model.parameters(), max_halvings=1)
    assert not advance(impatient, model, loss).accepted
    assert float(model.x.detach()) == 3.0
    optimizer = NewtonMR(model.parameters())
    first = advance(optimizer, model, loss)
    assert 0 < first.rate < 0.5
    assert first.trial_norm < first.gradient_norm
    for _ in range(6):
        advance(optimizer, model, loss)
    assert abs(float(model.x.detach())) < 1e-10


def test_what_cannot_be_stepped_by_is_refused():
    model, x, y = examples()
    loss, data = nn.CrossEntropyLoss(), (x, y)
    for kind in (NewtonCG, NewtonMR):
        optimizer = kind(model.named_parameters())
        assert optimizer.needs_curvature()
        with pytest.raises(RuntimeError, match=r"steps by curvature: call observe\(hessian.Hessian\(model, loss, batch\)\)"):
            optimizer.step()
        with pytest.raises(
            ValueError, match=r"the operator lacks the optimizer's parameter '0.weight': make the operator of it"
        ):
            optimizer.observe(hessian.Hessian(model, loss, data, "2.*"))
        with pytest.raises(ValueError, match=r"not have the operator's parameter '0.weight': leave it out .*named_parameters"):
            kind(model[2].parameters()).observe(hessian.Hessian(model, loss, data))
        with pytest.raises(TypeError, match="a Dense knows no loss"):
            optimizer.observe(Dense(symmetric([1.0])))
        with pytest.raises(ValueError, match="moves all parameters by one step: pass one group, not 2"):
            kind([{"params": [one]} for one in model[0].parameters()])
        with pytest.raises(ValueError, match=r"lr=2.0: it is a share of the Newton step"):
            kind(model.parameters(), lr=2.0)
        optimizer.observe(hessian.Hessian(model, loss, data))
        optimizer.step()
        with pytest.raises(RuntimeError, match="before step"):
            optimizer.step()
    for options, message in (
        ({"radius": 0.0}, "radius=0.0: give a positive number"),
        ({"radius": 5.0, "max_radius": 1.0}, "of at most max_radius=1.0"),
        ({"max_matvecs": 0}, "max_matvecs=0: give a number of products"),
    ):
        with pytest.raises(ValueError, match=message):
            NewtonCG(model.parameters(), **options)
    for options, message in (
        ({"rtol": 1.0}, "rtol=1.0: give a residual"),
        ({"rho": 0.5}, "rho=0.5: give a number between"),
        ({"max_halvings": 0}, "max_halvings=0: give"),
    ):
        with pytest.raises(ValueError, match=message):
            NewtonMR(model.parameters(), **options)


def test_names_match_where_tensors_do_not():
    """An operator of a copy moves the optimizer's own parameters."""
    model, x, y = examples()
    expected = copy.deepcopy(model)
    optimizers = [NewtonCG(expected.parameters()), NewtonCG(reversed(list(model.named_parameters())))]
    for one, of in zip(optimizers, (expected, copy.deepcopy(model)), strict=True):
        one.observe(hessian.Hessian(of, nn.CrossEntropyLoss(), (x, y)))
    optimizers[0].step()
    with torch.no_grad():
        optimizers[1]._operator.loss_value = lambda: 0.0  # of the copy, which stays: taken for a great decrease
    optimizers[1].step()
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-12, atol=0)
