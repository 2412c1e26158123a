"""Bit operations: weight bits times activation bits times multiply-accumulates (HAWQ-V3, section 3.4)."""

from collections.abc import Mapping, Sequence

from hawq.graph import Layer

FLOAT_BITS = 32


def bit_operations(
    layers: Mapping[str, Layer], bits: Sequence[int], activation_bits: int | None
) -> dict[str, dict[int, float]]:
    """Bit operations of each layer for one example, {layer: {bits: number}}; float activations count 32 bits."""
    activations = FLOAT_BITS if activation_bits is None else activation_bits
    return {name: {width: float(width * activations * layer.macs) for width in bits} for name, layer in layers.items()}
