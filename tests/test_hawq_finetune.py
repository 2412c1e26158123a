"""Fine-tuning: the gradients of LSQ, an exact start and end, a training that can be stopped and that survives a failure."""

import copy
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hawq
from hawq.fake_quantize import baked, round_with_learned_step, trainable, trainable_layer
from hawq.finetune import finetune, hawq_v1_order
from hawq.fold import folded
from hawq.graph import find_layers, get_tensor
from hawq.stages import model_digest
from tests.networks import build

Batches = list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def problem() -> tuple[fx.GraphModule, TensorDataset]:
    """A trained convolutional network of three layers, folded, and its data: which of four corners is brightest."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 1, 8, 8, generator=generator)
    corners = F.avg_pool2d(inputs, 4).flatten(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU()
        )
        model += nn.Sequential(nn.Flatten(), nn.Linear(128, 4))
        data = TensorDataset(inputs, corners.argmax(1))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), data.tensors[1]).backward()
            optimizer.step()
    return folded(model.eval(), inputs[:2]), data


def quantized(graph: nn.Module, inputs: torch.Tensor, bits: int = 2, activations: int | None = None) -> hawq.QuantizedModel:
    widths = dict.fromkeys(find_layers(folded(graph, inputs)), bits)
    allocation = hawq.Allocation(widths, objective=0.0, gap=0.0, budgets={})
    return hawq.quantize_model(
        graph, allocation, [(inputs, torch.zeros(len(inputs)))], rounding="nearest", activations=activations, symmetric=True
    )


def shuffled(data: TensorDataset, generator: torch.Generator) -> DataLoader[tuple[torch.Tensor, ...]]:
    return DataLoader(data, batch_size=64, shuffle=True, generator=generator)


def same(first: nn.Module, second: nn.Module) -> bool:
    return model_digest(first) == model_digest(second)


def trained_loss(model: nn.Module, data: TensorDataset) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model(data.tensors[0]), data.tensors[1]))


@pytest.mark.parametrize(("low", "high"), [(-2, 1), (-8, 7), (0, 255), (-10, 245)])
def test_gradients_are_lsqs(low: int, high: int) -> None:
    generator = torch.Generator().manual_seed(0)
    span = high - low
    steps = torch.tensor([0.3, 0.07, 1.9], dtype=torch.float64)
    scaled = low - span / 3 + span * 5 / 3 * torch.rand(3, 40, generator=generator, dtype=torch.float64)
    x = (scaled * steps[:, None]).requires_grad_()
    step = steps[:, None].clone().requires_grad_()
    upstream = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    rounded = round_with_learned_step(x, step, torch.tensor(low), torch.tensor(high), 40)
    rounded.backward(upstream)
    assert x.grad is not None
    assert step.grad is not None
    negative, positive = -low, high  # Q_N and Q_P of the paper
    for channel, s in enumerate(steps.tolist()):
        of_step = 0.0
        for position in range(40):
            v, outer = float(x.detach()[channel, position]), float(upstream[channel, position])
            if v / s <= -negative:  # equations 1 to 3
                value, slope, passes = -negative, -negative, 0.0
            elif v / s >= positive:
                value, slope, passes = positive, positive, 0.0
            else:
                value, slope, passes = round(v / s), round(v / s) - v / s, 1.0
            assert float(rounded.detach()[channel, position]) == pytest.approx(value * s, rel=1e-14)
            assert float(x.grad[channel, position]) == outer * passes
            of_step += outer * slope
        assert float(step.grad[channel]) == pytest.approx(of_step / math.sqrt(40 * positive), rel=1e-12)


def test_step_gradient_agrees_with_the_slope_between_roundings() -> None:
    """Where values are clipped the result is linear in the step, so that finite differences are exact."""
    x = torch.tensor([[-9.0, 9.0, 30.0]], dtype=torch.float64)
    weights = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)

    def value(step: torch.Tensor) -> torch.Tensor:
        return (weights * round_with_learned_step(x, step, torch.tensor(-4), torch.tensor(3), 3)).sum()

    step = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(value(step), step)
    difference = (value(step + 0.1) - value(step - 0.1)) / 0.2
    assert float(gradient) * 3 == pytest.approx(float(difference.detach()), rel=1e-12)  # the scale is 1 / sqrt(3 values * 3)


@pytest.mark.parametrize("activations", [None, 8])
@pytest.mark.parametrize("name", ["conv net", "audio, padded inside", "a parameter called scale", "branches", "tokens"])
def test_starts_where_the_quantized_network_is(name: str, activations: int | None) -> None:
    network, inputs = build(name)
    graph = folded(network, inputs[:2])
    model = quantized(graph, inputs, 3, activations)
    moved = next(iter(model.layers().values()))  # codes that rounding to nearest would not give
    moved.codes = torch.where(moved.codes < 3, moved.codes + 1, moved.codes)
    twin = trainable(model, graph)
    assert torch.equal(twin(inputs), model(inputs))
    assert same(baked(twin, model), model)


def test_latent_weights_are_the_float_ones(problem: tuple[fx.GraphModule, TensorDataset]) -> None:
    graph, data = problem
    model = quantized(graph, data.tensors[0])
    twin = trainable(model, graph)
    for name, layer in find_layers(graph).items():
        weight, latent = get_tensor(graph, layer.weight), trainable_layer(twin, name).real_weight()
        scale = model.layers()[name].scale.view(-1, *(1,) * (weight.dim() - 1))
        assert ((latent - weight).abs() <= 0.011 * scale).all()  # a code's cell, less a hundredth at its edges
        assert float(((latent - weight).abs() <= 1e-6 * scale).float().mean()) > 0.9


@pytest.mark.parametrize("activations", [None, 8])
def test_baking_is_exact(problem: tuple[fx.GraphModule, TensorDataset], activations: int | None) -> None:
    graph, data = problem
    inputs = data.tensors[0]
    model = quantized(graph, inputs, 3, activations)
    twin = trainable(model, graph)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in twin.parameters():  # as training might leave them
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    result = baked(twin, model)
    sources = result.input_quantizers()
    with torch.no_grad():
        for name, layer in result.layers().items():
            trained = trainable_layer(twin, name)
            assert torch.equal(layer.weight(), trained.weight())
            bias = layer.real_bias()
            assert bias is not None
            assert trained.bias is not None
            half = 0.5 * get_tensor(result, f"{sources[name]}.scale") * layer.scale if name in sources else torch.zeros(())
            assert ((bias - trained.bias).abs() <= half * 1.001 + 1e-7 * bias.abs()).all()
            trained.bias.copy_(bias)
        assert torch.equal(result(inputs), twin(inputs))
    assert not torch.equal(result(inputs), model(inputs))
    if activations:
        assert all(layer.bias is not None and layer.bias.dtype == torch.int32 for layer in result.layers().values())


@pytest.mark.parametrize("activations", [None, 8])
def test_recovers_what_two_bits_took(problem: tuple[fx.GraphModule, TensorDataset], activations: int | None) -> None:
    graph, data = problem
    model = quantized(graph, data.tensors[0], 2, activations)
    float_digest, digest = model_digest(graph), model_digest(model)
    generator = torch.Generator().manual_seed(0)
    result = finetune(model, graph, shuffled(data, generator), nn.CrossEntropyLoss(), epochs=6, generator=generator)
    before, after, of_float = trained_loss(model, data), trained_loss(result, data), trained_loss(graph, data)
    assert after - of_float < 0.5 * (before - of_float)
    assert (model_digest(graph), model_digest(model)) == (float_digest, digest)
    assert result.bits == model.bits
    for layer in result.layers().values():
        assert layer.codes.dtype == torch.int8
        assert int(layer.codes.min()) >= -2
        assert int(layer.codes.max()) <= 1
    for name, quantizer in result.quantizers().items():
        assert torch.equal(quantizer.zero_point, model.quantizers()[name].zero_point)
        assert not torch.equal(quantizer.scale, model.quantizers()[name].scale)


def test_distillation_alone_follows_the_float_network(problem: tuple[fx.GraphModule, TensorDataset]) -> None:
    """A loss that is always zero leaves the float network as the only teacher; for it, by squared error."""
    graph, data = problem
    model = quantized(graph, data.tensors[0])
    result = finetune(model, graph, [tuple(data.tensors)], lambda outputs, _: 0.0 * outputs.sum(), epochs=40)
    with torch.no_grad():
        wanted = graph(data.tensors[0])
        assert F.mse_loss(result(data.tensors[0]), wanted) < 0.5 * F.mse_loss(model(data.tensors[0]), wanted)


@pytest.mark.parametrize("shared_generator", [True, False])
def test_resumes_bit_for_bit(problem: tuple[fx.GraphModule, TensorDataset], tmp_path: Path, shared_generator: bool) -> None:
    graph, data = problem
    model = quantized(graph, data.tensors[0], activations=8)

    class StoppedError(Exception):
        pass

    def train(stop_at: int | None, path: Path) -> hawq.QuantizedModel:
        calls = 0

        def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise StoppedError
            return F.cross_entropy(outputs, targets)

        generator = torch.Generator().manual_seed(3) if shared_generator else None
        batches = DataLoader(data, batch_size=64, shuffle=True, generator=generator)
        return finetune(model, graph, batches, loss, epochs=4, checkpoint=path, generator=generator)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        whole = train(None, tmp_path / "whole")
        torch.manual_seed(3)
        with pytest.raises(StoppedError):
            train(2 * 8 * 2 + 5, tmp_path / "stopped")  # in the third epoch: 8 batches, each seen by teacher and student
        torch.manual_seed(99)  # a new process
        resumed = train(None, tmp_path / "stopped")
        finished = train(1, tmp_path / "stopped")  # nothing is left to do: the loss is not called
    assert same(resumed, whole)
    assert same(finished, whole)
    assert not same(resumed, model)


def test_refuses_the_checkpoint_of_another_training(problem: tuple[fx.GraphModule, TensorDataset], tmp_path: Path) -> None:
    graph, data = problem
    inputs, targets = data.tensors
    path, loss = tmp_path / "checkpoint", nn.CrossEntropyLoss()
    model = quantized(graph, inputs)
    finetune(model, graph, [(inputs, targets)], loss, epochs=1, checkpoint=path)
    with pytest.raises(ValueError, match="other quantized weights and widths: name another file"):
        finetune(quantized(graph, inputs, 3), graph, [(inputs, targets)], loss, epochs=1, checkpoint=path)
    with pytest.raises(ValueError, match="other settings"):
        finetune(model, graph, [(inputs, targets)], loss, epochs=2, checkpoint=path)
    changed = copy.deepcopy(graph)
    with torch.no_grad():
        next(changed.parameters()).mul_(1.01)
    with pytest.raises(ValueError, match="other float weights"):
        finetune(model, changed, [(inputs, targets)], loss, epochs=1, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-9] + b"\0" * 9)  # damaged: trained anew
    again = finetune(model, graph, [(inputs, targets)], loss, epochs=1, checkpoint=path)
    assert same(again, finetune(model, graph, [(inputs, targets)], loss, epochs=1))


def test_order_is_hawq_v1s(problem: tuple[fx.GraphModule, TensorDataset]) -> None:
    graph, data = problem
    model = quantized(graph, data.tensors[0])
    errors = {}
    for name, layer in model.layers().items():
        scale = layer.scale.view(-1, *(1,) * (layer.codes.dim() - 1))
        errors[name] = float((layer.codes * scale - get_tensor(graph, f"{name}.weight").detach()).norm())
    names = list(errors)
    wanted = [names[1], names[0], names[2]]
    eigenvalues = {name: (3 - wanted.index(name)) / errors[name] ** 2 for name in names}
    assert hawq_v1_order(model, graph, eigenvalues) == wanted
    with pytest.raises(ValueError, match=f"no eigenvalue for layer '{names[2]}'"):
        hawq_v1_order(model, graph, dict.fromkeys(names[:2], 1.0))


def test_layers_are_rounded_in_their_order(
    problem: tuple[fx.GraphModule, TensorDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, data = problem
    model = quantized(graph, data.tensors[0])
    order = list(reversed(model.layers()))
    rounded: list[list[str]] = []
    twins: list[fx.GraphModule] = []
    monkeypatch.setattr(
        sys.modules["hawq.finetune"], "trainable", lambda *a, **k: twins.append(trainable(*a, **k)) or twins[-1]
    )

    class Watched:
        def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
            if twins:
                rounded.append([name for name in order if trainable_layer(twins[0], name).rounded])
                if len(rounded) == 1:  # only the layers not yet reached are as in the float network
                    for name in order[1:]:
                        weight = trainable_layer(twins[0], name).weight()
                        assert torch.allclose(weight, get_tensor(graph, f"{name}.weight"), rtol=1e-5)
            yield from zip(data.tensors[0].split(64), data.tensors[1].split(64), strict=True)

    result = finetune(model, graph, Watched(), nn.CrossEntropyLoss(), epochs=6, order=order)
    assert rounded == [order[:1], order[:2], order, order, order, order]
    assert trained_loss(result, data) < trained_loss(model, data)
    with pytest.raises(ValueError, match="'nonsense' is missing, repeated or unknown"):
        finetune(model, graph, Watched(), nn.CrossEntropyLoss(), epochs=6, order=[*order, "nonsense"])
    with pytest.raises(ValueError, match=f"'{order[0]}' is missing, repeated or unknown"):
        finetune(model, graph, Watched(), nn.CrossEntropyLoss(), epochs=6, order=[*order, order[0]])


def test_rolls_back_and_halves_the_rate(
    problem: tuple[fx.GraphModule, TensorDataset], caplog: pytest.LogCaptureFixture
) -> None:
    graph, data = problem
    model = quantized(graph, data.tensors[0])
    calls = 0

    def fails_in_epoch_two(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += outputs.requires_grad
        return F.cross_entropy(outputs, targets) * (math.nan if calls == 12 and outputs.requires_grad else 1.0)

    def train(loss: object) -> hawq.QuantizedModel:
        generator = torch.Generator().manual_seed(0)
        return finetune(model, graph, shuffled(data, generator), loss, epochs=3, learning_rate=0.01, generator=generator)  # type: ignore[arg-type]

    with caplog.at_level(logging.WARNING, "hawq"):
        result = train(fails_in_epoch_two)
    assert "not finite in epoch 2" in caplog.text
    assert "back to the end of epoch 1, with a learning rate of 0.005" in caplog.text
    assert calls == 8 + 4 + 8 + 8  # the failed epoch is done again, whole
    assert all(torch.isfinite(tensor).all() for tensor in result.state_dict().values())
    assert trained_loss(result, data) < trained_loss(model, data)
    assert not same(result, train(lambda outputs, targets: F.cross_entropy(outputs, targets)))


def test_gives_up_and_says_where(problem: tuple[fx.GraphModule, TensorDataset]) -> None:
    graph, data = problem
    model = quantized(graph, data.tensors[0])
    with pytest.raises(ValueError, match=r"diverges even at a learning rate of 3.91e\+05, '\d' first"):
        finetune(model, graph, [tuple(data.tensors)], nn.CrossEntropyLoss(), epochs=3, learning_rate=1e8)


def test_wrong_data_are_not_taken_for_divergence(problem: tuple[fx.GraphModule, TensorDataset]) -> None:
    graph, data = problem
    model = quantized(graph, data.tensors[0])
    inputs, targets = data.tensors
    broken = inputs.clone()
    broken[7] = math.nan
    with pytest.raises(ValueError, match="first in its example 7"):
        finetune(model, graph, [(broken, targets)], nn.CrossEntropyLoss(), epochs=1)
    with pytest.raises(ValueError, match="target 4 is out of range"):
        finetune(model, graph, [(inputs, targets + 1)], nn.CrossEntropyLoss(), epochs=1)


def test_no_epoch_changes_nothing(problem: tuple[fx.GraphModule, TensorDataset]) -> None:
    graph, data = problem
    model = quantized(graph, data.tensors[0], activations=8)
    assert same(finetune(model, graph, [tuple(data.tensors)], nn.CrossEntropyLoss(), epochs=0), model)


def test_refuses_what_does_not_fit(problem: tuple[fx.GraphModule, TensorDataset]) -> None:
    graph, data = problem
    model = quantized(graph, data.tensors[0])
    batches, loss = [tuple(data.tensors)], nn.CrossEntropyLoss()
    for wrong in ({"epochs": -1}, {"epochs": 1, "learning_rate": 0.0}, {"epochs": 1, "distillation": -1.0}):
        with pytest.raises(ValueError, match=f"{list(wrong)[-1]}="):
            finetune(model, graph, batches, loss, **wrong)  # type: ignore[arg-type]
    network, inputs = build("functional weights")
    with pytest.raises(ValueError, match="the float graph has no layer"):
        finetune(model, folded(network, inputs[:2]), batches, loss, epochs=1)


def test_a_saved_network_is_the_tuned_one(problem: tuple[fx.GraphModule, TensorDataset], tmp_path: Path) -> None:
    graph, data = problem
    model = quantized(graph, data.tensors[0], activations=8)
    result = finetune(model, graph, [tuple(data.tensors)], nn.CrossEntropyLoss(), epochs=2)
    hawq.save(result, tmp_path)
    assert torch.equal(hawq.load(tmp_path, graph)(data.tensors[0]), result(data.tensors[0]))
