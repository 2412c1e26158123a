"""Networks whose layers are laid out over a grid of ranks, against one process, in float64."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

import hessian
from parallel import curvature, halo
from parallel.communication import AlphaBeta, Collective
from parallel.laid_out_replica import LaidOutReplica
from parallel.layer_cost import Grid
from parallel.layer_shape import describe
from parallel.layouts.network import LaidOut
from parallel.planner import assignment
from tests.ranks import run_on_ranks


class Net(nn.Module):
    """Stride, dilation, an uneven size, batch norm in training mode, a residual sum, concatenation, resizing, a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.wide = nn.Conv2d(4, 4, (5, 3), padding=(4, 1), dilation=(2, 1))
        self.mix = nn.Conv2d(8, 5, 1, bias=False)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.average = nn.AvgPool2d(2, 1)
        self.head = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))

    def forward(self, x):
        x = F.gelu(self.norm(self.stem(x)))
        x = x + 0.5 * torch.tanh(self.wide(x))
        x = self.mix(torch.cat([x, x.square()], dim=1))
        x = self.average(self.pool(self.up(x)))
        return self.head(x.mean((2, 3)).view(x.size(0), -1))


class Pair(nn.Module):
    """A layer of two inputs with weights of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x, y):
        return x + self.weight * y


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.second(self.first(x).transpose(0, 1)).mean(0)


def refusal():
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("batch", "shared"))
    network = LaidOut(SequenceFirst().double(), {"second": "model"}, mesh)
    with pytest.raises(ValueError, match=r"does not have its \d examples first"):
        network(torch.randn(9, 7, 6, dtype=torch.float64))
    return True


def test_examples_that_move_are_refused():
    assert run_on_ranks(refusal, 2) == [True, True]


class Block(nn.Module):
    """A transformer block: layer norms, attention by its formula, a wide layer."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.LayerNorm(6), nn.LayerNorm(6)
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        self.scale = nn.Parameter(torch.tensor([1.3]))
        self.pair, self.head = Pair(), nn.Linear(6, 3)

    def forward(self, x):
        q, k, v = self.qkv(self.before(x)).chunk(3, dim=-1)
        x = x + self.out(torch.softmax(q @ k.mT / 6**0.5, dim=-1) @ v)
        x = x * self.scale + self.down(F.gelu(self.up(self.after(x))))
        return self.head(self.pair(x, x.square()).mean(1))


CONVOLUTIONAL = ("stem", "norm", "wide", "mix", "up", "pool", "average")
CASES = {
    "batch": (Net, {}),
    "domain": (Net, dict.fromkeys(CONVOLUTIONAL, "domain")),
    "model": (Net, dict.fromkeys((*CONVOLUTIONAL, "head.0", "head.2"), "model")),
    "domain, then model": (Net, dict.fromkeys(("stem", "norm"), "domain") | dict.fromkeys(("wide", "mix", "head.0"), "model")),
    "model, then domain": (Net, {"stem": "model", "norm": "model", "wide": "domain", "mix": "model", "pool": "domain"}),
    "attention by model": (Block, dict.fromkeys(("before", "qkv", "out", "after", "up", "down"), "model")),
    "attention by batch": (Block, {"up": "model"}),
}


CURVED = ("model, then domain", "attention by model")  # of which curvature is computed


def problem(kind):
    torch.manual_seed(0)
    model = kind().double().train()
    x = torch.randn(9, 2, 13, 7, dtype=torch.float64) if kind is Net else torch.randn(9, 4, 6, dtype=torch.float64)
    return model, x, torch.tensor([0, 1, 2, 1, 0, 2, 2, 1, 0])


def derivatives(loss, parameters):
    """The loss's gradient and a product with its Hessian, by name; `parameters` may be DTensors."""
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    directions = []
    for name, parameter in parameters.items():
        whole = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(name)))
        is_whole = not hasattr(parameter, "placements")
        directions.append(whole if is_whole else distribute(whole, parameter))
    products = torch.autograd.grad(gradients, list(parameters.values()), directions)
    return [dict(zip(parameters, parts, strict=True)) for parts in (gradients, products)]


