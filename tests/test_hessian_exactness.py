"""A trace is called exact only where it is: networks and losses made to fool the certificate."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hessian
from hessian.structure import certify
from tests.cases import ConvNet, SmoothNet, classification, seeded
from tests.oracles import assert_unchanged, snapshot, true_traces


class Shared(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.one(x)
        match self.how:
            case "twice in a row":
                hidden = self.one(F.relu(hidden))
            case "twice in parallel":
                hidden = F.relu(hidden) + self.one(-x)
            case "squared":
                hidden = hidden * hidden
            case "gated":
                hidden = hidden * torch.sigmoid(x)
            case "self-gated":
                hidden = hidden * torch.sigmoid(hidden)
            case "divided by":
                hidden = 1 / (3 + hidden.abs())
            case "batch mean taken off":
                hidden = hidden - hidden.mean(0)
            case "rolled over the batch":
                hidden = F.relu(hidden).roll(1, 0)
            case "detached":
                hidden = hidden.detach()
        return self.two(hidden)


@pytest.mark.parametrize(
    ("how", "exact"),
    [
        ("once", True),
        ("twice in a row", False),
        ("twice in parallel", False),
        ("squared", False),
        ("gated", True),
        ("self-gated", False),
        ("divided by", False),
        ("detached", True),
    ],
)
def test_exactness_is_claimed_only_where_it_holds(how, exact):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Shared(how).double()
    data, loss = classification(6, 4), nn.CrossEntropyLoss()
    generator = torch.Generator().manual_seed(0)
    report = hessian.layer_report(model, loss, data, generator=generator, max_probes=16)
    assert report["one.weight"].exact is exact
    expected = true_traces(model, loss, data, report)
    for name, row in report.items():
        if row.exact:
            assert row.trace == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("how", ["batch mean taken off", "rolled over the batch"])
def test_examples_that_depend_on_each_other_are_noticed(how):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Shared(how).double()
    with pytest.raises(ValueError, match="do not belong to one example each"):
        hessian.layer_report(model, nn.CrossEntropyLoss(), classification(6, 4), "one.weight", method="exact")


class Mixing(Shared):
    """Examples that see each other in one direction only, or in a layout with examples second."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "sequence first":
            tokens = torch.stack([x, 2 * x, x - 1, x.abs(), x + 1, -x, 0 * x, x + 2], 1)
            return self.two(F.relu(self.one(tokens.permute(1, 0, 2)))[0])
        hidden = F.relu(self.one(x))
        match self.how:
            case "sees the one before":
                hidden = hidden + torch.cat([torch.zeros_like(hidden[:1]), hidden[:-1]])
            case "all see the first":
                hidden = hidden + hidden[:1]
            case "all see the last":
                hidden = hidden + hidden[-1:]
            case "the first sees all":
                hidden = torch.cat([hidden.sum(0, keepdim=True), hidden[1:]])
            case "pairs":
                hidden = hidden.view(-1, 2, 4).flip(1).reshape(-1, 4) + hidden
        return self.two(hidden)


@pytest.mark.parametrize("count", [2, 4, 6, 8])
@pytest.mark.parametrize(
    "how", ["sees the one before", "all see the first", "all see the last", "the first sees all", "pairs", "sequence first"]
)
def test_examples_that_see_each_other_one_way_are_noticed(how, count):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Mixing(how).double()
    data, loss = classification(count, 4), nn.CrossEntropyLoss()
    generator = torch.Generator().manual_seed(0)
    report = hessian.layer_report(model, loss, data, generator=generator, max_probes=8)
    expected = true_traces(model, loss, data, report)
    assert not report["one.weight"].exact
    assert report["two.weight"].exact
    assert report["two.weight"].trace == pytest.approx(expected["two.weight"], rel=1e-9)


class _Tanh(torch.autograd.Function):
    """Curved, and named like a product of torch's own."""

    @staticmethod
    def forward(context, x):
        context.save_for_backward(x)
        context.variable = x
        return x.tanh()

    @staticmethod
    def backward(context, gradient):
        (x,) = context.saved_tensors
        return gradient * (1 - x.tanh() ** 2)


Linear = type("Linear", (_Tanh,), {})


@pytest.mark.parametrize("hide", ["function", "complex"])
def test_what_python_hides_is_not_certified(hide):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            match hide:
                case "function":
                    hidden = Linear.apply(self.one(x))
                case _:
                    hidden = self.one(x)
                    hidden = (hidden + 1j * hidden.flip(1)).abs()
            return self.two(hidden)

    with pytest.raises(ValueError, match=r"'one\.weight' is not exact"):
        hessian.layer_report(Net().double(), nn.CrossEntropyLoss(), classification(5, 4), "one.weight", method="exact")


def test_a_loss_that_reaches_parameters_by_itself_is_noticed():
    model, data = seeded(SmoothNet), classification(5, 4)

    def decayed(outputs, targets):
        return F.cross_entropy(outputs, targets) + model.last.weight.square().sum()

    report = hessian.layer_report(model, decayed, data, "last.*", max_probes=2048, rtol=0.02)
    assert report["last.bias"].exact
    assert not report["last.weight"].exact
    assert report["last.weight"].reason == "the loss depends on it directly"
    expected = true_traces(model, decayed, data, report)
    assert abs(report["last.weight"].trace - expected["last.weight"]) <= 4 * report["last.weight"].trace_stderr


