"""Calibration: the float and the quantized network are run side by side, node by node, over all calibration batches.

Each weight is rounded, each bias corrected and each activation's range chosen from inputs that have already passed the
quantized layers before it, in one pass.
"""

from collections.abc import Sequence

import torch
from torch import fx
from tqdm.auto import tqdm

from hawq.graph import get_tensor, input_node
from hawq.layers import LAYERS, ActivationQuantizer, QuantizedLayer, input_quantizer
from hawq.observers import RangeMethod, activation_range
from hawq.rounding import LeastSquares
from hawq.rounding.moments import MomentCollector
from hessian.diagnosis import explained_forward


@torch.no_grad()
def calibrate(
    graph: fx.GraphModule,
    float_graph: fx.GraphModule,
    layer_nodes: dict[str, fx.Node],
    inputs: Sequence[torch.Tensor],
    *,
    rounding: LeastSquares | None,
    range_method: RangeMethod,
    bias_correction: bool,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> None:
    """Set every code, activation range and integer bias of `graph` (see `quantize_model`), first to last.

    `layer_nodes`: the nodes of `float_graph` by layer. rounding: None keeps the codes that the layers have.
    bias_correction: each bias takes up the difference of the mean outputs (Nagel et al. 2019, section 4.2, measured on data).
    """
    for position, batch in enumerate(inputs):
        if not torch.isfinite(batch).all():
            raise ValueError(f"calibration batch {position} holds NaN or Inf: clean the data or drop the examples")
    quantized = _Run(graph, inputs)
    reference = _Run(float_graph, inputs)
    seen: set[str] = set()
    for node in tqdm(quantized.nodes, desc="calibration", unit="node", disable=not progress):
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, ActivationQuantizer) and node.target not in seen:
            seen.add(str(node.target))
            values = quantized.values(node.args[0])
            _check_finite(node, values)
            module.set_range(*activation_range(values, range_method, bits=module.bits))
        if not isinstance(module, QuantizedLayer):
            quantized.step()
            continue
        name = str(node.target).removeprefix(f"{LAYERS}.")
        original = layer_nodes[name]
        if rounding is not None or bias_correction:
            reference.run_up_to(original)
        if rounding is not None and rounding.reads_data(module):
            weight = get_tensor(float_graph, f"{original.args[1].target}")  # type: ignore[union-attr]
            float_inputs = reference.values(input_node(original))
            collector = MomentCollector(module.form, len(inputs), generator)
            for x, rounded in zip(float_inputs, quantized.values(node.args[0]), strict=True):
                collector.add(x, rounded)
            module.set_codes(*rounding(weight, module.bits, module.form, collector.moments()))
        scale = _input_scale(graph, node)
        module.set_bias(module.real_bias(), scale)
        quantized.step()
        if bias_correction and module.can_have_bias:
            _correct_bias(module, quantized, node, reference.values(original), scale)


class _Run:
    """A graph's values at one node after the other, for all batches at once."""

    def __init__(self, graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> None:
        self.nodes = [node for node in graph.graph.nodes if node.op != "output"]
        self.graph, self.inputs = graph, inputs
        self.interpreters = [fx.Interpreter(graph) for _ in inputs]
        self.position = 0
        for interpreter, batch in zip(self.interpreters, inputs, strict=True):
            interpreter.args_iter = iter(graph.graph.process_inputs(batch))
            interpreter.env = {}

    def step(self) -> None:
        """Run the next node; what only the one before it read is forgotten."""
        if self.position:
            done = self.nodes[self.position - 1]
            for interpreter in self.interpreters:
                for dead in interpreter.user_to_last_uses.get(done, []):
                    del interpreter.env[dead]
        node = self.nodes[self.position]
        for number, (interpreter, batch) in enumerate(zip(self.interpreters, self.inputs, strict=True)):
            with explained_forward(self.graph, batch, f" of batch {number}"):
                interpreter.env[node] = interpreter.run_node(node)
        self.position += 1

    def run_up_to(self, node: fx.Node) -> None:
        """Run all nodes up to this one, if that has not been done."""
        while self.position <= self.nodes.index(node):
            self.step()

    def values(self, node: object) -> list[torch.Tensor]:
        """The node's values, batch by batch."""
        return [interpreter.env[node] for interpreter in self.interpreters]  # type: ignore[index]

    def add(self, node: fx.Node, change: torch.Tensor) -> None:
        """Add a tensor to the node's values."""
        for interpreter in self.interpreters:
            interpreter.env[node] = interpreter.env[node] + change


def _correct_bias(
    layer: QuantizedLayer, run: _Run, node: fx.Node, wanted: Sequence[torch.Tensor], scale: torch.Tensor | None
) -> None:
    outputs = run.values(node)
    before = layer.real_bias()
    means = _channel_means(wanted, layer.channel_dim) - _channel_means(outputs, layer.channel_dim)
    old = torch.zeros(len(means)) if before is None else before
    layer.set_bias(old + means.to(old.dtype), scale)
    after = layer.real_bias()
    assert after is not None
    shape = [1] * outputs[0].dim()
    shape[layer.channel_dim] = -1
    run.add(node, (after - old).view(shape))


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
