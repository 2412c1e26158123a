"""Where the cotangents of Kronecker-factored matrices come from, what they leave alone, and what they refuse."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hessian
from hessian.operators.kfac import EKFAC, KFAC, MAX_VECTOR
from tests.cases import Attention, SmoothNet, classification, seeded
from tests.networks import Shared
from tests.oracles import assert_unchanged, dense_gauss_newton, snapshot
from tests.test_hessian_kfac import CLASSES, Piecewise, case, close

LOSSES = {
    "weighted": nn.CrossEntropyLoss(torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64), ignore_index=2, label_smoothing=0.1),
    "classes": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "squares": nn.MSELoss(),
}


def for_loss(loss: str, data: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return (data[0], F.one_hot(data[1], 3).double()) if loss == "squares" else data


@pytest.mark.parametrize("kind", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("factored", [KFAC, EKFAC])
def test_any_split_into_batches_gives_the_same_matrix(factored, loss, kind):
    model = seeded(Piecewise)
    inputs, targets = for_loss(loss, classification(9, 4))
    order = [4, 8, 0, 1, 2, 3, 5, 6, 7] if loss == "squares" else torch.argsort(targets, stable=True).tolist()
    inputs, targets = inputs[order], targets[order]
    first = 4 if loss == "squares" else int((targets < 2).sum())  # the rest has the class that `weighted` ignores
    whole, split = (
        factored(model, LOSSES[loss], data, kind=kind, generator=torch.Generator().manual_seed(3)).to_dense()
        for data in (
            (inputs, targets),
            list(zip(inputs.split([2, first - 2, 9 - first]), targets.split([2, first - 2, 9 - first]), strict=True)),
        )
    )
    assert close(split, whole)
    assert whole.norm() > 0


@pytest.mark.parametrize("network", ["convolutions", "positions"])
def test_vectors_have_their_exact_blocks(network):
    model, data = case(network)
    operators = {
        "exact": dense_gauss_newton(model, CLASSES, data, [name for name, _ in model.named_parameters()]),
        "empirical": hessian.Fisher(model, CLASSES, data).to_dense(),
    }
    for kind, truth in operators.items():
        operator = KFAC(model, CLASSES, data, kind=kind)
        start = 0
        for name, parameter in model.named_parameters():
            here = slice(start, start + parameter.numel())
            start = here.stop
            if parameter.dim() == 1:
                assert close(operator.block(name).to_dense(), truth[here, here]), name


class Labels(nn.Module):
    """A class for each of several positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def labels(loss: str) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(6, 2, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 3, (6, 4), generator=generator)
    return seeded(Labels), (inputs, F.one_hot(targets, 3).movedim(2, 1).double() if loss == "squares" else targets)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_target_at_every_position(loss):
    model, data = labels(loss)
    found = KFAC(model, LOSSES[loss], data, "conv.bias").to_dense()
    assert close(found, dense_gauss_newton(model, LOSSES[loss], data, ["conv.bias"]), 1e-9)
    found = KFAC(model, LOSSES[loss], data, "conv.bias", kind="empirical").to_dense()
    assert close(found, hessian.Fisher(model, LOSSES[loss], data, "conv.bias").to_dense())


@pytest.mark.parametrize("loss", LOSSES)
def test_sampled_blocks_are_unbiased(loss):
    model, data = labels(loss)
    truth = dense_gauss_newton(model, LOSSES[loss], data, ["conv.bias"])
    generator = torch.Generator().manual_seed(0)
    samples = torch.stack(
        [KFAC(model, LOSSES[loss], data, "conv.bias", kind="sampled", generator=generator).to_dense() for _ in range(200)]
    )
    errors = samples.std(0) / len(samples) ** 0.5
    assert bool((errors > 0).all())
    assert bool(((samples.mean(0) - truth).abs() <= 4 * errors + 1e-12).all())
    assert float(errors.norm() / truth.norm()) < 0.2


def test_both_passes_draw_the_same():
    """For one example with one position, the Kronecker product of what was drawn is exact."""
    model, data = nn.Linear(4, 3, bias=False).double(), classification(1, 4)
    plain, corrected = (
        torch.stack(
            [
                kind(model, CLASSES, data, kind="sampled", generator=torch.Generator().manual_seed(s)).to_dense()
                for s in range(8)
            ]
        )
        for kind in (KFAC, EKFAC)
    )
    assert close(corrected, plain)
    assert not close(plain, plain[:1])


def test_sampling_follows_the_generator_alone():
    model, data = case("positions")

    def sampled(seed: int) -> torch.Tensor:
        return EKFAC(model, CLASSES, data, kind="sampled", generator=torch.Generator().manual_seed(seed)).eigenvalues

    state = torch.get_rng_state()
    assert torch.equal(sampled(0), sampled(0))
    assert not torch.equal(sampled(0), sampled(1))
    assert torch.equal(torch.get_rng_state(), state)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first, second = (KFAC(model, CLASSES, data, kind="sampled").eigenvalues for _ in range(2))
        assert not torch.equal(first, second)
        torch.manual_seed(5)
        assert torch.equal(KFAC(model, CLASSES, data, kind="sampled").eigenvalues, first)


