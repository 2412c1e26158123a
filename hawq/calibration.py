"""Calibration: a quantized network is run node by node over all calibration batches at once.

Each activation's range is chosen, and each layer's bias corrected, from inputs that have already passed the quantized
layers before it, in one pass.
"""

from collections.abc import Sequence

import torch
from torch import fx
from tqdm.auto import tqdm

from hawq.graph import get_tensor
from hawq.layers import ActivationQuantizer, QuantizedLayer, input_quantizer
from hawq.observers import RangeMethod, activation_range


@torch.no_grad()
def layer_output_means(graph: fx.GraphModule, names: dict[str, str], inputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The mean of each output channel of the float layers, by layer; `names` maps node names to layers."""
    sums: dict[str, torch.Tensor] = {}
    count = sum(len(batch) for batch in inputs)

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if n.name in names:
                channel_dim = -1 if n.target is torch.ops.aten.linear.default else 1
                share = len(result) / count
                mean = _channel_means([result], channel_dim) * share
                sums[names[n.name]] = sums.get(names[n.name], 0) + mean
            return result

    for batch in inputs:
        Recorder(graph).run(batch)
    return sums


@torch.no_grad()
def calibrate(
    graph: fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    *,
    range_method: RangeMethod,
    float_means: dict[str, torch.Tensor] | None,
    progress: bool = False,
) -> None:
    """Set every activation range and integer bias of `graph` (see `quantize_model`), first to last.

    `float_means`: the float layers' mean outputs; where given, each bias takes up the difference of the means
    (Nagel et al. 2019, section 4.2, measured on data).
    """
    interpreters = [fx.Interpreter(graph) for _ in inputs]
    for interpreter, batch in zip(interpreters, inputs, strict=True):
        interpreter.args_iter = iter(graph.graph.process_inputs(batch))
        interpreter.env = {}
    seen: set[str] = set()
    for node in tqdm(graph.graph.nodes, desc="calibration", unit="node", disable=not progress):
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, ActivationQuantizer) and node.target not in seen:
            seen.add(str(node.target))
            values = [interpreter.env[node.args[0]] for interpreter in interpreters]
            _check_finite(node, values)
            module.set_range(*activation_range(values, range_method))
        if isinstance(module, QuantizedLayer):
            module.set_bias(module.real_bias(), _input_scale(graph, node))
        if node.op == "output":
            break
        for interpreter in interpreters:
            interpreter.env[node] = interpreter.run_node(node)
        if isinstance(module, QuantizedLayer) and float_means is not None:
            _correct_bias(module, node, interpreters, float_means[str(node.target)], _input_scale(graph, node))
        for interpreter in interpreters:
            for dead in interpreter.user_to_last_uses.get(node, []):
                del interpreter.env[dead]


def _correct_bias(
    layer: QuantizedLayer,
    node: fx.Node,
    interpreters: Sequence[fx.Interpreter],
    wanted: torch.Tensor,
    scale: torch.Tensor | None,
) -> None:
    outputs = [interpreter.env[node] for interpreter in interpreters]
    before = layer.real_bias()
    old = torch.zeros_like(layer.scale) if before is None else before
    layer.set_bias(old + (wanted - _channel_means(outputs, layer.channel_dim)).to(old.dtype), scale)
    after = layer.real_bias()
    assert after is not None
    change = after - old
    for interpreter, output in zip(interpreters, outputs, strict=True):
        shape = [1] * output.dim()
        shape[layer.channel_dim] = -1
        interpreter.env[node] = output + change.view(shape)


def _channel_means(outputs: Sequence[torch.Tensor], channel_dim: int) -> torch.Tensor:
    """The mean over everything but the channels, weighted by batch size, in float64."""
    dims = [dim for dim in range(outputs[0].dim()) if dim != channel_dim % outputs[0].dim()]
    total = sum(len(output) for output in outputs)
    means = [output.double().mean(dims) * (len(output) / total) for output in outputs]
    return torch.stack(means).sum(0)


def _input_scale(graph: fx.GraphModule, node: fx.Node) -> torch.Tensor | None:
    quantizer = input_quantizer(graph, node)
    return None if quantizer is None else get_tensor(graph, f"{quantizer}.scale")


def _check_finite(node: fx.Node, values: Sequence[torch.Tensor]) -> None:
    for value in values:
        if not torch.isfinite(value).all():
            raise ValueError(
                f"the activation {node.args[0]} is NaN or Inf on the calibration data: the data or the weights are not finite"
            )
