r"""Cross-layer equalisation: what one layer's channel has too much of in its range, the next layer's column takes over.

For layers joined by an operation with f(s x) = s f(x), W2 f(W1 x + b1) = (W2 S) f(S^-1 W1 x + S^-1 b1) for every diagonal
S > 0. With r1_c the largest |weight| of the first layer's output channel c and r2_c that of the second's columns of c,

.. math:: s_c = \sqrt{r^1_c \, r^2_c} \,/\, r^2_c

makes both ranges :math:`\sqrt{r^1_c r^2_c}`. Source: Nagel et al., Data-Free Quantization Through Weight Equalization and
Bias Correction, ICCV 2019, equation 11.
"""

import copy
from dataclasses import dataclass

import torch
from torch import fx

from hawq.affine import per_channel
from hawq.channels import Readers, find_readers, scalable
from hawq.graph import find_layers, get_tensor, set_parameter
from hawq.layers import channel_dim

_TOLERANCE = 1e-3  # of a scale; all within it of 1 end the sweeps
_SWEEPS = 100
_DEAD = 1e-6  # of a layer's largest range: channels with less are nothing but their bias, which a scale would blow up


@dataclass(frozen=True)
class Pair:
    """Two layers made equal. channels: how many of the first's output channels were scaled."""

    first: str
    second: str
    channels: int


@torch.no_grad()
def equalized(graph: fx.GraphModule) -> tuple[fx.GraphModule, list[Pair], dict[str, str]]:
    """A copy of a folded graph (see `folded`) that computes the same, with the ranges of joined layers made equal.

    Returns the copy, the pairs, and the layers left as they are with the operation that stops each: a clip at a finite
    value (ReLU6), a residual sum, an activation that is not positively homogeneous, the network's output. A channel that
    several layers read is scaled with the largest of their ranges. Sweeps over all pairs end when no scale differs from 1
    by more than 0.001.
    """
    result = copy.deepcopy(graph)
    layers = find_layers(result)
    weights = {name: get_tensor(result, layer.weight).double() for name, layer in layers.items()}
    biases = {name: get_tensor(result, layer.bias).double() for name, layer in layers.items() if layer.bias}
    joined: dict[str, Readers] = {}
    skipped: dict[str, str] = {}
    for name, layer in layers.items():
        readers = find_readers(layer.node, channel_dim(layer.node.target), layers)
        if not readers.free.any():
            skipped[name] = str(readers.barrier)
        elif not scalable(layer):
            skipped[name] = f"{layer.bias}, which has other readers"
        else:
            joined[name] = readers
    for _ in range(_SWEEPS):
        change = 0.0
        for name, readers in joined.items():
            first = weights[name].abs().flatten(1).amax(1)
            second = readers.column_maxima({reader: weights[reader].abs() for reader in readers.layers})
            alive = readers.free & (first > _DEAD * first.max()) & (second > _DEAD * second.max())
            scale = torch.where(alive, (first / second).sqrt(), 1.0)
            change = max(change, float((scale - 1).abs().max()))
            weights[name] = weights[name] / per_channel(scale, weights[name])
            if name in biases:
                biases[name] = biases[name] / scale
            for reader in readers.layers:
                weights[reader] = readers.scaled_columns(reader, weights[reader], scale)
        if change < _TOLERANCE:
            break
    for name, layer in layers.items():
        for target, value in ((layer.weight, weights[name]), (layer.bias, biases.get(name))):
            if target is not None and value is not None:
                set_parameter(result, target, value.to(get_tensor(result, target).dtype))
    pairs = [
        Pair(name, reader, int(readers.free[channels.unique()].sum()))
        for name, readers in joined.items()
        for reader, channels in readers.layers.items()
    ]
    return result, [pair for pair in pairs if pair.channels], skipped
