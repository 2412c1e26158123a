"""Integer-only inference against onnxruntime's integers and against the emulation in float, code by code.

QLinearConv rescales in float32: q = clip(rint(float32(acc) * m)) + z, m = float32(float32(s_x s_w) / s_y), ties to even.
The dyadic result is the exact one to 31 bits. Where the exact value lies so near to half a code that float32 cannot tell
on which side, the two may differ by one: such a difference is explained. Each tensor is computed from the other's inputs,
so that a difference is counted where it arises and not where it is handed on.
"""

import copy
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from hawq import onnx_export
from hawq.integer.executor import IntegerModel, integer_model
from hawq.integer.observed import ObservedRuntime
from hawq.layers import ActivationQuantizer, QuantizedLayer
from hawq.model import QuantizedModel

_UNIT = 2.0**-24  # the relative error of one float32 operation
_OPERATIONS = 8  # at least the conversions, products and additions of a kernel after its sum
_CHUNK = 64


@dataclass(frozen=True)
class Difference:
    """One quantized tensor here and there, from the same inputs.

    name: the quantizer's node. kernel: what computed it there. codes, different, explained: numbers of codes; explained
    are those whose exact value is within `tolerance` (in codes) of rounding to either. largest: in codes.
    from_tie: how far from a tie, in codes, the exact value of a differing code lies at most.
    """

    name: str
    kernel: str
    codes: int
    different: int
    explained: int
    largest: int
    from_tie: float
    tolerance: float


@dataclass(frozen=True)
class Comparison:
    """Tensors as computed by onnxruntime and by the emulation in torch, and the outputs of undisturbed runs.

    agreement: the share of examples with the same largest output. output_difference: the largest, in the outputs' units.
    as_shipped: whether the session with observed tensors gave the very outputs of the file as it is. not_in_runtime:
    quantizers that the runtime has optimized away.
    """

    runtime: tuple[Difference, ...]
    emulation: tuple[Difference, ...]
    runtime_agreement: float
    emulation_agreement: float
    runtime_output_difference: float
    emulation_output_difference: float
    as_shipped: bool
    not_in_runtime: tuple[str, ...]
    float_operations: tuple[str, ...]

    def __str__(self) -> str:
        lines = []
        for place, rows in (("onnxruntime", self.runtime), ("emulation", self.emulation)):
            codes, different, explained = (
                sum(getattr(row, name) for row in rows) for name in ("codes", "different", "explained")
            )
            largest = max((row.largest for row in rows), default=0)
            ties = max((row.from_tie for row in rows), default=0.0)
            lines.append(
                f"{place}: {different} of {codes} codes differ, by {largest} at most; {explained} explained by ties "
                f"(at most {ties:.1e} codes from one)"
            )
        in_float = ", ".join(self.float_operations) or "none"
        return "\n".join([*lines, f"operations in float: {in_float}"])


@torch.no_grad()
def compare(model: QuantizedModel, inputs: torch.Tensor, *, bits: int = 31, exported: bytes | None = None) -> Comparison:
    """Integer-only inference of `model` on `inputs` (examples, ...), compared with its exported file and its emulation.

    `exported`: the contents of that file; made anew where it is not given.

    Raises ValueError where activations are float, ModuleNotFoundError without the `onnx` extra.
    """
    integer = integer_model(model, bits=bits)
    observed = ObservedRuntime(model, onnx_export.to_bytes(model, model.example) if exported is None else exported)
    exact = _Exact(model)
    parts: dict[str, list[list[Difference]]] = {"runtime": [], "emulation": []}
    results: dict[str, list[torch.Tensor]] = {"integer": [], "runtime": [], "emulation": [], "shipped": []}
    for chunk in inputs.split(_CHUNK):
        seen, emulated = observed(chunk), _Emulation(model)
        results["integer"].append(integer(chunk))
        results["runtime"].append(seen.outputs)
        results["shipped"].append(observed.shipped(chunk))
        results["emulation"].append(emulated.run(chunk))
        kernels = dict.fromkeys(emulated.codes, "emulation")
        parts["runtime"].append(_differences(integer, exact, chunk, seen.codes, observed.kernels))
        parts["emulation"].append(_differences(integer, exact, chunk, emulated.codes, kernels))
    outputs = {name: torch.cat(chunks) for name, chunks in results.items()}

    def agreement(name: str) -> float:
        same = _rows(outputs["integer"]).argmax(1) == _rows(outputs[name]).argmax(1)
        return float(same.float().mean())

    def largest(name: str) -> float:
        return float((outputs["integer"] - outputs[name]).abs().max())

    return Comparison(
        _merged(parts["runtime"]),
        _merged(parts["emulation"]),
        agreement("runtime"),
        agreement("emulation"),
        largest("runtime"),
        largest("emulation"),
        torch.equal(outputs["runtime"], outputs["shipped"]),
        tuple(name for name in exact.quantizers if name not in observed.kernels),
        tuple(integer.float_operations),
    )


