"""Bytes: what a layer's weights take in a packed file."""

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from hawq.graph import Layer, get_tensor
from hawq.model import build
from hawq.packing import packed_size
from hawq.storage import to_bytes


def packed_bytes(layers: Mapping[str, Layer], bits: Sequence[int]) -> dict[str, dict[int, float]]:
    """Bytes of a layer's packed codes, {layer: {bits: bytes}}."""
    return {name: {width: float(packed_size(layer.num_params, width)) for width in bits} for name, layer in layers.items()}


def weight_bits(layers: Mapping[str, Layer], bits: Sequence[int]) -> dict[str, dict[int, float]]:
    """Bits of a layer's codes before padding to whole bytes, {layer: {bits: number}}: what an average of bits counts."""
    return {name: {width: float(layer.num_params * width) for width in bits} for name, layer in layers.items()}


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
