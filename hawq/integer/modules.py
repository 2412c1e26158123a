"""Rules of the two modules of a quantized network: its layers and its activation quantizers."""

from math import prod
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from hawq.graph import LAYER_OPERATIONS
from hawq.integer.dyadic import dyadic, room_for
from hawq.integer.grid import Compute, Grid, Site
from hawq.layers import ActivationQuantizer, QuantizedLayer


def quantizer(site: Site, node: fx.Node) -> tuple[Grid, Compute]:
    """Integers of any grid, or real numbers, to the 256 values of an ActivationQuantizer; takes uint8 codes as they are."""
    module = site.module(node)
    assert isinstance(module, ActivationQuantizer)
    scale, zero_point, single = module.scale.double(), int(module.zero_point), module.scale
    low, high = -zero_point, 2**module.bits - 1 - zero_point
    grid, source = Grid(scale, max(-low, high)), site.grid(node.args[0])
    if source is None:

        def enter(x: torch.Tensor) -> torch.Tensor:
            if not x.is_floating_point():
                return x.long() - zero_point
            return torch.round(x / single).clamp(low, high).long()

        return grid, enter
    if source.is_uniform and bool(source.scale == scale):
        return grid, lambda x: x.clamp(low, high)
    ratio = source.scale / scale
    rescale = dyadic(ratio, site.bits, room_for(source.bound * ratio))
    site.multipliers[node.name] = (rescale,)
    return grid, lambda x: rescale(x).clamp(low, high)


def layer(site: Site, node: fx.Node) -> tuple[Grid, Compute] | None:
    """Sums of products of integers and an integer bias, on the grid input scale * weight scale of each channel."""
    module, source = site.module(node), site.grid(node.args[0])
    assert isinstance(module, QuantizedLayer)
    if source is None or not source.is_uniform or not module.has_integer_kernel:
        return None
    codes = module.codes.long()
    scale = source.scale * module.scale.double()
    bias = None
    if module.bias is not None:
        whole = module.bias_scale is not None
        bias = module.bias.long() if whole else torch.round(module.bias.double() / scale).long()
    largest = codes.abs().flatten(1).sum(1) * source.bound + (0 if bias is None else bias.abs())
    dims = site.value(node.args[0]).dim()
    channels = [1] * dims
    channels[module.channel_dim] = -1
    return Grid(scale.view(channels), int(largest.max())), _products(module, codes, bias)


def _products(module: QuantizedLayer, codes: torch.Tensor, bias: torch.Tensor | None) -> Compute:
    """The layer's operation on int64 tensors; dense convolutions as matrix products, which are several times as fast."""
    operation, settings = module.operation, module.settings
    assert operation in LAYER_OPERATIONS
    dims = codes.dim() - 2
    stride, padding, dilation, groups = (*settings, *(None, None, None, 1)[len(settings) :]) if dims else (None,) * 4
    if not dims or groups != 1 or isinstance(padding, str):
        return lambda x: operation(x, codes, bias, *settings)

    def each(value: Any, default: int) -> list[int]:
        values = list(value) if isinstance(value, list | tuple) else [default if value is None else value]
        return values * dims if len(values) == 1 else values

    strides, dilations = each(stride, 1), each(dilation, 1)
    margins = [margin for amount in reversed(each(padding, 0)) for margin in (amount, amount)]
    spans = [d * (k - 1) + 1 for d, k in zip(dilations, codes.shape[2:], strict=True)]
    matrix = codes.flatten(1).t().contiguous()

    def compute(x: torch.Tensor) -> torch.Tensor:
        windows = F.pad(x, margins)
        for dim in range(dims):
            windows = windows.unfold(2 + dim, spans[dim], strides[dim])
        for dim, step in enumerate(dilations):
            windows = windows[(slice(None),) * (2 + dims + dim) + (slice(None, None, step),)]
        order = (0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
        rows = windows.permute(order)
        sizes = rows.shape[: 1 + dims]
        sums = rows.reshape(prod(sizes), -1) @ matrix
        return (sums if bias is None else sums + bias).view(*sizes, -1).movedim(-1, 1).contiguous()

    return compute
