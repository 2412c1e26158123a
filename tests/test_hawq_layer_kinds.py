"""Transposed convolutions, embeddings, attention, groups of columns and narrow activations: module, file and runtime."""

import pytest
import torch
from torch import nn

import hawq
from hawq import onnx_export, runtime, storage
from hawq.graph import find_layers
from hawq.layers import ActivationQuantizer


class UpSampling(nn.Module):
    """Transposed convolutions, dense and depthwise, with batch norm behind one."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(2, 8, 3, stride=2)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.each = nn.ConvTranspose2d(6, 6, 2, stride=2, groups=6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.each(torch.relu(self.norm(self.up(torch.relu(self.down(x))))))


class Attention(nn.Module):
    """Tokens, an embedding, and attention written as two products of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 32)
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))
        self.out = nn.Linear(32, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        scores = self.query(x) @ self.key(x).transpose(1, 2) / 32**0.5
        return self.out((scores.softmax(-1) @ self.value(x)).mean(1))


@pytest.fixture(scope="module")
def up_sampling():
    torch.manual_seed(0)
    model, inputs = UpSampling(), torch.randn(12, 2, 9, 9)
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(inputs)
    return hawq.prepared(model.eval(), [inputs]), inputs


@pytest.fixture(scope="module")
def attention():
    torch.manual_seed(0)
    model, tokens = Attention().eval(), torch.randint(0, 20, (12, 7))
    return hawq.prepared(model, [tokens]), tokens


def relative_error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def quantized(graph, inputs, bits, **settings):
    allocation = hawq.Allocation(dict.fromkeys(find_layers(graph), bits))
    generator = torch.Generator().manual_seed(0)
    return hawq.quantize_model(graph, allocation, (inputs, torch.zeros(len(inputs))), generator=generator, **settings)


@torch.no_grad()
def assert_round_trips(model, graph, inputs, tolerance):
    loaded = storage.from_bytes(storage.to_bytes(model), graph)
    assert torch.equal(loaded(inputs), model(inputs))
    session = runtime.network(onnx_export.to_bytes(model, inputs[:2]))
    assert relative_error(session(inputs), model(inputs)) < tolerance


@pytest.mark.parametrize("activations", [8, None])
@torch.no_grad()
def test_transposed_convolutions(up_sampling, activations):
    graph, inputs = up_sampling
    assert list(find_layers(graph)) == ["down", "up", "each"]
    model = quantized(graph, inputs, 8, activations=activations)
    assert relative_error(model(inputs), graph(inputs)) < 0.05
    assert model.layers()["up"].scale.shape == (6,)
    assert_round_trips(quantized(graph, inputs, 3, activations=activations), graph, inputs, 0.03 if activations else 1e-5)


@pytest.mark.parametrize("activations", [8, None])
@torch.no_grad()
def test_embeddings_and_products_of_activations(attention, activations):
    graph, tokens = attention
    assert list(find_layers(graph)) == ["table", "query", "key", "value", "out"]
    model = quantized(graph, tokens, 8, activations=activations)
    assert relative_error(model(tokens), graph(tokens)) < 0.05
    assert_round_trips(model, graph, tokens, 0.03 if activations else 1e-5)
    if activations:
        products = [node for node in model.graph.nodes if "matmul" in node.name and node.op == "call_function"]
        assert len(products) == 2
        for product in products:
            assert all(isinstance(model.get_submodule(read.target), ActivationQuantizer) for read in product.args)


@torch.no_grad()
def test_groups_of_columns(attention):
    graph, tokens = attention
    model = quantized(graph, tokens, 3, activations=None, group_size=8)
    assert model.layers()["query"].scale.shape == (32, 4)
    assert model.layers()["table"].scale.shape == (20, 4)
    assert_round_trips(model, graph, tokens, 1e-5)
    coarse = quantized(graph, tokens, 3, activations=None)
    assert relative_error(model(tokens), graph(tokens)) < relative_error(coarse(tokens), graph(tokens))


@torch.no_grad()
def test_activations_of_fewer_bits(up_sampling):
    graph, inputs = up_sampling
    names = list(quantized(graph, inputs, 8).quantizers())
    allocation = hawq.Allocation(dict.fromkeys(find_layers(graph), 8) | {f"activation:{names[1]}": 4})
    model = hawq.quantize_model(graph, allocation, (inputs, inputs), generator=torch.Generator().manual_seed(0))
    assert [module.bits for module in model.quantizers().values()] == [8, 4, *[8] * (len(names) - 2)]
    assert_round_trips(model, graph, inputs, 0.05)
    unknown = hawq.Allocation({"down": 8, "activation:nothing": 4})
    with pytest.raises(ValueError, match="names the activation 'nothing'"):
        hawq.quantize_model(graph, unknown, (inputs, inputs), generator=torch.Generator().manual_seed(0))


def test_codes_of_any_lowest_value_are_packed(up_sampling):
    graph, inputs = up_sampling
    model = quantized(graph, inputs.abs(), 3, activations=None)
    lowest = [layer.lowest_codes() for layer in model.layers().values()]
    assert any(codes is not None for codes in lowest)
    symmetric = quantized(graph, inputs.abs(), 3, activations=None, symmetric=True)
    assert all(layer.lowest_codes() is None for layer in symmetric.layers().values())
    assert len(storage.to_bytes(symmetric)) < len(storage.to_bytes(model))


def test_graphs_run_with_gradients_whatever_kernels_lay_out():
    """Attention kernels for training return other strides than those that were traced."""

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 48)
            self.outer = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.inner(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
            return self.outer(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model, inputs = Fused().eval(), torch.randn(4, 9, 16)
    graph = hawq.prepared(model, [inputs])
    torch.testing.assert_close(graph(inputs), model(inputs))
    graph(inputs).sum().backward()
    with torch.no_grad():
        assert_round_trips(quantized(graph, inputs, 4), graph, inputs, 0.05)