class Decayed(nn.Module):
    """A loss module that holds the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.held = [threading.Lock()]

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs, targets) + sum(p.square().sum() for p in self.model.parameters())


def test_a_loss_module_that_holds_the_model_is_noticed():
    model, data = ConvNet().double().eval(), classification(4, 1, 8, 8)
    with pytest.raises(ValueError, match="the loss depends on it directly"):
        hessian.layer_report(model, Decayed(model), data, method="exact")


class OwnRandomness(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 3)
        self.generator = torch.Generator()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x * (torch.rand(x.shape, generator=self.generator) > 0.5))


def test_randomness_of_a_networks_own_is_noticed():
    with pytest.raises(ValueError, match="draws random numbers"):
        hessian.layer_report(OwnRandomness().double(), nn.CrossEntropyLoss(), classification(6, 4), method="exact")


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to_sparse() @ self.weight


def test_sparse_products_are_refused():
    with pytest.raises(ValueError, match="per-example gradients are not read off"):
        hessian.layer_report(Sparse().double(), nn.CrossEntropyLoss(), classification(6, 4), method="exact")


def test_empty_batches_of_a_sum_add_nothing():
    model, (inputs, targets), loss = seeded(ConvNet), classification(4, 1, 8, 8), nn.CrossEntropyLoss(reduction="sum")
    whole = hessian.layer_report(model, loss, (inputs, targets), "fc.*")
    batches = [(inputs, targets), (inputs[:0], targets[:0])]
    assert dict(hessian.layer_report(model, loss, batches, "fc.*")) == dict(whole)


def test_random_forwards_are_noticed_and_repeated_alike():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    data, loss = classification(6, 4), nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match="draws random numbers"):
        hessian.layer_report(model, loss, data, method="exact")
    state = torch.get_rng_state()
    operator = hessian.Hessian(model, loss, data)
    vector = torch.ones(operator.shape[0], dtype=torch.float64)
    assert torch.equal(operator @ vector, operator @ vector)
    assert torch.equal(torch.get_rng_state(), state)


def test_train_mode_statistics_come_back():
    model, data = seeded(ConvNet).train(), classification(6, 1, 8, 8)
    before = snapshot(model)
    generator = torch.Generator().manual_seed(0)
    hessian.layer_report(model, nn.CrossEntropyLoss(), data, max_probes=4, generator=generator)
    assert_unchanged(model, before)


def test_under_inference_mode():
    model, data, loss = seeded(ConvNet), classification(4, 1, 8, 8), nn.CrossEntropyLoss()
    expected = hessian.layer_report(model, loss, data)
    with torch.no_grad():
        assert dict(hessian.layer_report(model, loss, data)) == dict(expected)
    with torch.inference_mode():
        assert dict(hessian.layer_report(model, loss, data)) == dict(expected)


class Biases(nn.Module):
    """Additions to a matrix product that are no plain bias, a transposed kernel, a wide transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.randn(1, 3))
        self.all = nn.Parameter(torch.randn(6, 3))
        self.one = nn.Parameter(torch.randn(1))
        self.matrix = nn.Parameter(torch.randn(8, 3))
        self.kernel = nn.Parameter(torch.randn(2, 1, 1, 3))
        self.up = nn.ConvTranspose2d(2, 2, 3, dilation=2, output_padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(F.conv2d(x, self.kernel.transpose(2, 3)))
        x = F.relu(self.up(x)).flatten(1)[:, :8]
        return sum(torch.addmm(bias, x, self.matrix) for bias in (self.row, self.all, self.one))


def test_unusual_uses_are_right_or_sampled():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Biases().double()
    data, loss = classification(6, 1, 5, 5), nn.CrossEntropyLoss()
    report = hessian.layer_report(model, loss, data, max_probes=8, generator=torch.Generator().manual_seed(0))
    expected = true_traces(model, loss, data, report)
    assert report["up.weight"].exact
    for name, row in report.items():
        if row.exact:
            assert row.trace == pytest.approx(expected[name], rel=1e-9), name


def test_outputs_without_a_class_dimension():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1), nn.Flatten(0)).double()
    inputs, targets = classification(6, 4)
    data, loss = (inputs, targets.double()), nn.MSELoss()
    report = hessian.layer_report(model, loss, data, method="exact")
    for name, value in true_traces(model, loss, data, report).items():
        assert report[name].trace == pytest.approx(value, rel=1e-9)


def test_bad_sampling_arguments():
    arguments = seeded(SmoothNet), nn.CrossEntropyLoss(), classification(3, 4)
    for options in ({"max_probes": 0}, {"max_probes": 1}, {"rtol": -1.0}, {"rtol": float("nan")}):
        with pytest.raises(ValueError, match="give at least 2 probes and a tolerance of at least 0"):
            hessian.layer_report(*arguments, **options)


def test_a_loss_that_couples_examples_is_noticed():
    def contrastive(outputs, targets):
        return F.cross_entropy(outputs @ outputs.T, torch.arange(len(targets)))

    with pytest.raises(ValueError, match="depends on other examples' outputs"):
        hessian.layer_report(Shared("once").double(), contrastive, classification(6, 4), method="exact")


def test_train_mode_batch_norm_is_not_exact():
    model, data = seeded(ConvNet).train(), classification(6, 1, 8, 8)
    with pytest.raises(ValueError, match=r"'stem\.weight' is not exact: NativeBatchNorm is not linear in it"):
        hessian.layer_report(model, nn.CrossEntropyLoss(), data, method="exact")


def test_certificates_name_the_reason():
    model = seeded(SmoothNet)
    certificates = certify(model(classification(3, 4)[0]), dict(model.named_parameters()))
    assert certificates["last.weight"].use is not None
    assert certificates["last.weight"].use.operation == "Addmm"
    assert certificates["last.weight"].reason == ""
    assert certificates["first.weight"].use is not None  # its one use is known, but the outputs are curved in it
    assert "LayerNorm" in certificates["first.weight"].reason
