"""Kronecker-factored matrices against definitions, one example, one position and one cotangent at a time."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hessian
from hessian.estimators import gradient_factors, layer_gradients
from hessian.operators.kfac import EKFAC, KFAC
from tests.cases import ConvNet, SequenceNet, SmoothNet, classification, seeded
from tests.networks import FoldedTime
from tests.oracles import dense_gauss_newton

CLASSES = nn.CrossEntropyLoss()


class Piecewise(nn.Module):
    """Products by hand with a square weight as it is and by its transpose, an addition inside the product."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Parameter(torch.randn(4, 4))
        self.transposed = nn.Parameter(torch.randn(4, 4))
        self.shift = nn.Parameter(torch.randn(3))
        self.last = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(F.linear(F.relu(x @ self.plain), self.transposed))
        return torch.addmm(self.shift, x, self.last)


NETWORKS = {
    "convolutions": (ConvNet, (5, 1, 9, 9)),
    "positions": (SequenceNet, (5, 6, 3)),
    "rows folded into the batch": (FoldedTime, (4, 5, 3, 4, 4)),
    "products": (Piecewise, (6, 4)),
}


def case(name: str) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    build, shape = NETWORKS[name]
    return seeded(build), classification(*shape)


def close(found: torch.Tensor, expected: torch.Tensor, relative: float = 1e-10) -> bool:
    return bool((found - expected).norm() <= relative * expected.norm())


def output_factors(outputs: torch.Tensor, targets: torch.Tensor, loss: nn.Module) -> Iterator[tuple[int, torch.Tensor]]:
    """Examples n with vectors u such that the loss's second derivative in their outputs is the sum of u u^T."""
    leaf = outputs.detach()
    whole = torch.autograd.functional.hessian(lambda flat: loss(flat.view(leaf.shape), targets), leaf.reshape(-1))
    width = leaf[0].numel()
    for example in range(len(leaf)):
        rows = slice(example * width, (example + 1) * width)
        values, vectors = torch.linalg.eigh(whole[rows, rows])
        for value, vector in zip(values, vectors.T, strict=True):
            yield example, (value.clamp_min(0).sqrt() * vector).view(leaf.shape[1:])


def example_gradients(model: nn.Module, name: str, data: Sequence[torch.Tensor], loss: nn.Module = CLASSES) -> torch.Tensor:
    """One gradient for every example and cotangent, (N * C, *parameter.shape)."""
    outputs = model(data[0])
    parameter = dict(model.named_parameters())[name]
    return torch.stack(
        [
            torch.autograd.grad((outputs[example] * factor).sum(), parameter, retain_graph=True)[0]
            for example, factor in output_factors(outputs, data[1], loss)
        ]
    )


