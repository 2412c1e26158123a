"""LARS, LAMB and AdaHessian against loops over their papers' formulas and closed forms, in float64, on one and many ranks."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

import parallel
from hessian.operators.base import Dense
from hessian.processes import joined
from hessian.space import VectorSpace
from hessian.split_data import own_parts
from parallel.optimizers import LAMB, LARS, AdaHessian
from tests.ranks import run_on_ranks

SHAPES = {"conv": (5, 3, 2, 3), "linear": (7, 4), "bias": (6,), "zero": (4, 2)}
MAKE = {
    "lars": lambda parameters: LARS(parameters, 0.7, eta=0.1, weight_decay=0.05),
    "lamb": lambda parameters: LAMB(parameters, 0.03, weight_decay=0.1, bounds=(0.0, 2.0)),
    "adahessian": lambda parameters: AdaHessian(parameters, 0.1, weight_decay=0.1, hessian_power=0.7, samples=2),
}


class Quadratic(Dense):
    """A matrix of which the coordinates belong to parameters; `signs`, if given, are drawn in place of random ones."""

    def __init__(self, matrix, parameters, signs=None):
        super().__init__(matrix)
        self.parameters, self.signs = parameters, signs

    @property
    def space(self):
        space = VectorSpace(len(self.matrix), self.dtype, self.device)
        if self.signs is not None:
            space.random = lambda *_: self.signs
        return space


def drawn(seed, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def weights(shapes=SHAPES):
    return {name: nn.Parameter(tensor * (name != "zero")) for name, tensor in drawn(0, shapes).items()}


def diagonals():
    """A diagonal matrix in all entries of `SHAPES`, and its parts by name."""
    parts = {name: tensor * 3 for name, tensor in drawn(99).items()}
    return torch.diag(torch.cat([part.reshape(-1) for part in parts.values()])), parts


def steps(optimizer, parameters, count=5, operator=None):
    """Weights after steps with gradients drawn for each of them."""
    for step in range(1, count + 1):
        for name, gradient in drawn(step).items():
            parameters[name].grad = gradient
        if operator is not None:
            optimizer.observe(operator, torch.Generator().manual_seed(step))
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def norm(tensor):
    return sum(entry**2 for entry in tensor.reshape(-1).tolist()) ** 0.5


def assert_close(found, expected, tolerance=1e-12):
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("adapt_vectors", [False, True])
def test_lars_is_its_paper(adapt_vectors):
    parameters, groups = weights(), {"conv": (0.7, 0.1), "linear": (0.7, 0.1), "bias": (0.3, 0.2), "zero": (0.3, 0.2)}
    options = [
        {
            "params": [(name, parameters[name]) for name in groups if groups[name] == pair],
            "lr": pair[0],
            "weight_decay": pair[1],
        }
        for pair in ((0.7, 0.1), (0.3, 0.2))
    ]
    found = steps(LARS(options, eta=0.05, momentum=0.8, adapt_vectors=adapt_vectors), parameters)
    expected = {name: parameter.detach().clone() for name, parameter in weights().items()}
    velocities = dict.fromkeys(SHAPES, 0.0)
    for step in range(1, 6):
        for name, gradient in drawn(step).items():
            (rate, decay), local, weight = groups[name], 1.0, expected[name]
            if name == "bias" and not adapt_vectors:
                decay = 0.0
            elif norm(weight) > 0:
                local = 0.05 * norm(weight) / (norm(gradient) + decay * norm(weight))
            velocities[name] = 0.8 * velocities[name] + rate * local * (gradient + decay * weight)
            expected[name] = weight - velocities[name]
    assert_close(found, expected)


def test_lars_without_gradient_norms_is_momentum():
    one, other = weights({"bias": (6,)}), weights({"bias": (6,)})
    ours, theirs = LARS(one.values(), 0.1), torch.optim.SGD(other.values(), 0.1, momentum=0.9)
    for step in range(5):
        one["bias"].grad = other["bias"].grad = drawn(step, {"bias": (6,)})["bias"]
        ours.step()
        theirs.step()
    assert_close(one, other)
    layer = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    layer.grad = torch.zeros_like(layer)
    LARS([layer]).step()
    assert torch.equal(layer, torch.ones_like(layer))


@pytest.mark.parametrize("bounds", [None, (1.0, 1.5)])
def test_lamb_is_its_paper(bounds):
    parameters = weights()
    found = steps(LAMB(parameters.items(), 0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1, bounds=bounds), parameters)
    for name, first_weight in weights().items():
        weight, mean, square = first_weight.detach().clone(), 0.0, 0.0
        for step in range(1, 6):
            gradient = drawn(step)[name]
            mean, square = 0.8 * mean + 0.2 * gradient, 0.95 * square + 0.05 * gradient**2
            direction = mean / (1 - 0.8**step) / ((square / (1 - 0.95**step)).sqrt() + 1e-3) + 0.1 * weight
            size = norm(weight) if bounds is None else min(max(norm(weight), bounds[0]), bounds[1])
            weight = weight - 0.05 * (size / norm(direction) if size else 1.0) * direction
        assert_close(found, {name: weight})


def test_lamb_goes_adams_way():
    """With one bound for all norms a step is as long in every layer; its direction is that of decoupled Adam."""
    one, other = weights(), weights()
    steps(LAMB(one.items(), 0.01, eps=1e-8, weight_decay=0.1, bounds=(3.0, 3.0)), one, 1)
    steps(torch.optim.AdamW(other.values(), 0.01, weight_decay=0.1), other, 1)
    for name, before in weights().items():
        ours, theirs = before - one[name], before - other[name]
        assert norm(ours) == pytest.approx(0.03, rel=1e-12)
        torch.testing.assert_close(ours / norm(ours), theirs / norm(theirs), rtol=1e-10, atol=1e-12)


def test_adahessian_on_a_diagonal_quadratic():
    """z * A z is A's diagonal whatever the signs; negative and zero curvature among it."""
    curvature = torch.tensor([4.0, -0.5, 0.0, 1e-3], dtype=torch.float64)
    x = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = AdaHessian([x], 0.1, betas=(0.8, 0.9), eps=1e-2, weight_decay=0.05, hessian_power=0.5)
    operator, expected, mean = Quadratic(torch.diag(curvature), {"x": x}), torch.ones(4, dtype=torch.float64), 0.0
    for step in range(1, 7):
        x.grad = curvature * x.detach()
        optimizer.observe(operator)
        optimizer.step()
        mean = 0.8 * mean + 0.2 * curvature * expected
        scale = curvature.abs() ** 0.5 + 1e-2  # v / (1 - beta^n) is the square of a constant D
        expected = expected - 0.1 * (mean / (1 - 0.8**step) / scale + 0.05 * expected)
    torch.testing.assert_close(x.detach(), expected, rtol=1e-12, atol=1e-13)


