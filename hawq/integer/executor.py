"""A quantized network in integers alone: a reference for hardware and kernels without floating point."""

from typing import Any

import torch
from torch import fx, nn

from hawq.graph import get_tensor
from hawq.integer.dyadic import MAX_BITS, Dyadic
from hawq.integer.grid import Compute, Grid, Site
from hawq.integer.modules import layer, quantizer
from hawq.integer.operations import RULES
from hawq.layers import ActivationQuantizer, QuantizedLayer
from hawq.model import QuantizedModel


class IntegerModel(nn.Module):
    """Runs a quantized network's integers: sums of products in int64 (they fit int32), dyadic rescaling between grids.

    float_operations: the operations that run in float, between dequantization and quantization, by node name; the
    network is integer-only if there are none. multipliers: the dyadic numbers of each node that rescales. grids: what
    the integers of a node stand for.
    """

    def __init__(self, model: QuantizedModel, *, bits: int = MAX_BITS) -> None:
        super().__init__()
        self.graph = model.graph
        self.float_operations: dict[str, str] = {}
        self._compute: dict[fx.Node, Compute] = {}
        self._results: dict[fx.Node, Any] = {}
        self._zero_points: dict[str, int] = {}
        site = Site(model, bits)
        with torch.no_grad():
            for node in model.graph.nodes:
                self._compile(site, node, model.example)
        self.grids: dict[str, Grid] = {node.name: grid for node, grid in site.grids.items()}
        self.multipliers: dict[str, tuple[Dyadic, ...]] = site.multipliers
        self._grids = site.grids
        self._readers: dict[fx.Node, list[fx.Node]] = {}
        for node in model.graph.nodes:
            for read in node.all_input_nodes:
                self._readers.setdefault(read, []).append(node)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> Any:
        """The network's outputs, float32: integers until the last operation, then times its scale.

        `x`: a float input, or the uint8 codes of its quantizer.
        """
        return self._run(x, {}, None)

    @torch.no_grad()
    def run_integers(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The integers of every node that has them: uint8 codes of quantizers, else int64 numbers of `grids` units.

        `x`: a float input, or the uint8 codes of its quantizer, from which on nothing is float but `float_operations`.
        """
        kept: dict[str, torch.Tensor] = {}
        self._run(x, {}, kept)
        return kept

    @torch.no_grad()
    def run_forced(self, x: torch.Tensor, codes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As `run_integers`, but what follows a quantizer of `codes` reads the codes (uint8) given there.

        So each operation is seen by itself: a difference from `codes` is its own, not one that it was handed.
        """
        kept: dict[str, torch.Tensor] = {}
        self._run(x, codes, kept)
        return kept

    def codes(self, name: str, integers: torch.Tensor) -> torch.Tensor:
        """Integers of a quantizer's node as uint8 codes, those of any other node as they are."""
        return (integers + self._zero_points[name]).to(torch.uint8) if name in self._zero_points else integers

    def extra_repr(self) -> str:
        return f"float_operations={list(self.float_operations)}"

    def _run(self, x: torch.Tensor, forced: dict[str, torch.Tensor], kept: dict[str, torch.Tensor] | None) -> Any:
        values: dict[fx.Node, Any] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                values[node] = x
            elif node in self._results:
                values[node] = self._results[node]
            elif node.op == "output" and kept is not None:
                return None
            elif node.op == "output":
                return fx.map_arg(node.args[0], lambda read: self._real(read, values))
            else:
                values[node] = self._step(node, values)
            if node in self._grids and isinstance(values[node], torch.Tensor):
                if kept is not None:
                    kept[node.name] = self.codes(node.name, values[node])
                if node.name in forced:
                    values[node] = forced[node.name].long() - self._zero_points[node.name]
            if kept is None:
                for read in node.all_input_nodes:
                    if self._readers[read][-1] is node and read in values:
                        del values[read]
        raise AssertionError("a graph without an output")

    def _step(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        in_float = node.name in self.float_operations
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda read: self._real(read, values) if in_float else values[read])
        return self._compute[node](*args, **kwargs)

    def _real(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        value = values[node]
        if node not in self._grids or not isinstance(value, torch.Tensor):
            return value
        return (value * self._grids[node].scale).float()

    def _compile(self, site: Site, node: fx.Node, example: torch.Tensor) -> None:
        """Choose how a node is computed, by running it on the example."""
        values = site.values
        if node.op == "output":
            return
        if node.op == "placeholder":
            values[node] = example
            return
        if node.op == "get_attr":
            self._results[node] = values[node] = site.constants[node] = get_tensor(site.graph, str(node.target))
            return
        self._grids = site.grids
        module = site.module(node)
        found: tuple[Grid, Compute] | None
        if isinstance(module, ActivationQuantizer):
            self._zero_points[node.name] = int(module.zero_point)
            found = quantizer(site, node)
        elif isinstance(module, QuantizedLayer):
            found = layer(site, node)
        else:
            found = RULES[node.target](site, node) if node.target in RULES else None
        if found is not None:
            self._compute[node] = found[1]
            values[node] = self._step(node, values)
            site.grids[node] = found[0]
            return
        target: Any = node.target
        self._compute[node] = target if module is None else module
        reads = node.all_input_nodes
        self.float_operations[node.name] = str(node.target)
        result = values[node] = self._step(node, values)
        if reads and all(read in site.constants for read in reads) and isinstance(result, torch.Tensor):
            site.constants[node] = self._results[node] = result
            del self.float_operations[node.name]
        elif not any(isinstance(part, torch.Tensor) for part in (result if isinstance(result, tuple | list) else [result])):
            del self.float_operations[node.name]  # a size, not a computation


def integer_model(model: QuantizedModel, *, bits: int = MAX_BITS) -> IntegerModel:
    """The integers of a quantized network: `m / 2^c` with m of `bits` bits takes the place of every float scale.

    HAWQ-V3 (Yao et al. 2021), sections 3.1 and 3.2. Layers add int32 products and bias; a quantizer rescales the sums by
    a dyadic number for each channel; a residual addition rescales both inputs by a multiplier each and rounds once.
    Weights and grids are those of `model` when this is called; the model is not changed.

    Raises ValueError where activations are float, and for `bits` outside 8 to 31.
    """
    if model.activation_bits is None:
        raise ValueError("activations are in float: integers need quantize_model(..., activations=8)")
    if not 8 <= bits <= MAX_BITS:
        raise ValueError(f"multipliers of {bits} bits: dyadic rescaling takes 8 to {MAX_BITS}")
    return IntegerModel(model, bits=bits)