def naive_factors(model: nn.Module, layer: str, data: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(G, R, R) and (G, C, C): sums over examples, cotangents and positions; what a position sees comes from autograd."""
    module = model.get_submodule(layer)
    seen: dict[str, torch.Tensor] = {}
    handle = module.register_forward_hook(lambda _, inputs, result: seen.update(inputs=inputs[0], outputs=result))
    all_outputs = model(data[0])
    groups, weight = getattr(module, "groups", 1), module.weight
    channel = -1 if isinstance(module, nn.Linear) else 1
    transposed = isinstance(module, nn.ConvTranspose1d)
    rows = torch.zeros(groups, len(weight) // groups, len(weight) // groups, dtype=torch.float64)
    columns = torch.zeros(groups, weight[0].numel(), weight[0].numel(), dtype=torch.float64)
    count = 0
    cotangents: dict[int, list[torch.Tensor]] = {}
    for example, factor in output_factors(all_outputs, data[1], CLASSES):
        cotangents.setdefault(example, []).append(factor)
    for example, factors in cotangents.items():
        outputs = model(data[0][example : example + 1])
        there = seen["outputs"]
        gradients = [torch.autograd.grad((outputs[0] * factor).sum(), there, retain_graph=True)[0] for factor in factors]
        if transposed:  # rows are the input's channels; columns the output gradients that one of its entries reaches
            inputs = seen["inputs"].detach()
            values = inputs.movedim(channel, 0).flatten(1)
            rows += (values @ values.T).unsqueeze(0)
            count += values.shape[1]
            for gradient in gradients:
                for position in range(values.shape[1]):
                    unit = torch.zeros_like(inputs)
                    unit[0, 0, position] = 1
                    (reached,) = torch.autograd.grad((module(unit) * gradient).sum(), weight)
                    columns += torch.outer(reached[0].flatten(), reached[0].flatten()).unsqueeze(0)
            continue
        entries = there.movedim(channel, 0).flatten(1)
        count += entries.shape[1]
        for group in range(groups):
            first = group * len(weight) // groups
            for entry in entries[first]:
                (patch,) = torch.autograd.grad(entry, weight, retain_graph=True)
                columns[group] += torch.outer(patch[first].flatten(), patch[first].flatten())
        for gradient in gradients:
            values = gradient.movedim(channel, 0).flatten(1).unflatten(0, (groups, -1))
            rows += values @ values.mT
    handle.remove()
    return (rows / count, columns) if transposed else (rows, columns / count)


def test_a_deep_linear_network_with_squared_error_is_exact():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False), nn.Linear(3, 2, bias=False)).double()
    inputs = classification(7, 4)[0]
    data, loss = (inputs, torch.zeros(7, 2, dtype=torch.float64)), nn.MSELoss()
    for kind in (KFAC, EKFAC):
        operator = kind(model, loss, data)
        for name in operator.parameters:
            assert close(operator.block(name).to_dense(), dense_gauss_newton(model, loss, data, [name])), name


def test_one_example_of_one_layer_is_exact():
    model, data = nn.Linear(4, 3).double(), classification(1, 4)
    operator = KFAC(model, CLASSES, data)
    for name in ("weight", "bias"):
        assert close(operator.block(name).to_dense(), dense_gauss_newton(model, CLASSES, data, [name])), name


@pytest.mark.parametrize(
    ("network", "layers"),
    [
        ("convolutions", ("stem", "depthwise", "project", "down", "fc")),
        ("positions", ("inner", "conv", "up", "fc")),
        ("rows folded into the batch", ("c", "fc")),
    ],
)
def test_factors_equal_their_definition(network, layers):
    model, data = case(network)
    operator = KFAC(model, CLASSES, data)
    for layer in layers:
        left, right = naive_factors(model, layer, data)
        expected = torch.block_diag(*(torch.kron(one, other) for one, other in zip(left, right, strict=True)))
        assert close(operator.block(f"{layer}.weight").to_dense(), expected), layer


@pytest.mark.parametrize("network", NETWORKS)
def test_corrected_eigenvalues_are_second_moments_and_the_best(network):
    model, data = case(network)
    plain, corrected = KFAC(model, CLASSES, data), EKFAC(model, CLASSES, data)
    for name, parameter in corrected.parameters.items():
        block = corrected.blocks[name]
        gradients = example_gradients(model, name, data)
        rotated = block.left.mT @ gradients.reshape(-1, *block.values.shape) @ block.right
        assert close(block.values, rotated.square().sum(0)), name
        rows = gradients.reshape(-1, parameter.numel())
        truth = rows.T @ rows
        distances = [(operator.block(name).to_dense() - truth).norm() for operator in (corrected, plain)]
        assert distances[0] <= distances[1] + 1e-12 * truth.norm(), name
        if parameter.dim() == 1:
            assert close(plain.block(name).to_dense(), truth), name
        elif network != "products" or name == "plain":
            assert distances[0] < 0.99 * distances[1], name


@pytest.mark.parametrize("network", NETWORKS)
def test_traces_equal_the_exact_ones_of_the_layer_report(network):
    model, data = case(network)
    operator = EKFAC(model, CLASSES, data)
    for name, row in hessian.layer_report(model, CLASSES, data, method="exact").items():
        assert operator.block(name).exact_trace() == pytest.approx(row.trace, rel=1e-9), name


def test_curved_networks_have_factors_too():
    """The trace of EKFAC is that of the Gauss-Newton matrix, also where the Hessian has another."""
    model, data = seeded(SmoothNet), classification(6, 4)
    operator = EKFAC(model, CLASSES, data, params=["first.*", "last.*"])
    for name in operator.parameters:
        truth = dense_gauss_newton(model, CLASSES, data, [name])
        assert operator.block(name).exact_trace() == pytest.approx(float(truth.trace()), rel=1e-10)


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_algebra_equals_that_of_the_dense_matrix(kind):
    model, data = case("convolutions")
    operator = kind(model, CLASSES, data)
    dense, identity = operator.to_dense(), torch.eye(operator.shape[0], dtype=torch.float64)
    assert not any(block.values.requires_grad or block.left.requires_grad for block in operator.blocks.values())
    assert close(operator.exact_diagonal(), dense.diagonal())
    assert operator.exact_trace() == pytest.approx(float(dense.trace()), rel=1e-12)
    torch.testing.assert_close(operator.eigenvalues, torch.linalg.eigvalsh(dense).flip(0), rtol=1e-9, atol=1e-12)
    for damping in (1e-3, 10.0):
        assert close(operator.damped(damping).to_dense(), dense + damping * identity, 1e-12)
        assert close(operator.inverse(damping) @ (dense + damping * identity), identity)
    vectors = torch.randn(len(dense), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert close(operator @ vectors, dense @ vectors)
    assert close(operator @ vectors[:, 0], dense @ vectors[:, 0])
    chosen = operator.block(["bn.*", "fc.weight"])
    assert list(chosen.blocks) == ["bn.weight", "bn.bias", "fc.weight"]
    with pytest.raises(ValueError, match=r"no parameter of this operator matches 'bm\.\*': it has stem\.weight, "):
        operator.block("bm.*")
    with pytest.raises(ValueError, match=r"has an eigenvalue of .* with damping=0 has no inverse: give a positive damping"):
        operator.inverse(damping=0.0)


@pytest.mark.parametrize("network", ["convolutions", "positions"])
def test_few_examples_and_cotangents_at_a_time_give_the_same(network, monkeypatch):
    model, data = case(network)
    expected = EKFAC(model, CLASSES, data).to_dense()
    monkeypatch.setattr(gradient_factors, "_BYTES", 1)
    monkeypatch.setattr(layer_gradients, "_GRADIENT_BYTES", 1)
    assert close(EKFAC(model, CLASSES, data).to_dense(), expected)