def test_all_signs_average_to_the_diagonal():
    matrix = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=6)), dtype=torch.float64)
    x = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    optimizer = AdaHessian([x], betas=(0.9, 0.75))
    optimizer.observe(Quadratic(matrix + matrix.T, {"x": x}, signs))
    moment = optimizer.state[x]["exp_hessian_diagonal_sq"]
    torch.testing.assert_close(moment.view(-1), 0.25 * (2 * matrix.diagonal()) ** 2, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("average", [False, True])
def test_kernels_have_one_curvature(average):
    matrix, parts = diagonals()
    parameters = weights()
    optimizer = AdaHessian(parameters.items(), betas=(0.9, 0.75), spatial_average=average)
    optimizer.observe(Quadratic(matrix, parameters))
    expected = {name: part.abs().clone() for name, part in parts.items()}
    if average:
        for out, into in itertools.product(range(5), range(3)):
            expected["conv"][out, into] = sum(abs(float(entry)) for entry in parts["conv"][out, into].view(-1)) / 6
    found = {name: optimizer.state[parameter]["exp_hessian_diagonal_sq"] for name, parameter in parameters.items()}
    assert_close(found, {name: 0.25 * tensor**2 for name, tensor in expected.items()})


def test_delayed_curvature_stays_and_counts_once():
    x = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = AdaHessian([x], 0.1, betas=(0.0, 0.9), eps=1e-12, curvature_every=3)
    curvature, asked, seen, moment, expected = torch.tensor([1.0, 4.0], dtype=torch.float64), [], 0, 0.0, torch.ones(2).double()
    for step in range(8):
        x.grad = torch.ones_like(x)
        asked.append(optimizer.needs_curvature())
        if asked[-1]:
            seen += 1
            optimizer.observe(Quadratic(torch.diag(curvature * (step + 1)), {"x": x}))
            moment = 0.9 * moment + 0.1 * (curvature * (step + 1)) ** 2
        optimizer.step()
        expected -= 0.1 / (moment / (1 - 0.9**seen)).sqrt()
    assert asked == [True, False, False, True, False, False, True, False]
    torch.testing.assert_close(x.detach(), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", MAKE)
def test_states_are_kept_and_rates_scheduled(name):
    """A new optimizer with the state, and a copy, take the same step bit by bit; closures, schedulers and missing gradients."""
    parameters = weights()
    matrix, _ = diagonals()
    operator = Quadratic(matrix, parameters) if name == "adahessian" else None
    optimizer = MAKE[name](parameters.items())
    steps(optimizer, parameters, 3, operator)
    others = {key: nn.Parameter(parameter.detach().clone()) for key, parameter in parameters.items()}
    other = MAKE[name](others.items())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(isinstance(value, torch.Tensor | int) for slots in other.state.values() for value in slots.values())
    copied, copied_optimizer = copy.deepcopy((parameters, optimizer))
    for one, chosen in ((optimizer, parameters), (other, others), (copied_optimizer, copied)):
        scheduler = torch.optim.lr_scheduler.StepLR(one, 1, 0.5)
        chosen["linear"].grad = None
        before = chosen["linear"].detach().clone()
        for key in ("conv", "bias", "zero"):
            chosen[key].grad = drawn(4)[key]
        assert one.step(lambda: 3.5) == 3.5
        scheduler.step()
        assert one.param_groups[0]["lr"] == 0.5 * MAKE[name](weights().items()).param_groups[0]["lr"]
        assert torch.equal(chosen["linear"], before)
        steps(one, chosen, 1, operator)
    for chosen in (others, copied):
        assert all(torch.equal(parameter, parameters[key]) for key, parameter in chosen.items())


def divided():
    """Weights by optimizer and by how they are divided over the ranks."""
    ranks, found = distributed.get_world_size(), {}
    grid = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("batch", "shared"))
    layouts = {
        "over all ranks": (init_device_mesh("cpu", (ranks,)), [Shard(0)]),
        "as layers that are laid out": (grid["shared"], [Shard(0)]),
        "copied along one dimension": (grid, [Replicate(), Shard(0)]),
        "along two dimensions": (grid, [Shard(1), Shard(0)]),
    }
    for (name, make), (layout, (mesh, placements)) in itertools.product(MAKE.items(), layouts.items()):
        tensors = {key: tensor.detach() for key, tensor in weights().items()}
        whole = [key for key in tensors if key == "linear" or tensors[key].dim() < len(placements)]

        def part(key, tensor, mesh=mesh, placements=placements, whole=whole):
            return tensor if key in whole else distribute_tensor(tensor, mesh, placements, src_data_rank=None)

        parameters = {key: nn.Parameter(part(key, tensor)) for key, tensor in tensors.items()}
        optimizer, operator = make(parameters.items()), Quadratic(diagonals()[0], weights())
        for step in range(1, 5):
            for key, gradient in drawn(step).items():
                parameters[key].grad = part(key, gradient)
            if name == "adahessian":
                optimizer.observe(operator, torch.Generator().manual_seed(step))
            optimizer.step()
        slots = [value for value in optimizer.state[parameters["conv"]].values() if not isinstance(value, int)]
        assert all(isinstance(value, DTensor) for value in slots)
        found[name, layout] = {
            key: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
            for key, tensor in parameters.items()
        }
    return found


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_parts_of_layers_move_as_the_whole(ranks):
    matrix, _ = diagonals()
    expected = {}
    for name, make in MAKE.items():
        parameters = weights()
        operator = Quadratic(matrix, parameters) if name == "adahessian" else None
        expected[name] = steps(make(parameters.items()), parameters, 4, operator)
    for rank in run_on_ranks(divided, ranks):
        for (name, _), found in rank.items():
            assert_close(found, expected[name], 1e-11)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(5 * 4, 3)).double()


