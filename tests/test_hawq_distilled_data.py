"""Data out of batch-norm statistics: against closed forms, module hooks, and real data on the digits tasks."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hawq
from hawq.distilled_data import batch_norm_distances, distilled_batches, distilled_data
from hawq.pseudo_targets import pseudo_targets
from tests import networks


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class FunctionalNorm(nn.Module):
    """A batch norm that no module performs, its statistics in buffers under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 4, 2)
        self.register_buffer("center", torch.zeros(4))
        self.register_buffer("spread", torch.ones(4))

    def read(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(self.read(x), self.center, self.spread).sum((2, 3, 4))


def trained_statistics(model: nn.Module, inputs: torch.Tensor) -> nn.Module:
    """The model in evaluation mode with the batch norms' statistics of `inputs`."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        model.train()(inputs)
    return model.eval()


def hooked_distances(model: nn.Module, inputs: torch.Tensor) -> dict[str, float]:
    """The mean squared Wasserstein distance of each batch-norm module, in units of its output, from forward hooks."""
    found = {}

    def hook(module, arguments, _, *, name):
        x = arguments[0].double().transpose(0, 1).flatten(1)
        unit = (module.running_var.double() + module.eps).sqrt()
        shift = (x.mean(1) - module.running_mean.double()) / unit
        found[name] = float((shift**2 + ((x.var(1) + module.eps).sqrt() / unit - 1) ** 2).mean())

    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    handles = [module.register_forward_hook(partial(hook, name=name)) for name, module in norms.items()]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return found


def test_a_linear_layer_and_a_batch_norm_have_the_optimum_of_a_closed_form():
    """Statistics that Gaussian inputs of mean mu and covariance S would have, W mu + b and diag(W S W'), are all reached."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).eval()
    mixing, mean = torch.randn(5, 5), torch.randn(5)
    covariance = mixing @ mixing.T
    std, linear = covariance.diagonal().sqrt(), model[0]
    with torch.no_grad():
        model[1].running_mean.copy_(linear(mean))
        model[1].running_var.copy_((linear.weight @ covariance @ linear.weight.T).diagonal())
    data = distilled_data(model, torch.zeros(1, 5), steps=200, input_mean=mean, input_std=std, generator=seeded())
    outputs = linear(data).detach()
    assert torch.allclose(outputs.mean(0), model[1].running_mean, atol=1e-3)
    assert torch.allclose(outputs.var(0), model[1].running_var, rtol=2e-3)
    assert torch.allclose(data.mean(0), mean, atol=1e-3)
    assert torch.allclose(data.std(0), std, rtol=2e-3)


def test_where_prior_and_norm_disagree_the_mean_is_halfway():
    """One channel, identity, eps 0: (m - 0)^2 + (m - mu)^2 and (s - 1)^2 + (s - sigma)^2 / sigma^2 are least at known m, s."""
    model = nn.BatchNorm1d(1, eps=0.0).eval()
    mu, sigma = 3.0, 2.0
    model.running_mean.fill_(mu)
    model.running_var.fill_(sigma**2)
    data = distilled_data(model, torch.zeros(1, 1), steps=300, generator=seeded())
    assert float(data.mean()) == pytest.approx((mu / sigma**2) / (1 + 1 / sigma**2), abs=1e-3)
    assert float(data.std()) == pytest.approx((1 + 1 / sigma) / (1 + 1 / sigma**2), abs=1e-3)


@pytest.mark.parametrize("name", ["audio, padded inside", "in place", "tokens"])
def test_distances_are_those_of_module_hooks_and_distillation_reduces_them(name):
    model, inputs = networks.build(name)
    model = trained_statistics(model, 1.5 * inputs + 0.5)
    noise = torch.randn(64, *inputs.shape[1:], generator=seeded(3))
    assert batch_norm_distances(model, noise) == pytest.approx(hooked_distances(model, noise), rel=1e-4)
    before = copy.deepcopy(model.state_dict())
    data = distilled_data(model, inputs[:1], input_mean=0.5, input_std=1.5, steps=60, generator=seeded())
    assert data.shape == noise.shape
    assert data.dtype == torch.float32
    assert not data.requires_grad
    reached, started = hooked_distances(model, data), hooked_distances(model, noise)
    assert sum(reached.values()) < 0.1 * sum(started.values())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@torch.no_grad()
def test_a_functional_batch_norm_in_three_dimensions():
    torch.manual_seed(0)
    model = FunctionalNorm().eval()
    real, noise = 3 * torch.randn(64, 2, 3, 3, 3) - 1, torch.randn(64, 2, 3, 3, 3)
    model.center, model.spread = torch.var_mean(model.read(real).transpose(0, 1).flatten(1), 1)[::-1]
    data = distilled_data(model, noise, input_mean=-1.0, input_std=3.0, steps=60, generator=seeded())

    def distance(x):
        read = model.read(x).transpose(0, 1).flatten(1)
        spread = ((read.var(1) + 1e-5) / (model.spread + 1e-5)).sqrt() - 1
        return float(((read.mean(1) - model.center).square() / (model.spread + 1e-5) + spread.square()).mean())

    assert batch_norm_distances(model, noise) == pytest.approx({"center": distance(noise)}, rel=1e-4)
    assert distance(data) < 0.01 * distance(noise)


def test_a_norm_that_runs_twice_is_compared_on_average():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3, momentum=None)

        def forward(self, x):
            return self.norm(self.norm(x + 4.0) * 3.0)

    inputs = torch.randn(64, 3, generator=seeded())
    model = trained_statistics(Twice(), inputs)
    with torch.no_grad():
        first = inputs + 4.0
        second = model.norm(first) * 3.0
        mean, variance = (first.mean(0) + second.mean(0)) / 2, (first.var(0) + second.var(0)) / 2
        unit = (model.norm.running_var + model.norm.eps).sqrt()
        spread = (variance + model.norm.eps).sqrt() / unit - 1
        expected = float((((mean - model.norm.running_mean) / unit) ** 2 + spread**2).mean())
    assert batch_norm_distances(model, inputs) == pytest.approx({"norm": expected}, rel=1e-4)


def test_units_inside_the_network_do_not_matter():
    """A convolution scaled by 100, its norm's statistics likewise: the same function, so the same data."""
    model, inputs = networks.build("in place")
    model = trained_statistics(model, inputs)
    model.b1.eps = 0.0
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled.c1.weight.mul_(128.0)
        scaled.b1.running_mean.mul_(128.0)
        scaled.b1.running_var.mul_(128.0**2)
    settings = {"steps": 10, "size": 8}
    one, other = (distilled_data(m, inputs, **settings, generator=seeded()) for m in (model, scaled))
    assert torch.allclose(one, other, atol=1e-3)


def test_a_generator_decides_the_data_and_batches_differ():
    model, inputs = networks.build("audio, padded inside")
    settings = {"size": 10, "batch_size": 5, "steps": 3}
    one, same, other = (distilled_data(model, inputs, **settings, generator=seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one[:5], one[5:])
    state = torch.get_rng_state()
    distilled_data(model, inputs, **settings, generator=seeded())
    assert torch.equal(state, torch.get_rng_state())
    distilled_data(model, inputs, **settings)
    assert not torch.equal(state, torch.get_rng_state())


def test_inputs_stay_in_their_range_and_gradients_do_not_have_to_be_on():
    model, inputs = networks.build("in place")
    with torch.inference_mode():
        data = distilled_data(model, inputs, steps=10, input_range=(-0.5, 0.75), generator=seeded())
    assert -0.5 <= float(data.min()) < float(data.max()) <= 0.75


def test_class_scores_make_the_network_sure_and_its_classes_frequent():
    model, inputs = networks.build("in place")
    results = {}
    for flag in (False, True):
        data = distilled_data(model, inputs, class_scores=flag, generator=seeded())
        p = model(data).softmax(1)
        results[flag] = float(-(p * p.log()).sum(1).mean()), float(-(p.mean(0) * p.mean(0).log()).sum())
    assert results[True][0] < results[False][0]
    assert results[True][1] > results[False][1]


@pytest.mark.parametrize(
    ("loss", "shape"), [(nn.CrossEntropyLoss(), (4, 3)), (F.cross_entropy, (4, 3, 2, 5)), (nn.NLLLoss(), (4, 3))]
)
def test_classes_are_drawn_from_the_softmax(loss, shape):
    logits = torch.randn(shape, generator=seeded())
    logits = logits.log_softmax(1) if isinstance(loss, nn.NLLLoss) else logits
    generator, draws = seeded(), 4000
    counts = sum(F.one_hot(pseudo_targets(loss, logits, generator=generator), 3) for _ in range(draws))
    p = logits.softmax(1).movedim(1, -1)
    score = (counts - draws * p) / (draws * p * (1 - p)).sqrt()
    assert float(score.abs().max()) < 4.5
    assert float(loss(logits, pseudo_targets(loss, logits))) > 0


def test_targets_of_other_losses():
    outputs = torch.linspace(-2, 2, 5).expand(4000, 5)
    for loss, p in ((nn.BCEWithLogitsLoss(), outputs.sigmoid()), (F.binary_cross_entropy, outputs.sigmoid())):
        given = outputs if isinstance(loss, nn.Module) else p
        drawn = pseudo_targets(loss, given, generator=seeded())
        assert set(drawn.unique().tolist()) == {0.0, 1.0}
        assert torch.allclose(drawn.mean(0), p[0], atol=4.5 * 0.5 / 4000**0.5)
    assert torch.equal(pseudo_targets(nn.MSELoss(), outputs), outputs)
    model, inputs = networks.build("in place")

    def own_loss(outputs, targets):
        return (outputs - targets).abs().mean()

    with pytest.raises(ValueError, match="'own_loss' takes are not known: pass targets="):
        distilled_batches(model, own_loss, inputs)
    batches = distilled_batches(model, own_loss, inputs, size=6, batch_size=3, steps=1, targets=lambda outputs: outputs + 1)
    assert [len(batch) for batch, _ in batches] == [3, 3]
    for batch, targets in batches:
        assert torch.allclose(targets, model(batch) + 1, atol=1e-5)


def test_what_cannot_be_distilled():
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    example = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"no batch norm of the model has stored statistics, .*give calibration data"):
        distilled_data(plain, example)
    unstored = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="track_running_stats=False"):
        distilled_data(unstored, example)
    with pytest.warns(UserWarning, match="1 batch norms normalise by the batch at hand"):
        distilled_data(nn.Sequential(unstored, nn.BatchNorm2d(4, momentum=None)), example, steps=1)
    with pytest.raises(ValueError, match=r"int64 cannot be distilled.*give calibration data"):
        distilled_data(nn.Embedding(9, 4), torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="not one tensor"):
        distilled_data(plain, {"input": example})
    model, inputs = networks.build("in place")
    for settings, message in (
        ({"size": 1}, "size=1"),
        ({"size": 3, "batch_size": 2}, "leaves an input alone"),
        ({"steps": 0}, "steps=0"),
        ({"input_std": 0.0}, "input_std=0.0"),
        ({"input_mean": torch.zeros(2)}, "2 values .* the input has 3 channels"),
        ({"input_range": (1.0, 1.0)}, "low < high"),
    ):
        with pytest.raises(ValueError, match=message):
            distilled_data(model, inputs, **settings)
    with pytest.raises(ValueError, match="not scores"):
        distilled_data(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 1)), example, class_scores=True)


