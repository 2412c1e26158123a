"""Calibration: a quantized network is run node by node over all calibration batches at once.

Each activation's range is chosen, and each layer's bias corrected, from inputs that have already passed the quantized
layers before it, in one pass.
"""

from collections.abc import Sequence

import torch
from torch import fx
from tqdm.auto import tqdm

from hawq.graph import get_tensor
from hawq.layers import LAYERS, ActivationQuantizer, QuantizedLayer, channel_dim, input_quantizer
from hawq.observers import RangeMethod, activation_range


@torch.no_grad()
def layer_output_means(graph: fx.GraphModule, names: dict[str, str], inputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The mean of each output channel of the float layers, by layer; `names` maps node names to layers."""
    outputs: dict[str, list[tuple[torch.Tensor, int]]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if n.name in names:
                dim = channel_dim(n.target)
                count = result.numel() // result.shape[dim]
                outputs.setdefault(names[n.name], []).append((_channel_means([result], dim), count))
            return result

    for batch in inputs:
        Recorder(graph).run(batch)
    return {
        name: torch.stack([mean * count for mean, count in parts]).sum(0) / sum(count for _, count in parts)
        for name, parts in outputs.items()
    }


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
    for position, batch in enumerate(inputs):
        if not torch.isfinite(batch).all():
            raise ValueError(f"calibration batch {position} holds NaN or Inf: clean the data or drop the examples")
    interpreters = [fx.Interpreter(graph) for _ in inputs]
    for interpreter, batch in zip(interpreters, inputs, strict=True):
        interpreter.args_iter = iter(graph.graph.process_inputs(batch))
        interpreter.env = {}
    seen: set[str] = set()
    nodes = [node for node in graph.graph.nodes if node.op != "output"]
    for node in tqdm(nodes, desc="calibration", unit="node", disable=not progress):
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, ActivationQuantizer) and node.target not in seen:
            seen.add(str(node.target))
            values = [interpreter.env[node.args[0]] for interpreter in interpreters]
            _check_finite(node, values)
            module.set_range(*activation_range(values, range_method))
        if isinstance(module, QuantizedLayer):
            module.set_bias(module.real_bias(), _input_scale(graph, node))
        for interpreter in interpreters:
            interpreter.env[node] = interpreter.run_node(node)
        if isinstance(module, QuantizedLayer) and float_means is not None:
            _correct_bias(
                module, node, interpreters, float_means[str(node.target).removeprefix(f"{LAYERS}.")], _input_scale(graph, node)
            )
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


def _channel_means(outputs: Sequence[torch.Tensor], channels: int) -> torch.Tensor:
    """The mean over every dimension but `channels`, weighted by rows, in float64."""
    dims = [dim for dim in range(outputs[0].dim()) if dim != channels % outputs[0].dim()]
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
