"""Bits and bytes: what layers' weights take in a packed file."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import fx, nn

from hawq.allocate import Budget, Table
from hawq.allocation import ACTIVATION
from hawq.graph import Layer, get_tensor
from hawq.model import build
from hawq.packing import packed_size
from hawq.storage import to_bytes


def packed_bytes(layers: Mapping[str, Layer], bits: Sequence[int]) -> dict[str, dict[int, float]]:
    """Bytes of a layer's packed codes, {layer: {bits: bytes}}."""
    return {name: {width: float(packed_size(layer.num_params, width)) for width in bits} for name, layer in layers.items()}


def bits_of_weights(num_params: Mapping[str, int], bits: Iterable[int]) -> dict[str, dict[int, float]]:
    """Bits of a layer's codes before padding to whole bytes, {layer: {bits: number}}: what an average of bits counts."""
    widths = tuple(bits)
    return {name: {width: float(count * width) for width in widths} for name, count in num_params.items()}


def num_params(table: Iterable[str], model: nn.Module) -> dict[str, int]:
    """How many weights each layer of a table has, {layer: number}; rows of activations are left out.

    Raises ValueError for a layer that the model does not have.
    """
    parameters = dict(model.named_parameters())
    layers = [name for name in table if not name.startswith(ACTIVATION)]
    weights = {name: parameters.get(f"{name}.weight", parameters.get(name)) for name in layers}
    for name, weight in weights.items():
        if weight is None:
            raise ValueError(f"the table has a layer {name!r}, of which the model has no weight: give the model it was made of")
    return {name: weight.numel() for name, weight in weights.items() if weight is not None}


def average_bits(table: Table, model: nn.Module, limit: float) -> Budget:
    """A budget of at most `limit` bits a weight, on average over the layers of a table made of `model`.

    >>> import hawq, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.Linear(10, 30))
    >>> table = {"0": {2: 9.0, 8: 0.0}, "1": {2: 1.0, 8: 0.0}}
    >>> hawq.allocate(table, [hawq.average_bits(table, model, 4)]).bits
    {'0': 8, '1': 2}
    """
    counts = num_params(table, model)
    widths = {bits for name in counts for bits in table[name]}
    return Budget("bits of weights", bits_of_weights(counts, widths), limit * sum(counts.values()))


def file_overhead(graph: fx.GraphModule, layers: Mapping[str, Layer], activation_bits: int | None) -> int:
    """Bytes of a packed file beside the codes: scales, biases, activation ranges, float tensors and the header.

    Measured on a file of 8-bit codes, whose header is at least as long as any other's.
    """
    zeros = {
        name: (torch.zeros_like(weight, dtype=torch.int8), torch.ones(len(weight)))
        for name, weight in ((name, get_tensor(graph, layer.weight)) for name, layer in layers.items())
    }
    model = build(graph, zeros, dict.fromkeys(layers, 8), activation_bits, torch.zeros(2, *_example_shape(graph)))
    for module in model.layers().values():
        module.set_bias(torch.zeros_like(module.scale), None)
    return len(to_bytes(model)) - sum(packed_size(layer.num_params, 8) for layer in layers.values())


def _example_shape(graph: fx.GraphModule) -> tuple[int, ...]:
    placeholder = next(node for node in graph.graph.nodes if node.op == "placeholder")
    return tuple(placeholder.meta["val"].shape[1:])