@pytest.mark.parametrize(("buffer", "value"), [("running_mean", float("nan")), ("running_var", -1.0)])
def test_statistics_that_are_damaged_are_named(buffer, value):
    model, inputs = networks.build("in place")
    getattr(model.b1, buffer)[2] = value
    with pytest.raises(ValueError, match=f"stored {'mean' if value != -1.0 else 'variance'} of batch norm 'b1'"):
        distilled_data(model, inputs)


def test_weights_that_are_damaged_are_found_at_the_norm_after_them():
    model, inputs = networks.build("in place")
    with torch.no_grad():
        model.c1.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="what batch norm 'b1' reads is NaN or Inf"):
        distilled_data(model, inputs)


@pytest.mark.nightly
def test_quantization_without_data_is_within_a_point_of_real_data(resnet20):
    """Sensitivities, widths (average 4 bits) and ranges from distilled data alone, against 32 training examples."""
    inputs, targets = (torch.stack(list(map(torch.as_tensor, parts))) for parts in zip(*(resnet20.train[i] for i in range(32))))
    tests = [torch.stack(list(map(torch.as_tensor, parts))) for parts in zip(*resnet20.evaluation)]
    distilled = distilled_batches(resnet20.model, resnet20.loss, inputs, size=32, steps=40, generator=seeded())
    accuracy = {}
    for name, data in (("real", [(inputs, targets)]), ("distilled", distilled)):
        table = hawq.sensitivity(resnet20.model, resnet20.loss, data, bits=(2, 3, 4, 5, 6, 8), generator=seeded())
        sizes = {layer: resnet20.model.get_submodule(layer).weight.numel() for layer in table}
        costs = {layer: {bits: bits * sizes[layer] for bits in table[layer]} for layer in table}
        allocation = hawq.allocate(table, [hawq.Budget("bits", costs, 4 * sum(sizes.values()))])
        quantized = hawq.quantize_model(resnet20.model, allocation, data, activations=8)
        with torch.no_grad():
            accuracy[name] = float(resnet20.metric(quantized(tests[0]), tests[1]))
    assert accuracy["real"] > 0.97
    assert accuracy["distilled"] >= accuracy["real"] - 0.01