def distribute(whole, parameter):
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def laid_out(name, shared, tiles=None):
    """Loss, gradients, products and running moments, summed over the ranks that they are parts on."""
    kind, layouts = CASES[name]
    model, x, targets = problem(kind)
    mesh = init_device_mesh("cpu", (distributed.get_world_size() // shared, shared), mesh_dim_names=("batch", "shared"))
    network = LaidOut(model, layouts, mesh, tiles=tiles)
    groups, group = mesh.size(0), mesh.get_local_rank("batch")
    first, last = 9 * group // groups, 9 * (group + 1) // groups
    start, stop = network.own_examples(last - first)
    outputs = network(x[first:last])
    loss = F.cross_entropy(outputs, targets[first:last][start:stop], reduction="sum") / 9
    parameters = dict(network.model.named_parameters())
    found = {}
    for what, parts in zip(("gradient", "product"), derivatives(loss, parameters), strict=True):
        for own, part in parts.items():
            local = (part.to_local() if hasattr(part, "to_local") else part).detach().clone()
            distributed.all_reduce(local, group=network.gradient_group(own))
            if hasattr(part, "to_local"):
                from torch.distributed.tensor import DTensor

                whole = DTensor.from_local(local, part.device_mesh, part.placements, shape=part.shape, stride=part.stride())
                local = whole.full_tensor()
            found[f"{what} of {own}"] = local
    total = loss.detach().clone()
    distributed.all_reduce(total)
    buffers = {own: buffer.clone() for own, buffer in network.model.named_buffers()}
    return found | {"loss": total} | buffers


def curvatures(shared):
    """Of laid-out networks: dense matrices, gradients, an eigenpair and a trace, from the data of each group."""
    found = {}
    for name in CURVED:
        kind, layouts = CASES[name]
        model, x, targets = problem(kind)
        mesh = init_device_mesh("cpu", (distributed.get_world_size() // shared, shared), mesh_dim_names=("batch", "shared"))
        network = LaidOut(model.eval(), layouts, mesh)
        groups, group = mesh.size(0), mesh.get_local_rank("batch")
        own = slice(9 * group // groups, 9 * (group + 1) // groups)
        torch.manual_seed(distributed.get_rank())
        for make in (curvature.hessian, curvature.gauss_newton):
            operator = make(network, nn.CrossEntropyLoss(), (x[own], targets[own]), ["*weight"])
            found[f"{name}, {make.__name__}"] = estimates(operator)
    return found


def estimates(operator):
    generator = torch.Generator().manual_seed(3)
    top = hessian.top_eigenpairs(operator, 1, tol=1e-8, generator=generator)
    vector = top.full_vectors()[:, 0]
    trace = hessian.trace(operator, method="hutchinson", max_matvecs=32, generator=generator)
    space = operator.space
    basis = torch.eye(operator.shape[0], 12, dtype=torch.float64).T
    return [
        space.whole(operator.rows(space.part(basis))),
        space.whole(operator.gradient()[None])[0],
        top.values,
        torch.outer(vector, vector),
        torch.tensor(trace.value, dtype=torch.float64),
    ]


def test_curvature_of_laid_out_networks():
    expected = {}
    for name in CURVED:
        model, x, targets = problem(CASES[name][0])
        for make in (hessian.Hessian, hessian.GaussNewton):
            label = "hessian" if make is hessian.Hessian else "gauss_newton"
            expected[f"{name}, {label}"] = estimates(make(model.eval(), nn.CrossEntropyLoss(), (x, targets), ["*weight"]))
    for rank in run_on_ranks(curvatures, 4, 2):
        for name, found in rank.items():
            for one, other in zip(found, expected[name], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


class Chain(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(2, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 4, 5, padding=2),
            nn.Tanh(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * 4 * 3, 10),
            nn.ReLU(),
            nn.Linear(10, 4),
        )


WIRES = [  # layouts of the chain's five layers
    ("batch",) * 5,
    ("model",) * 5,
    ("domain", "domain", "domain", "batch", "batch"),
    ("domain", "domain", "domain", "model", "model"),
    ("model", "domain", "domain", "batch", "model"),
    ("batch", "domain", "model", "model", "batch"),
]


def wires(shared):
    """Bytes of every message of a step, (kind, bytes) in float32, as sent by this rank, for each assignment; and as planned."""
    found = []
    ranks = distributed.get_world_size()
    grid = Grid(shared, ranks // shared)
    mesh = init_device_mesh("cpu", (grid.batch, shared), mesh_dim_names=("batch", "shared"))
    x, targets = torch.randn(8 // grid.batch, 2, 8, 6), torch.arange(8 // grid.batch) % 4
    layers = describe(Chain(), x[:1])
    all_reduce, send = distributed.all_reduce, halo._send_and_receive
    for layouts in WIRES:
        sent = []

        def counting_reduce(tensor, *args, sent=sent, group=None, **options):
            size = distributed.get_world_size(group)
            sent.append(("all-reduce", 2 * tensor.nbytes * (size - 1) / size))
            return all_reduce(tensor, *args, group=group, **options)

        def counting_send(messages, received, group, sent=sent):
            sent.append(("exchange", float(sum(tensor.nbytes for tensor in messages.values()))))
            return send(messages, received, group)

        replica = LaidOutReplica(Chain(), dict(zip((layer.name for layer in layers), layouts, strict=True)), mesh)
        distributed.all_reduce, halo._send_and_receive = counting_reduce, counting_send
        try:
            start, stop = replica.own_examples(len(x))
            F.cross_entropy(replica(x), targets[start:stop]).backward()
            replica.finish_gradients()
        finally:
            distributed.all_reduce, halo._send_and_receive = all_reduce, send
        plan = assignment(layers, layouts, grid, 8, AlphaBeta(0.0, 1.0))
        planned = [one for row in plan.layers for one in row.collectives]
        if layouts[-1] == "model":  # the loss is of each rank's own examples; what that takes belongs to no layer
            planned.append(Collective("all-gather", "gradients of the outputs", shared, 4 * len(x) * layers[-1].outputs))
        kinds = [("all-reduce" if one.kind == "all-reduce" else "exchange", one.sent) for one in planned]
        found.append([sorted(message for message in messages if message[1]) for messages in (sent, kinds)])
    return found


@pytest.mark.parametrize(("ranks", "shared"), [(2, 2), (4, 2)])
def test_the_planner_knows_every_byte_on_the_wire(ranks, shared):
    for rank in run_on_ranks(wires, ranks, shared):
        for layouts, (sent, planned) in zip(WIRES, rank, strict=True):
            assert sent == planned, layouts


class Tall(nn.Sequential):
    """Windows that move row by row, whose borders are those of the paper."""

    def __init__(self):
        super().__init__(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 5, padding=2), nn.Conv2d(3, 2, 1), nn.Flatten(2))

    def forward(self, x):
        return super().forward(x).mean(2)


def halos():
    """Bytes of halos that this rank sends in a step, and as planned."""
    ranks = distributed.get_world_size()
    x, send, sent = torch.randn(4, 2, 12, 5), halo._send_and_receive, []
    layers = describe(Tall(), x[:1])
    mesh = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("batch", "shared"))
    replica = LaidOutReplica(Tall(), dict.fromkeys((layer.name for layer in layers), "domain"), mesh)

    def counting_send(messages, received, group):
        sent.append(float(sum(tensor.nbytes for tensor in messages.values())))
        return send(messages, received, group)

    outputs = []
    hook = replica.model[2].register_forward_hook(lambda *seen: outputs.append(seen[2].part))
    halo._send_and_receive = counting_send
    try:
        replica(x)
        outputs[0].square().sum().backward()
    finally:
        halo._send_and_receive = send
        hook.remove()
    relaid = float(outputs[0].numel() * 4 * (ranks - 1) / ranks)  # the tiles on their way to the ranks that own their examples
    plan = assignment(layers, ("domain",) * 3, Grid(ranks, 1), 4, AlphaBeta(0.0, 1.0))
    planned = sum(one.sent for row in plan.layers for one in row.collectives if one.kind == "halo")
    return sum(sent) - relaid, planned


def test_inner_ranks_send_two_borders():
    found = run_on_ranks(halos, 4)
    assert max(sent for sent, _ in found) == found[0][1]
    assert found[0][0] == found[3][0] == found[0][1] / 2


def all_cases(shared):
    """As `CASES` says, and with images divided otherwise than by rows."""
    found = {(name, None): laid_out(name, shared) for name in CASES}
    found["domain", (1, shared)] = laid_out("domain", shared, (1, shared))
    if distributed.get_world_size() == 4:
        found["domain", (2, 2)] = laid_out("domain", 4, (2, 2))
    return found


@pytest.fixture(scope="module")
def expected():
    found = {}
    for name, (kind, _) in CASES.items():
        model, x, targets = problem(kind)
        loss = F.cross_entropy(model(x), targets)
        gradients, products = derivatives(loss, dict(model.named_parameters()))
        found[name] = (
            {f"gradient of {own}": part.detach() for own, part in gradients.items()}
            | {f"product of {own}": part for own, part in products.items()}
            | {"loss": loss.detach()}
            | dict(model.named_buffers())
        )
    return found


@pytest.mark.parametrize(("ranks", "shared"), [pytest.param(2, 2, marks=pytest.mark.nightly), (4, 2)])
def test_layouts_are_exact(expected, ranks, shared):
    """Value, gradient, Hessian-vector product and batch norm's moments, on 1 x 2 and 2 x 2 ranks."""
    for rank in run_on_ranks(all_cases, ranks, shared):
        for (name, tiles), found in rank.items():
            assert found.keys() == expected[name].keys()
            for what, tensor in found.items():
                at = f"{name} {tiles}: {what}"
                torch.testing.assert_close(
                    tensor, expected[name][what], rtol=1e-10, atol=1e-10, msg=lambda text, at=at: f"{at}: {text}"
                )
