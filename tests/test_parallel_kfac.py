"""The K-FAC optimizer against definitions, one example and one position at a time, and on several ranks, in float64."""

import copy
import dataclasses
from math import sqrt

import pytest
import torch
from torch import distributed, nn
from torch.distributed import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional as F

import hessian
from hessian.processes import Processes, joined
from parallel.checkpoint import Checkpoints
from parallel.optimizers import KFAC
from parallel.replica import whole
from parallel.run_state import numbers_of, restore, tensors_of
from parallel.train_options import Config
from parallel.trainer import Trainer
from tests.cases import ConvNet, classification, seeded
from tests.ranks import run_on_ranks
from tests.training_tasks import small


def close(found, expected, tolerance=1e-11):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def factors(optimizer, layer):
    state = optimizer.state[layer.weight]
    return state["input_factor"], state["output_factor"]


def take_step(model, optimizer, inputs, targets, loss=F.cross_entropy):
    optimizer.zero_grad()
    value = loss(model(inputs), targets)
    value.backward()
    optimizer.step()
    return float(value.detach())


def seen_by(model, layer, inputs, targets, loss=F.cross_entropy):
    """Of each example by itself, the layer's inputs and the gradient of the example's own loss in its outputs."""
    seen = []
    handle = layer.register_forward_hook(lambda _, args, output: seen.append((args[0].detach(), output)))
    found = []
    for example in range(len(inputs)):
        seen.clear()
        value = loss(model(inputs[example : example + 1]), targets[example : example + 1])
        gradients = torch.autograd.grad(value, [output for _, output in seen])
        found.append([(entered, gradient) for (entered, _), gradient in zip(seen, gradients, strict=True)])
    handle.remove()
    return found


def linear_factors(model, layer, inputs, targets):
    """A and G by their definition, for a linear layer that may be used several times."""
    rows, gradients = [], []
    examples = seen_by(model, layer, inputs, targets)
    for uses in examples:
        for entered, gradient in uses:
            rows += [torch.cat([row, row.new_ones(1)]) for row in entered.reshape(-1, layer.in_features)]
            gradients += list(gradient.reshape(-1, layer.out_features))
    return (
        sum(torch.outer(row, row) for row in rows) / len(rows),
        sum(torch.outer(row, row) for row in gradients) / len(examples),
    )


class Pooled(nn.Module):
    """Linear layers at several positions, the second one used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = torch.tanh(self.second(torch.tanh(self.second(torch.tanh(self.first(x))))))
        return self.last(x.mean(1))


@pytest.mark.parametrize("passes", [1, 3])
def test_factors_of_linear_layers_equal_their_definition(passes):
    """In one pass, or in three of unequal sizes whose losses add up to the mean."""
    model, (x, y) = seeded(Pooled).train(), classification(7, 6, 4)
    optimizer = KFAC(model, lr=0.0)
    expected = {layer: linear_factors(model, layer, x, y) for layer in (model.first, model.second, model.last)}
    assert optimizer.needs_curvature()
    for rows in torch.arange(7).tensor_split(passes):
        if passes > 1:
            optimizer.weigh(len(rows), 7)
        (F.cross_entropy(model(x[rows]), y[rows]) * (len(rows) / 7)).backward()
    model.eval()
    F.cross_entropy(model(x), y).backward()  # counts neither in evaluation mode ...
    model.train()(x)  # ... nor without a backward pass
    optimizer.step()
    assert not optimizer.needs_curvature()
    for layer, (inputs, outputs) in expected.items():
        close(factors(optimizer, layer)[0], inputs)
        close(factors(optimizer, layer)[1], outputs)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (4, 2, 5, 6)),
        (nn.Conv2d(2, 3, 3, padding="same", padding_mode="reflect", bias=False), (4, 2, 4, 5)),
        (nn.Conv1d(3, 2, 3, stride=2), (4, 3, 8)),
    ],
)
def test_factors_of_convolutions_equal_a_loop_over_positions(layer, shape):
    layer = copy.deepcopy(layer).double()
    x, y = torch.randn(shape, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    model = nn.Sequential(layer, nn.Flatten(2), nn.AdaptiveMaxPool1d(1), nn.Flatten())
    examples = seen_by(model, layer, x, y)
    optimizer = KFAC(model, lr=0.0)
    take_step(model, optimizer, x, y)
    patches, gradients = [], []
    for ((entered, gradient),) in examples:
        for position in torch.cartesian_prod(*(torch.arange(size) for size in gradient.shape[2:])).reshape(-1, x.dim() - 2):
            at = (0, slice(None), *position.tolist())
            probe = entered.clone().requires_grad_()
            (patch,) = torch.autograd.grad(layer(probe)[(0, 0, *position.tolist())], layer.weight)
            ones = [] if layer.bias is None else [torch.ones(1, dtype=torch.float64)]
            patches.append(torch.cat([patch[0].reshape(-1), *ones]))
            gradients.append(gradient[at])
    inputs, outputs = factors(optimizer, layer)
    close(inputs, sum(torch.outer(row, row) for row in patches) / len(patches))
    close(outputs, sum(torch.outer(row, row) for row in gradients) / len(examples))


def test_blocks_are_those_of_the_empirical_operator():
    """hessian.KFAC keeps the bias in a block of its own: its blocks have the factors without the bias's row and column."""
    model, (x, y) = seeded(ConvNet).eval(), classification(5, 1, 9, 9)
    operator = hessian.KFAC(model, nn.CrossEntropyLoss(), (x, y), kind="empirical")
    model.train()
    model.bn.eval(), model.bn2.eval()
    optimizer = KFAC(model, lr=0.0)
    take_step(model, optimizer, x, y)
    assert [layer.name for layer in optimizer.layers] == ["stem", "project", "fc"]  # not the grouped ones
    for layer in optimizer.layers:
        inputs, outputs = factors(optimizer, layer)
        width = layer.weight[0].numel()
        close(torch.kron(outputs, inputs[:width, :width].contiguous()), operator.block(f"{layer.name}.weight").to_dense())


