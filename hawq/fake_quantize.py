"""A quantized network made trainable: real weights and step sizes, rounded in the forward pass, and baked back exactly."""

import copy
import math
from typing import Any

import torch
from torch import fx, nn
from torch.autograd.function import once_differentiable

from hawq.affine import dequantize, quantize, signed_range, spread
from hawq.graph import apply_layer, find_layers, get_tensor
from hawq.layers import LAYERS, QUANTIZERS, ActivationQuantizer, QuantizedLayer
from hawq.model import QuantizedModel

_WITHIN_CELL = 0.49  # of a step: as far as a latent weight may start from its code and still be rounded to it


class _LearnedStep(torch.autograd.Function):
    """See `round_with_learned_step`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, step: torch.Tensor, low: Any, high: Any, gradient_scale: float) -> torch.Tensor:
        ctx.save_for_backward(x, step)
        ctx.constants = low, high, gradient_scale
        return dequantize(quantize(x, step, 0, low, high), step)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, step = ctx.saved_tensors
        low, high, gradient_scale = ctx.constants
        scaled = x / step
        clipped = scaled.clamp(low, high)
        inside = scaled == clipped
        slope = clipped.round() - torch.where(inside, scaled, 0)
        return gradient * inside, (gradient * slope).sum_to_size(step.shape) * gradient_scale, None, None, None


def round_with_learned_step(
    x: torch.Tensor, step: torch.Tensor, low: torch.Tensor, high: torch.Tensor, num_values: int
) -> torch.Tensor:
    r"""`x` rounded to the multiples low * step to high * step, with the gradients of LSQ.

    .. math:: \hat x = s \, \mathrm{round}(\mathrm{clip}(x / s, l, h)), \qquad
        \frac{\partial \hat x}{\partial x} = [l \le x / s \le h], \qquad
        \frac{\partial \hat x}{\partial s} = \mathrm{round}(\mathrm{clip}(x / s, l, h)) - [l \le x / s \le h] \, x / s

    step, low, high: of shapes that broadcast to x's, the step positive. The step's gradient is multiplied by
    1 / sqrt(num_values * h), h the largest of `high`, num_values being how many of an example's values share a step.

    Source: Esser et al., Learned Step Size Quantization, ICLR 2020, equations 1 to 5 and section 2.2.
    """
    result: torch.Tensor = _LearnedStep.apply(x, step, low, high, 1 / math.sqrt(num_values * max(int(high.max()), 1)))
    return result


class TrainableLayer(nn.Module):
    """A QuantizedLayer's trainable form: latent weights, a step where the layer has a scale, a real bias.

    latent: like the weight, in units of its first step, so that one learning rate fits every layer. log_step: like the
    scale, the logarithm of the step in the same unit. rounded: whether the forward pass rounds the weight.
    """

    unit: torch.Tensor
    low: torch.Tensor

    def __init__(self, layer: QuantizedLayer, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.operation, self.settings, self.bits = layer.operation, layer.settings, layer.bits
        self.channel_axis = layer.form.channel_axis
        lowest = layer.lowest_codes()
        least = torch.full_like(layer.scale, signed_range(layer.bits)[0]) if lowest is None else lowest.to(layer.scale)
        self.register_buffer("low", layer.spread(least))
        self.rounded = True
        self.register_buffer("unit", layer.scale.clone())
        self.latent = nn.Parameter(weight.detach() / layer.spread(layer.scale))
        self.log_step = nn.Parameter(torch.zeros_like(layer.scale))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @property
    def high(self) -> torch.Tensor:
        """The highest codes."""
        return self.low + (2**self.bits - 1)

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        return spread(values, tuple(self.latent.shape), self.channel_axis)

    def start_at(self, codes: torch.Tensor) -> None:
        """Move each latent weight as little as it takes to be rounded to its code."""
        codes = codes.to(self.latent.dtype)
        lowest = torch.where(codes == self.low, -torch.inf, codes - _WITHIN_CELL)
        highest = torch.where(codes == self.high, torch.inf, codes + _WITHIN_CELL)
        with torch.no_grad():
            self.latent.copy_(self.latent.clamp(lowest, highest))

    def scale(self) -> torch.Tensor:
        """The steps, shaped like the layer's scale."""
        return self.unit * self.log_step.exp()

    def real_weight(self) -> torch.Tensor:
        """The weight before rounding."""
        return self.latent * self._spread(self.unit)

    def codes(self) -> torch.Tensor:
        """What the weight is rounded to, in steps."""
        return quantize(self.real_weight(), self._spread(self.scale()), 0, self.low, self.high)

    def weight(self) -> torch.Tensor:
        """The weight of the forward pass."""
        weight = self.real_weight()
        if not self.rounded:
            return weight
        step = self._spread(self.scale())
        return round_with_learned_step(weight, step, self.low, self.high, weight.numel() // self.unit.numel())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return apply_layer(self.operation, self.settings, x, self.weight(), self.bias)


class TrainableQuantizer(nn.Module):
    """An ActivationQuantizer whose step is learned; its zero point stays."""

    unit: torch.Tensor
    low: torch.Tensor

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.bits = quantizer.bits
        self.register_buffer("low", -quantizer.zero_point.to(quantizer.scale))
        self.register_buffer("unit", quantizer.scale.clone())
        self.log_step = nn.Parameter(torch.zeros_like(quantizer.scale))

    def scale(self) -> torch.Tensor:
        """The step, a scalar."""
        return self.unit * self.log_step.exp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return round_with_learned_step(x, self.scale(), self.low, self.low + (2**self.bits - 1), x[0].numel())


def trainable(model: QuantizedModel, float_graph: fx.GraphModule, *, from_float: bool = False) -> fx.GraphModule:
    """A trainable copy of `model` that computes the same; latent weights are the float weights wherever these are rounded
    to the model's codes, and else the nearest values that are.

    from_float: take the float weights and biases as they are instead.
    """
    layers = find_layers(float_graph)
    twin = copy.deepcopy(model)
    twin.add_module(LAYERS, nn.Module())
    for name, layer in sorted(model.layers().items()):  # an outer module before those inside it
        weight = get_tensor(float_graph, layers[name].weight)
        float_bias = layers[name].bias
        bias = get_tensor(float_graph, float_bias) if from_float and float_bias else layer.real_bias()
        module = TrainableLayer(layer, weight, bias)
        if not from_float:
            module.start_at(layer.codes)
        twin.add_submodule(f"{LAYERS}.{name}", module)
    for name, quantizer in model.quantizers().items():
        twin.add_submodule(f"{QUANTIZERS}.{name}", TrainableQuantizer(quantizer))
    return twin.requires_grad_(True)


@torch.no_grad()
def baked(twin: fx.GraphModule, model: QuantizedModel) -> QuantizedModel:
    """A copy of `model` with the codes, steps and biases of its trainable `twin`; biases become integers where inputs are."""
    result = copy.deepcopy(model)
    for name, quantizer in result.quantizers().items():
        quantizer.scale = trainable_quantizer(twin, name).scale()
    sources = result.input_quantizers()
    for name, layer in result.layers().items():
        trained = trainable_layer(twin, name)
        layer.codes, layer.scale = trained.codes().to(torch.int8), trained.scale()
        bias = None if trained.bias is None else trained.bias.detach().clone()
        layer.set_bias(bias, get_tensor(result, f"{sources[name]}.scale") if name in sources else None)
    others = dict(twin.named_parameters())
    for name, parameter in result.named_parameters():
        parameter.copy_(others[name])
    return result


def trainable_layer(twin: fx.GraphModule, name: str) -> TrainableLayer:
    """The layer of that name."""
    module = twin.get_submodule(f"{LAYERS}.{name}")
    assert isinstance(module, TrainableLayer)
    return module


def trainable_quantizer(twin: fx.GraphModule, name: str) -> TrainableQuantizer:
    """The quantizer of that name."""
    module = twin.get_submodule(f"{QUANTIZERS}.{name}")
    assert isinstance(module, TrainableQuantizer)
    return module