def batch():
    x = torch.randn(7, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(7) % 3


def fully_sharded(name, folder=None):
    """Weights after four steps; with a folder, the last two are another optimizer's, which reads what torch wrote there."""
    network, ranks = model(), distributed.get_world_size()
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        fully_shard(network[0], mesh=mesh)
        fully_shard(network, mesh=mesh)
    own = own_parts([batch()], distributed.get_rank(), ranks)[0]
    optimizer = MAKE[name](network.named_parameters())
    for step in range(4):
        if folder is not None and step == 2:
            dcp.save(get_optimizer_state_dict(network, optimizer), checkpoint_id=folder)
            optimizer = MAKE[name](network.named_parameters())
            for parameter in network.parameters():
                parameter.grad = None
            state = get_optimizer_state_dict(network, optimizer)
            dcp.load(state, checkpoint_id=folder)
            set_optimizer_state_dict(network, optimizer, state)
        network.zero_grad()
        (F.cross_entropy(network(own[0]), own[1], reduction="sum") / 7 * ranks).backward()
        if name == "adahessian":
            operator = parallel.curvature.hessian(network, nn.CrossEntropyLoss(), own)
            optimizer.observe(operator, torch.Generator().manual_seed(step))
        optimizer.step()
    parameters = network.named_parameters()
    return {key: (one.full_tensor() if isinstance(one, DTensor) else one).detach() for key, one in parameters}


def all_fully_sharded(folder):
    return {name: fully_sharded(name, Path(folder, name)) for name in MAKE}


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_fsdp_moves_as_one_process_and_torch_keeps_its_state(ranks, tmp_path):
    with joined():
        expected = {name: fully_sharded(name) for name in MAKE}
    for rank in run_on_ranks(all_fully_sharded, ranks, str(tmp_path)):
        for name, found in rank.items():
            assert_close(found, expected[name], 1e-10)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (LARS, {"lr": 0.0}, "lr=0.0: give a positive learning rate"),
        (LARS, {"eta": -1.0}, "eta=-1.0: give a positive trust coefficient"),
        (LARS, {"momentum": 1.0}, "momentum=1.0: give a number from 0 to below 1"),
        (LARS, {"weight_decay": -0.1}, "weight_decay=-0.1: give a number of at least 0"),
        (LAMB, {"lr": float("nan")}, "lr=nan: give"),
        (LAMB, {"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\): give numbers from 0 to below 1"),
        (LAMB, {"bounds": (2.0, 1.0)}, r"bounds=\(2.0, 1.0\): give a least and a largest norm"),
        (AdaHessian, {"eps": 0.0}, "eps=0.0: give a small positive number"),
        (AdaHessian, {"hessian_power": 1.5}, "hessian_power=1.5: give a number above 0, at most 1"),
        (AdaHessian, {"curvature_every": 0}, "curvature_every=0: give a number of at least 1"),
    ],
)
def test_bad_hyperparameters(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(weights().items(), **options)
    if "curvature_every" not in options:
        with pytest.raises(ValueError, match=message):
            kind([{"params": list(weights().values()), **options}])


@pytest.mark.parametrize("name", MAKE)
def test_what_cannot_be_optimized(name):
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients: make the embedding with sparse=False"):
        MAKE[name](embedding.parameters()).step()
    others = weights()
    other = torch.optim.SGD(others.values(), 0.1, momentum=0.9)
    steps(other, others, 1)
    with pytest.raises(ValueError, match="the state is of another optimizer: its groups have no"):
        MAKE[name](weights().items()).load_state_dict(other.state_dict())
    state = MAKE[name](weights().items()).state_dict()
    state["state"] = {0: {"max_exp_avg": torch.zeros(2)}}
    with pytest.raises(ValueError, match="the state is of another optimizer: it keeps 'max_exp_avg'"):
        MAKE[name](weights().items()).load_state_dict(state)


def test_curvature_that_does_not_fit():
    parameters, (matrix, _) = weights(), diagonals()
    optimizer = AdaHessian(parameters.items())
    with pytest.raises(RuntimeError, match="there is no curvature yet: call observe"):
        steps(optimizer, parameters, 1)
    with pytest.raises(TypeError, match="a Combination does not tell the parameters of its coordinates"):
        optimizer.observe(2.0 * Quadratic(matrix, parameters))
    part = {"bias": parameters["bias"]}
    with pytest.raises(ValueError, match="does not have the parameter 'conv' that this optimizer trains: make it of the same"):
        optimizer.observe(Quadratic(torch.eye(6, dtype=torch.float64), part))
    with pytest.raises(ValueError, match=r"parameter 0 of a group, of shape \(5, 3, 2, 3\), that this"):
        AdaHessian(weights().values()).observe(Quadratic(matrix, parameters))
    with pytest.raises(ArithmeticError, match="the curvature of 'linear' is not finite"):
        optimizer.observe(Quadratic(torch.diag(matrix.diagonal().index_fill(0, torch.tensor([91]), torch.nan)), parameters))
    assert not any(optimizer.state.values())
