"""A float network made into a quantized one."""

import copy
from collections.abc import Mapping

import torch
from torch import fx, nn

from hawq.activations import insert_quantizers
from hawq.affine import check_width
from hawq.allocation import Allocation
from hawq.augmentation import augmented
from hawq.calibration import calibrate
from hawq.fold import folded
from hawq.graph import Layer, example_inputs, find_layers, get_tensor, input_node
from hawq.layers import LAYERS, QUANTIZERS, ActivationQuantizer, QuantizedLayer, input_quantizer
from hawq.observers import RangeMethod
from hawq.rounding import ROUNDINGS, LeastSquares, Rounding, round_to_nearest
from hessian.objective import Data, Objective


class QuantizedModel(fx.GraphModule):
    """A network whose allocated layers are QuantizedLayers; `forward` rounds activations as the exported file does."""

    bits: dict[str, int]
    activation_bits: int | None
    example: torch.Tensor

    @classmethod
    def wrap(
        cls, graph: fx.GraphModule, bits: dict[str, int], activation_bits: int | None, example: torch.Tensor
    ) -> "QuantizedModel":
        model = cls(graph, graph.graph)
        model.bits, model.activation_bits, model.example = bits, activation_bits, example
        return model

    def __deepcopy__(self, memo: dict[int, object]) -> "QuantizedModel":
        copied = super().__deepcopy__(memo)
        return QuantizedModel.wrap(copied, dict(self.bits), self.activation_bits, self.example.clone())

    def layers(self) -> dict[str, QuantizedLayer]:
        """The quantized layers by name, in the order of the computation."""
        found = {name: self.get_submodule(f"{LAYERS}.{name}") for name in self.bits}
        return {name: module for name, module in found.items() if isinstance(module, QuantizedLayer)}

    def quantizers(self) -> dict[str, ActivationQuantizer]:
        """The activation quantizers by the name of the operation whose result they round."""
        children = self.get_submodule(QUANTIZERS).named_children() if self.activation_bits else ()
        return {name: module for name, module in children if isinstance(module, ActivationQuantizer)}

    def input_quantizers(self) -> dict[str, str]:
        """For each quantized layer the qualified name of the quantizer that its input has passed."""
        nodes = {str(node.target): node for node in self.graph.nodes if node.op == "call_module"}
        sources = {name: input_quantizer(self, nodes[f"{LAYERS}.{name}"]) for name in self.bits}
        return {name: source for name, source in sources.items() if source is not None}


def quantize_model(
    model: nn.Module,
    allocation: Allocation,
    calibration: Data,
    *,
    rounding: Rounding = "gptq",
    activations: int | None = 8,
    symmetric: bool = False,
    group_size: int | None = None,
    augment: bool = True,
    bias_correction: bool = True,
    range_method: RangeMethod = "mse",
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> QuantizedModel:
    """A quantized copy of `model`: batch norm folded, weights at the allocation's widths, activations at 8 bits or float.

    calibration: one (inputs, targets) batch or batches, as for `hessian`; targets are not used. rounding: "nearest", or by
    least squares on the outputs ("gptq", "adaround", see `hawq.rounding`), one layer after the other. activations: the
    width of activations that the allocation does not name. symmetric: codes of every channel from -2^(bits-1) on.
    group_size: columns of linear layers and embeddings that share a scale; such layers run in float. augment: disturb
    every fourth of the images that are calibrated on (see `hawq.augmentation`). bias_correction: add to each bias what
    rounding took from the channel's mean output on the calibration data. Layers that the allocation does not name stay in
    float.
    `generator` draws the disturbances and the positions whose inputs are looked at; None takes the global one.

    Raises ValueError for a layer that the model does not have, a width outside 2 to 8, weights that are not finite, and
    activations that are not finite.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding {rounding!r} is none of {', '.join(map(repr, ROUNDINGS))}")
    if activations is not None and not 2 <= activations <= 8:
        raise ValueError(f"activations are quantized to 2 to 8 bits or left in float (None), not to {activations!r}")
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size={group_size}: give a number of columns, or None for one scale a channel")
    batches = list(Objective(model, torch.nn.functional.mse_loss, calibration).batches())
    example = example_inputs(batches)[:2]
    inputs = [batch[0] for batch in batches]
    graph = folded(model, example)
    layers = find_layers(graph)
    _check_allocation(allocation, layers, graph)
    rounded = {}
    for name, bits in allocation.layers.items():
        weight = get_tensor(graph, layers[name].weight)
        rounded[name] = round_to_nearest(weight, bits, layers[name].form, symmetric=symmetric, group_size=group_size)
    quantized = build(graph, rounded, allocation.layers, activations, example, allocation.activations)
    for name in allocation.activations:
        if name not in quantized.quantizers():
            raise ValueError(f"the allocation names the activation {name!r}; those are {', '.join(quantized.quantizers())}")
    calibrate(
        quantized,
        graph,
        {name: layers[name].node for name in allocation.layers},
        augmented(inputs, generator) if augment else inputs,
        rounding=None if rounding == "nearest" else LeastSquares(rounding, symmetric, group_size),
        range_method=range_method,
        bias_correction=bias_correction,
        generator=generator,
        progress=progress,
    )
    return quantized


def build(
    graph: fx.GraphModule,
    rounded: dict[str, tuple[torch.Tensor, torch.Tensor]],
    bits: dict[str, int],
    activation_bits: int | None,
    example: torch.Tensor,
    activation_widths: Mapping[str, int] | None = None,
) -> QuantizedModel:
    """A folded graph with its layers replaced by integer ones and activation quantizers, yet uncalibrated, put in.

    activation_widths: bits of quantizers by name, where they differ from `activation_bits`.
    """
    result = copy.deepcopy(graph)
    layers = {name: layer for name, layer in find_layers(result).items() if name in bits}
    result.add_module(LAYERS, nn.Module())
    for name in sorted(layers):  # an outer module before those inside it
        form = layers[name].form
        module = QuantizedLayer(form.operation, form.settings, *rounded[name], bits[name])
        bias = layers[name].bias
        module.set_bias(get_tensor(result, bias).detach().clone() if bias else None, None)
        result.add_submodule(f"{LAYERS}.{name}", module)
    nodes = []
    for name, layer in layers.items():
        with result.graph.inserting_before(layer.node):
            node = result.graph.call_module(f"{LAYERS}.{name}", (input_node(layer.node),))
        node.meta = dict(layer.node.meta)
        layer.node.replace_all_uses_with(node)
        result.graph.erase_node(layer.node)
        if result.get_submodule(f"{LAYERS}.{name}").can_have_bias:
            nodes.append(node)
    result.graph.eliminate_dead_code()
    if activation_bits is not None:
        insert_quantizers(result, nodes, activation_widths or {}, activation_bits)
    result.graph.lint()
    return QuantizedModel.wrap(result, dict(bits), activation_bits, example)


def _check_allocation(allocation: Allocation, layers: dict[str, Layer], graph: fx.GraphModule) -> None:
    unknown = [name for name in allocation.layers if name not in layers]
    if unknown:
        raise ValueError(f"the allocation names {unknown[0]!r}, which is no quantizable layer; those are {', '.join(layers)}")
    if not allocation.layers:
        raise ValueError("the allocation is empty: there is no layer to quantize")
    for name, bits in allocation.layers.items():
        check_width(bits)
        weight = get_tensor(graph, layers[name].weight)
        if not torch.isfinite(weight).all():
            raise ValueError(f"weight {layers[name].weight!r} holds NaN or Inf")
