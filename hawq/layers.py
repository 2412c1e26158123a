"""The two modules of a quantized network: a layer with integer weights, and the rounding of an activation."""

from typing import Any

import torch
from torch import fx, nn

from hawq.affine import dequantize_weight, per_channel, round_activation, signed_range, spread
from hawq.graph import EMBEDDING, apply_layer
from hawq.observers import activation_parameters
from hawq.patches import MatrixForm

# Where a quantized graph keeps its layers and quantizers, apart from everything that the network's author named.
LAYERS = "quantized_layers"
QUANTIZERS = "activation_quantizers"

_LARGEST_BIAS_CODE = 2**30  # half of what an int32 holds, the rest is for the sum of products


class QuantizedLayer(nn.Module):
    """A layer whose weight is `codes * scale`, channel by channel.

    codes: int8, shaped like the weight; those of a scale span at most 2^bits values. scale: float32, one for each channel,
    or (channels, groups) for groups of consecutive columns. bias: (channels,), float32 as long as the input is not
    quantized; then int32 in units of `bias_scale` = input scale * scale, as integer kernels add it to their sums.
    operation, settings: the ATen operation and its arguments after (input, weight, bias).
    """

    codes: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None
    bias_scale: torch.Tensor | None

    def __init__(self, operation: Any, settings: tuple[Any, ...], codes: torch.Tensor, scale: torch.Tensor, bits: int) -> None:
        super().__init__()
        self.operation = operation
        self.settings = settings
        self.bits = bits
        self.register_buffer("codes", codes.to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None)
        self.register_buffer("bias_scale", None)

    @property
    def form(self) -> MatrixForm:
        """The layer as a matrix product."""
        return MatrixForm(self.operation, self.settings, self.codes.shape)

    @property
    def channel_dim(self) -> int:
        """Where the output's channels are."""
        return channel_dim(self.operation)

    @property
    def can_have_bias(self) -> bool:
        """Whether the operation adds a bias."""
        return self.operation is not EMBEDDING

    @property
    def has_integer_kernel(self) -> bool:
        """Whether runtimes multiply its codes as they are: not where columns have scales of their own, nor in transposed
        convolutions and embeddings."""
        return self.scale.dim() == 1 and self.operation is not EMBEDDING and not self.form.is_transposed

    @property
    def may_saturate(self) -> bool:
        """Whether codes are so large that x64 processors without VNNI multiply them wrongly, unless they are asked not to."""
        return self.has_integer_kernel and (int(self.codes.min()) < -64 or int(self.codes.max()) > 63)

    def lowest_codes(self) -> torch.Tensor | None:
        """The least of the codes that each scale stands for, shaped like the scale, in int8; None where -2^(bits-1) will do."""
        low, high = signed_range(self.bits)
        if int(self.codes.min()) >= low and int(self.codes.max()) <= high:
            return None
        if self.scale.dim() == 2:
            least = self.codes.unflatten(1, (self.scale.shape[1], -1)).amin(2)
        else:
            least = self.codes.movedim(self.form.channel_axis, 0).flatten(1).amin(1)
        return least.clamp(max=127 - (high - low))

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """A tensor that is shaped like the scale, shaped to multiply the weight."""
        return spread(values, tuple(self.codes.shape), self.form.channel_axis)

    def set_codes(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        """Another rounding of the weight; the bias, still real, stays."""
        assert self.bias_scale is None
        self.codes, self.scale = codes.to(torch.int8), scale

    def real_bias(self) -> torch.Tensor | None:
        """The bias in the output's units."""
        if self.bias is None or self.bias_scale is None:
            return self.bias
        return dequantize_weight(self.bias, self.bias_scale, 0)

    def set_bias(self, bias: torch.Tensor | None, input_scale: torch.Tensor | None) -> None:
        """Store `bias` as it is, or in integers where the input's scale is given and integer kernels exist.

        A channel whose weights are so small that its bias would not fit 32 bits gets a larger weight scale.
        """
        if bias is None or input_scale is None or not self.has_integer_kernel:
            self.bias, self.bias_scale = bias, None
            return
        needed = bias.abs() / (input_scale * _LARGEST_BIAS_CODE)
        widened = torch.maximum(self.scale, needed)
        shrink = per_channel(self.scale / widened, self.codes)
        self.codes = torch.round(self.codes * shrink).to(torch.int8)
        self.scale = widened
        self.bias_scale = input_scale * self.scale
        self.bias = torch.round(bias.double() / self.bias_scale.double()).to(torch.int32)

    def weight(self) -> torch.Tensor:
        """The rounded weight in real numbers."""
        return dequantize_weight(self.codes, self.scale, self.form.channel_axis)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return apply_layer(self.operation, self.settings, x, self.weight(), self.real_bias())

    def extra_repr(self) -> str:
        return f"{self.operation}, {tuple(self.codes.shape)}, bits={self.bits}"


class ActivationQuantizer(nn.Module):
    """Rounds its input to 2^bits values of an unsigned byte, as QuantizeLinear and DequantizeLinear do in a file."""

    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        self.bits = bits
        self.set_range(0.0, 1.0)

    def set_range(self, low: float, high: float) -> None:
        """Cover [low, high], which contains 0."""
        scale, zero_point = activation_parameters(low, high, bits=self.bits)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return round_activation(x, self.scale, self.zero_point, 2**self.bits - 1)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, scale={float(self.scale):.4g}, zero_point={int(self.zero_point)}"


def channel_dim(operation: Any) -> int:
    """Where the channels are in the output of a layer's operation."""
    return -1 if operation in (torch.ops.aten.linear.default, EMBEDDING) else 1


def input_quantizer(graph: fx.GraphModule, layer: fx.Node) -> str | None:
    """The qualified name of the quantizer that a layer's node reads, None where it reads float."""
    source = layer.args[0]
    assert isinstance(source, fx.Node)
    if source.op != "call_module" or not isinstance(graph.get_submodule(str(source.target)), ActivationQuantizer):
        return None
    return str(source.target)