def test_the_step_is_newtons_where_the_fisher_matrix_is_the_hessian():
    r"""Every input meets every residual, and residuals have the covariance I: :math:`F = I \otimes E[x x^T] = H`."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    residuals = sqrt(3) * torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator))[0]
    model = nn.Linear(4, 3, bias=False).double()
    x, r = points.repeat_interleave(3, 0), residuals.repeat(6, 1)
    y = model(x).detach() - r

    def loss(outputs, targets):
        return 0.5 * (outputs - targets).square().sum(1).mean()

    gradients = torch.stack([torch.outer(one, other).reshape(-1) for one, other in zip(r, x, strict=True)])
    fisher = gradients.T @ gradients / len(x)
    expected = model.weight.detach() - torch.linalg.solve(fisher, gradients.mean(0)).view(3, 4)
    optimizer = KFAC(model, lr=1.0, momentum=0.0, damping=1e-20, clip=None)
    take_step(model, optimizer, x, y, loss)
    close(model.weight.detach(), expected, 1e-7)
    (after,) = torch.autograd.grad(loss(model(x), y), model.weight)
    assert float(after.norm()) < 1e-8 * float(gradients.mean(0).norm())


def test_inverses_are_those_of_the_damped_factors_and_averages_decay():
    model, damping = seeded(Pooled).train(), 1e-2
    optimizer = KFAC(model, lr=0.0, damping=damping, factor_decay=0.9, factor_every=2, inverse_every=4)
    truth = {}
    for step in range(5):
        x, y = (tensor[step : step + 4] for tensor in classification(9, 6, 4))
        if step % 2 == 0:
            new = linear_factors(model, model.first, x, y)
            truth = {i: new[i] if step == 0 else 0.9 * truth[i] + 0.1 * new[i] for i in (0, 1)}
        take_step(model, optimizer, x, y)
        close(factors(optimizer, model.first)[0], truth[0])
        close(factors(optimizer, model.first)[1], truth[1])
        if step % 4 == 0:
            pi = sqrt((truth[0].trace() / 5) / (truth[1].trace() / 5))
            state = optimizer.state[model.first.weight]
            one = torch.eye(5, dtype=torch.float64)
            close(state["input_inverse"] @ (truth[0] + pi * sqrt(damping) * one), one, 1e-9)
            close(state["output_inverse"] @ (truth[1] + sqrt(damping) / pi * one), one, 1e-9)


def test_embeddings_have_frequencies_for_factors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 3), nn.Flatten(), nn.Linear(12, 3)).double()
    tokens, y = torch.tensor([[0, 1, 1, 2], [5, 5, 5, 0], [2, 1, 0, 3]]), torch.tensor([0, 1, 2])
    before, damping = model[0].weight.detach().clone(), 0.1
    gradients = [gradient for ((_, gradient),) in seen_by(model, model[0], tokens, y)]
    optimizer = KFAC(model, lr=1.0, momentum=0.0, damping=damping, clip=None)
    take_step(model, optimizer, tokens, y)
    rows = torch.cat(gradients).reshape(-1, 3)
    frequencies, outputs = torch.bincount(tokens.flatten(), minlength=6).double() / 12, rows.T @ rows / 3
    close(factors(optimizer, model[0])[0], frequencies)
    close(factors(optimizer, model[0])[1], outputs)
    pi = sqrt((1 / 6) / (outputs.trace() / 3))
    gradient = model[0].weight.grad
    step = torch.linalg.solve(outputs + sqrt(damping) / pi * torch.eye(3).double(), gradient.T).T
    close(before - model[0].weight.detach(), step / (frequencies + pi * sqrt(damping)).unsqueeze(1))


class Uncovered(nn.Module):
    """A grouped convolution, norms, and one weight for two modules."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.scale = nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.LayerNorm(4)
        self.into, self.out = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.out.weight = self.into.weight

    def forward(self, x):
        return self.out(self.into(self.scale(self.norm(self.conv(x)).amax((2, 3)))))