class _Emulation(fx.Interpreter):
    """The network as it is, its codes kept."""

    def __init__(self, model: QuantizedModel) -> None:
        super().__init__(model)
        self.codes: dict[str, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if n.op == "call_module" and isinstance(module := self.fetch_attr(str(n.target)), ActivationQuantizer):
            assert isinstance(result, torch.Tensor)
            self.codes[n.name] = (torch.round(result / module.scale) + module.zero_point).to(torch.uint8)
        return result


class _Exact(fx.Interpreter):
    """The network in float64 with the codes of another: what each quantizer was to round, in codes, to some 2^-45."""

    def __init__(self, model: QuantizedModel) -> None:
        double = copy.deepcopy(model).double()
        super().__init__(double)
        self.quantizers: dict[str, fx.Node] = {}
        sources = double.input_quantizers()
        for name, layer in double.layers().items():
            if layer.bias_scale is not None:  # in float32 the product of the scales is rounded, in integers it is not
                layer.bias_scale = double.get_submodule(sources[name]).scale * layer.scale  # type: ignore[operator]
        for node in double.graph.nodes:
            if node.op == "call_module" and isinstance(double.get_submodule(str(node.target)), ActivationQuantizer):
                self.quantizers[node.name] = node
        self.forced: dict[str, torch.Tensor] = {}
        self.values: dict[str, torch.Tensor] = {}
        self.magnitudes: dict[fx.Node, float] = {}  # of layers: the largest sum of their terms' magnitudes
        self.numels: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> object:
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if isinstance(module, QuantizedLayer):
            ((x,), _) = self.fetch_args_kwargs_from_env(n)
            bias = module.real_bias()
            sums = module.operation(x.abs(), module.weight().abs(), None if bias is None else bias.abs(), *module.settings)
            self.magnitudes[n] = float(sums.max())
        if n.name not in self.quantizers:
            result = super().run_node(n)
            if isinstance(result, torch.Tensor):
                self.numels[n] = result.numel()
            return result
        assert isinstance(module, ActivationQuantizer)
        ((x,), _) = self.fetch_args_kwargs_from_env(n)
        codes = x / module.scale
        self.values[n.name], self.numels[n] = codes, codes.numel()
        known = self.forced.get(n.name)
        shifted = codes.round().clamp(*_limits(module)) if known is None else known.double() - module.zero_point
        return shifted * module.scale

    def tolerance(self, name: str, integer_kernel: bool) -> float:
        """By how many codes float32 may miss the exact value before it is rounded.

        (terms + 8) u M: terms of the sum (1 for integer kernels, whose sums are exact), u = 2^-24, M the sum of the
        terms' magnitudes (of the result, for integer kernels of layers).
        """
        node = self.quantizers[name]
        scale = float(self.fetch_attr(str(node.target)).scale)
        source, terms = node.all_input_nodes[0], 1
        while not self._is_known(source) and len(source.all_input_nodes) == 1:
            before = source.all_input_nodes[0]
            terms = max(terms, self.numels.get(before, 0) // self.numels.get(source, 1))
            source = before
        if source in self.magnitudes and integer_kernel:
            return _OPERATIONS * _UNIT * 256
        if source in self.magnitudes:
            terms *= prod(self.fetch_attr(str(source.target)).codes.shape[1:])
            return (terms + _OPERATIONS) * _UNIT * max(256.0, self.magnitudes[source] / scale)
        read = [source] if self._is_known(source) else source.all_input_nodes
        grids = [float(self.fetch_attr(str(n.target)).scale) for n in read if n.name in self.quantizers]
        return (terms + _OPERATIONS) * _UNIT * 256 * max(1.0, sum(grids) / scale)

    def _is_known(self, node: fx.Node) -> bool:
        return node.name in self.quantizers or node in self.magnitudes


def _limits(module: ActivationQuantizer) -> tuple[int, int]:
    return -int(module.zero_point), 255 - int(module.zero_point)


def _differences(
    integer: IntegerModel, exact: _Exact, inputs: torch.Tensor, there: dict[str, torch.Tensor], kernels: dict[str, str]
) -> list[Difference]:
    here = integer.run_forced(inputs, there)
    exact.forced = there
    exact.run(inputs.double())
    result = []
    for name, codes in there.items():
        tolerance = exact.tolerance(name, kernels[name].startswith("QLinear"))
        module = exact.fetch_attr(str(exact.quantizers[name].target))
        apart = (here[name].int() - codes.int()).abs()
        where = apart > 0
        value = exact.values[name].clamp(*_limits(module))[where] + float(module.zero_point)
        excess = [(value - side[where].double()).abs() - 0.5 for side in (here[name], codes)]
        beyond = torch.maximum(*excess)
        found = int(where.sum())
        result.append(
            Difference(
                name,
                kernels[name],
                codes.numel(),
                found,
                int((beyond <= tolerance).sum()),
                int(apart.max()),
                float(beyond.max()) if found else 0.0,
                tolerance,
            )
        )
    return result


def _merged(chunks: list[list[Difference]]) -> tuple[Difference, ...]:
    return tuple(
        Difference(
            rows[0].name,
            rows[0].kernel,
            *(sum(getattr(row, name) for row in rows) for name in ("codes", "different", "explained")),
            *(max(getattr(row, name) for row in rows) for name in ("largest", "from_tie", "tolerance")),
        )
        for rows in zip(*chunks, strict=True)
    )


def _rows(outputs: torch.Tensor) -> torch.Tensor:
    """One row an example."""
    return outputs.reshape(len(outputs), -1)