def test_single_precision_comes_close():
    model, data = case("convolutions")
    expected = EKFAC(model, CLASSES, data)
    found = EKFAC(model.float(), CLASSES, (data[0].float(), data[1]))
    assert found.dtype == torch.float32
    assert close(found.to_dense().double(), expected.to_dense(), 1e-4)
    vector = torch.ones(found.shape[0])
    assert close(found.inverse(1e-2) @ (found @ vector + 1e-2 * vector), vector, 1e-3)


def test_the_model_is_left_alone():
    model, data = case("convolutions")
    CLASSES(model(data[0]), data[1]).backward()
    model.stem.weight.requires_grad_(False)
    before, state = snapshot(model), torch.get_rng_state()
    EKFAC(model, CLASSES, data)
    found = KFAC(model, CLASSES, data, "stem.weight").to_dense()
    with torch.no_grad():
        assert torch.equal(KFAC(model, CLASSES, data, "stem.weight").to_dense(), found)
    with pytest.raises(ValueError, match="per-example gradients cannot be read"):
        EKFAC(model.train(), CLASSES, data)
    model.eval()
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    model.requires_grad_(True)
    assert torch.equal(KFAC(model, CLASSES, data).block("stem.weight").to_dense(), found)


def test_what_the_outputs_do_not_depend_on_has_zeros():
    model, data = case("products")
    model.unused = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    operator = EKFAC(model, CLASSES, data)
    assert torch.equal(operator.block("unused").to_dense(), torch.zeros(6, 6, dtype=torch.float64))
    assert torch.equal(operator.block("unused").inverse(0.5).to_dense(), 2 * torch.eye(6, dtype=torch.float64))
    linear = KFAC(model, lambda outputs, _: outputs.mean(), data)
    assert linear.exact_trace() == 0


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.table(x.abs().long()).mean(1))


@pytest.mark.parametrize(
    ("build", "shape", "message"),
    [
        (SmoothNet, (3, 4), r"'norm.weight', 'norm.bias' \(they are not read off NativeLayerNorm\).*params=\['first.weight', "),
        (Embedded, (3, 4), r"'table.weight' \(.*Embedding.*params=\['fc.weight', 'fc.bias'\]"),
        (
            Shared,
            (3, 3, 4, 4),
            r"'twice.weight' \(.* no one operation .*'twice.bias' \(.* it enters 2 operations\).*: params=\['stem.weight', ",
        ),
        (
            Attention,
            (3, 4, 3),
            r"'attention.in_proj_bias' \(.* read off Add\); .*'attention.in_proj_weight'.* not belong to one ",
        ),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train(), (4, 4), r"training mode .* call model.eval\(\)"),
        (
            lambda: nn.Sequential(nn.Linear(4, MAX_VECTOR + 1), nn.Linear(MAX_VECTOR + 1, 3)),
            (2, 4),
            r"block of '0.bias' would have 2,049 rows.*leave it out with params=",
        ),
    ],
)
def test_parameters_that_cannot_be_read_are_named(build, shape, message):
    model = build().double()
    with pytest.raises(ValueError, match=message):
        KFAC(model, CLASSES, classification(*shape))


def test_losses_and_arguments_that_make_no_such_matrix():
    model, data = case("products")

    def contrastive(outputs, _):
        return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))

    def decayed(outputs, targets):
        return F.cross_entropy(outputs, targets) + model.last.square().sum()

    with pytest.raises(ValueError, match="depends on other examples' outputs"):
        KFAC(model, contrastive, data)
    with pytest.raises(ValueError, match=r"'last' \(the loss depends on it directly\)"):
        KFAC(model, decayed, data)
    with pytest.raises(ValueError, match="not convex in the outputs"):
        KFAC(model, lambda outputs, _: outputs.cos().mean(), data)
    with pytest.raises(ValueError, match="kind 'true' is none of 'exact', 'sampled', 'empirical'"):
        KFAC(model, CLASSES, data, kind="true")
    wide = nn.Linear(4, 1025).double()
    with pytest.raises(
        ValueError, match=r"there are 1025 outputs an example, more than 1024: .*kind='sampled' has no such limit"
    ):
        KFAC(wide, CLASSES, classification(2, 4), "weight")
    assert KFAC(wide, CLASSES, classification(2, 4), "weight", kind="sampled").exact_trace() > 0


class Noisy(nn.Module):
    """Draws from a generator of its own, which nobody resets between two passes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x * (torch.rand(x.shape, generator=self.generator) > 0.5))


def test_two_passes_see_the_same_data():
    inputs, targets = classification(12, 4)
    with pytest.raises(ValueError, match="two passes over the data see different outputs"):
        EKFAC(Noisy().double(), CLASSES, (inputs, targets))
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=5, shuffle=True)
    EKFAC(model, CLASSES, loader)  # the global generator's draws are the same in both passes
    shuffled, ordered = (EKFAC(model.eval(), CLASSES, data).to_dense() for data in (loader, (inputs, targets)))
    assert close(shuffled, ordered)