def test_parameters_without_factors_take_the_steps_of_sgd():
    models = [seeded(Uncovered).train(), seeded(Uncovered).train()]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    optimizers = [KFAC(models[0], **options), torch.optim.SGD(models[1].parameters(), **options)]
    assert optimizers[0].layers == []
    for step in range(4):
        x, y = classification(6, 2, 4, 4)
        for model, optimizer in zip(models, optimizers, strict=True):
            take_step(model, optimizer, x + step, y)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        close(one.detach(), other.detach(), 1e-14)


def test_a_step_is_shortened_to_the_length_clip_in_the_fishers_metric():
    x, y = classification(7, 6, 4)
    moves, lr, clip = [], 0.5, 1e-4
    for limit in (None, clip, 1e6):
        model = seeded(Pooled).train()
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        take_step(model, KFAC(model, lr=lr, clip=limit), x, y)
        moves.append(before - nn.utils.parameters_to_vector(model.parameters()).detach())
        gradient = torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()])
    nu = sqrt(clip / (lr * float(moves[0] @ gradient)))
    assert nu < 1
    close(moves[1], nu * moves[0])
    close(moves[2], moves[0], 1e-14)


def test_a_state_dict_continues_the_trajectory():
    def run(model, optimizer, steps):
        return [
            take_step(model, optimizer, *(tensor[step : step + 5] for tensor in classification(12, 6, 4))) for step in steps
        ]

    options = {"lr": 0.1, "factor_every": 2, "inverse_every": 3, "weight_decay": 1e-3}
    model = seeded(Pooled).train()
    optimizer = KFAC(model, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    run(model, optimizer, range(3))
    scheduler.step()
    copied = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    expected = run(model, optimizer, range(3, 8))
    other = seeded(Pooled).train()
    other.load_state_dict(copied)
    restored = KFAC(other, **options)
    restored.load_state_dict(state)
    assert run(other, restored, range(3, 8)) == expected


def trainer(**options):
    """With factors and inverses more often than by default, and a square layer whose factor has its weight's shape."""
    processes = Processes(distributed.get_rank(), distributed.get_world_size(), torch.device("cpu"), HashStore(), 0)
    torch.manual_seed(1)
    head = [nn.Flatten(), nn.Linear(16, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 3)]
    task = small()
    task = dataclasses.replace(task, model=nn.Sequential(*list(task.model)[:-2], *head).double())
    loss = options.pop("loss", None)
    config = Config("small", **{"batch_size": 14, "steps": 6, "optimizer": "kfac", "learning_rate": 0.05} | options)
    one = Trainer(task if loss is None else dataclasses.replace(task, loss=loss), config, processes)
    one.optimizer.factor_every, one.optimizer.inverse_every = 2, 3
    return one


CONFIGS = {
    "plain": {},
    "accumulated": {"accumulate": 2, "weight_decay": 1e-2},
    "ignored, clipped": {"loss": nn.CrossEntropyLoss(ignore_index=0), "clip": 0.5},
    "sum": {"loss": nn.CrossEntropyLoss(reduction="sum"), "accumulate": 2, "learning_rate": 1e-3},
    "recomputed, smooth": {"checkpoint_activations": True, "label_smoothing": 0.1},
    "sharded": {"shard": True},
}


def outcomes():
    found = {}
    for name, options in CONFIGS.items():
        one = trainer(**options)
        losses = torch.tensor([row["loss"] for row in one.train()], dtype=torch.float64)
        tensors = whole(one.replica.state())
        for layer in one.optimizer.layers:
            state = one.optimizer.state[layer.weight]
            tensors |= {f"{slot}.{layer.name}": tensor for slot, tensor in state.items() if slot.endswith("_factor")}
        found[name] = tensors | {"losses": losses}
    return found


@pytest.fixture(scope="module")
def one_process():
    with joined():
        return outcomes()


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_many_ranks_train_as_one_process(one_process, ranks):
    """Batches of 14, and passes of 7, that do not divide evenly; every rank has all factors."""
    for rank in run_on_ranks(outcomes, ranks):
        for name, tensors in rank.items():
            assert tensors.keys() == one_process[name].keys()
            for key, tensor in tensors.items():
                torch.testing.assert_close(
                    tensor, one_process[name][key], rtol=1e-10, atol=1e-10, msg=lambda text, at=(name, key): f"{at}: {text}"
                )


def test_accumulation_and_recomputation_change_no_factor():
    """Without batch norm's moments, which are those of each pass."""
    with joined():
        found = []
        for options in ({}, {"accumulate": 7}, {"checkpoint_activations": True}):
            one = trainer(steps=1, **options)
            for norm in (module for module in one.replica.model.modules() if isinstance(module, nn.BatchNorm2d)):
                norm.eval()
            list(one.train())
            found.append([tensor for layer in one.optimizer.layers for tensor in factors(one.optimizer, layer)])
    assert len(found[0]) == 2 * 6
    for other in found[1:]:
        for one, tensor in zip(found[0], other, strict=True):
            close(one, tensor)


def resumed(folder):
    whole_run = trainer(shard=True)
    expected = [row["loss"] for row in whole_run.train()]
    first = trainer(shard=True)
    found = []
    for row in first.train():
        found.append(row["loss"])
        if first.step == 4:
            break
    checkpoints = Checkpoints(folder)
    checkpoints.save(4, tensors_of(first), numbers_of(first))
    checkpoints.finish()
    second = trainer(shard=True)
    restore(second, checkpoints, 4)
    found += [row["loss"] for row in second.train()]
    return expected, found


def test_a_checkpoint_of_divided_parameters_continues_the_run(tmp_path):
    for expected, found in run_on_ranks(resumed, 2, tmp_path):
        assert found == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0: give a number of at least 0"),
        ({"damping": 0.0}, "damping=0.0: give a positive number"),
        ({"clip": 0.0}, "clip=0.0: give a positive number"),
        ({"momentum": 1.0}, "momentum=1.0: give a number from 0 to below 1"),
        ({"inverse_every": 0}, "inverse_every=0: give a number of steps"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        KFAC(nn.Linear(2, 2), **options)


def test_what_brings_no_factors_is_refused():
    model, (x, y) = seeded(Pooled).train(), classification(7, 6, 4)
    optimizer = KFAC(model)
    F.cross_entropy(model.eval()(x), y).backward()
    with pytest.raises(RuntimeError, match="no layer has factors: pass the batch through the model, in training mode"):
        optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="'last' is used outside of the model that K-FAC was made of"):
        model.train().last(x[:, 0].repeat(1, 2)[:, :5])
    optimizer.remove_hooks()
    model.last(x[:, 0].repeat(1, 2)[:, :5])


def laid_out():
    with pytest.raises(ValueError, match="--optimizer kfac needs whole layers on each rank: leave out --mesh and --plan"):
        trainer(mesh="model=2")
    model = parallelize_module(nn.Sequential(nn.Linear(4, 4)), init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()})
    with pytest.raises(ValueError, match="'0' has its weight in parts, and K-FAC needs whole layers"):
        KFAC(model)
    return True


def test_divided_layers_are_refused():
    assert run_on_ranks(laid_out, 2) == [True, True]
