"""Reads the autograd graph: is the network piecewise linear in each weight, and where is the weight used?

Where the outputs are piecewise linear in one parameter tensor, their second derivative in it is zero almost
everywhere, so the parameter's diagonal block of the Hessian *equals* its Gauss-Newton block.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import Node

# fmt: off
# What each autograd node computes, as a function of its differentiable inputs. Anything not listed counts as curved.
_LINEAR = frozenset(
    (
        "AdaptiveAvgPool1D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "Add", "Alias", "AsStrided", "AvgPool2D",
        "AvgPool3D", "Cat", "Clone", "ConstantPadNd", "Copy", "Diagonal", "Expand", "Flip", "Gather", "Index",
        "IndexSelect", "Mean", "MkldnnAdaptiveAvgPool2D", "Narrow", "NativeDropout", "Neg", "Permute", "PixelShuffle",
        "ReflectionPad1D", "ReflectionPad2D", "ReplicationPad1D", "ReplicationPad2D", "Reshape", "ReshapeAlias", "Roll",
        "Select", "Slice", "Split", "SplitWithSizes", "Squeeze", "Stack", "Sub", "Sum", "T", "ToCopy", "Transpose",
        "Unbind", "Unfold", "UnsafeSplit", "UnsafeView", "Unsqueeze", "UpsampleBicubic2D", "UpsampleBilinear2D",
        "UpsampleLinear1D", "UpsampleNearest1D", "UpsampleNearest2D", "View",
    )
)
_PIECEWISE_LINEAR = frozenset(
    (
        "Abs", "AdaptiveMaxPool2D", "Amax", "Amin", "Clamp", "ClampMax", "ClampMin", "Hardtanh", "LeakyRelu",
        "MaskedFill", "Max", "MaxPool2DWithIndices", "MaxPool3DWithIndices", "Maximum", "Min", "Minimum", "Relu",
        "Rrelu", "Threshold", "Where",
    )
)
# Products of several inputs: linear in each, not in two at once; and products with something added in front.
_PRODUCTS = frozenset(("Bmm", "Embedding", "Mm", "Mul", "Mv", "Prelu", "PreluKernel"))
_ADDED_PRODUCTS = frozenset(("Addbmm", "Addmm", "Addmv", "Baddbmm"))
# fmt: on
_WITH_RUNNING_STATISTICS = frozenset(("NativeBatchNorm", "NativeBatchNormLegitNoTraining", "CudnnBatchNorm"))
_TRANSPOSITIONS = frozenset(("T", "Transpose"))


@dataclass(frozen=True)
class WeightUse:
    """The one place where a parameter enters the network: input number `slot` of an autograd node."""

    node: Node
    slot: int

    @property
    def operation(self) -> str:
        return operation(self.node)


@dataclass(frozen=True)
class Certificate:
    """What the autograd graph proves of one parameter.

    use: the one node that it enters; None if there is not exactly one, or none can be proven. absent: whether the outputs
    provably do not depend on it. reason: why the outputs are not proven piecewise linear in it; empty where they are.
    """

    use: WeightUse | None
    absent: bool = False
    reason: str = ""


def operation(node: Node) -> str:
    """An autograd node's operation: "ConvolutionBackward0" is "Convolution"."""
    return re.sub(r"(Backward)?\d*$", "", node.name().split("::")[-1])


def certify(outputs: torch.Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, Certificate]:
    """One certificate for each parameter, from the graph that computed `outputs`.

    A node's dependence on the parameters is a bit mask, propagated from the leaves to the outputs; a node that is not
    linear in the inputs that depend on a parameter breaks that parameter's certificate. A node written in Python
    (custom functions, reentrant checkpointing) can use any parameter unseen and breaks them all.
    """
    names = list(parameters)
    bit = {id(parameter): 1 << index for index, parameter in enumerate(parameters.values())}
    matrices = sum(1 << index for index, parameter in enumerate(parameters.values()) if parameter.dim() == 2)
    curved: dict[str, str] = {}
    depends: dict[Node, int] = {}
    uses: dict[str, list[WeightUse]] = {name: [] for name in names}
    carried: dict[Node, int] = {}  # parameters of which the node is a mere transposition
    opaque = ""
    for node in _inputs_first(outputs.grad_fn):
        if _is_leaf(node):
            depends[node] = carried[node] = bit.get(id(node.variable), 0)  # type: ignore[attr-defined]
            continue
        if _is_opaque(node):
            opaque = operation(node)
        masks = [depends[source] if source is not None else 0 for source, _ in node.next_functions]
        depends[node] = _union(masks)
        for index in _bits(_curved_in(node, masks)):
            curved.setdefault(names[index], f"{operation(node)} is not linear in it")
        for slot, (source, _) in enumerate(node.next_functions):
            whole = carried.get(source, 0) if source is not None else 0
            if operation(node) in _TRANSPOSITIONS and not whole & ~matrices:
                carried[node] = whole
                whole = 0
            for index in _bits(whole):
                uses[names[index]].append(WeightUse(node, slot))
    reached = depends.get(outputs.grad_fn, 0) if outputs.grad_fn is not None else 0
    certificates = {}
    for index, name in enumerate(names):
        if opaque:
            certificates[name] = Certificate(None, reason=f"{opaque}, a function written in Python, may use it unseen")
        elif not reached >> index & 1:
            certificates[name] = Certificate(None, absent=True)
        elif len(uses[name]) != 1:
            certificates[name] = Certificate(None, reason=curved.get(name, f"it enters {len(uses[name])} operations"))
        else:
            certificates[name] = Certificate(uses[name][0], reason=curved.get(name, ""))
    return certificates


def reachable_parameters(result: torch.Tensor, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """The parameters that `result` depends on; all of them where a node written in Python might hide some."""
    nodes = list(_inputs_first(result.grad_fn))
    if any(_is_opaque(node) for node in nodes):
        return list(parameters)
    leaves = {id(node.variable) for node in nodes if _is_leaf(node)}  # type: ignore[attr-defined]
    return [name for name, parameter in parameters.items() if id(parameter) in leaves]


def missing_derivative(results: Sequence[torch.Tensor]) -> str:
    """What in the graph of `results` has no derivative (so that autograd would take it for a constant); empty if nothing."""
    seen: set[Node] = set()
    waiting = [result.grad_fn for result in results if result.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name().endswith(("::Error", "::NotImplemented")):
            return "a function that can be differentiated only once"
        waiting += [source for source, _ in node.next_functions if source is not None]
    return ""


def _is_leaf(node: Node) -> bool:
    return node.name() == "torch::autograd::AccumulateGrad"


def _is_opaque(node: Node) -> bool:
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def _curved_in(node: Node, masks: list[int]) -> int:
    """The parameters in which this node, with its inputs depending on them as in `masks`, is not piecewise linear."""
    kind = operation(node)
    if _is_opaque(node) or _is_complex(node):
        return _union(masks)
    if any(source is not None and _is_complex(source) for source, _ in node.next_functions):
        return _union(masks)  # |z| and its like are not piecewise linear
    if kind in _LINEAR or kind in _PIECEWISE_LINEAR:
        return 0
    if kind in _WITH_RUNNING_STATISTICS and not getattr(node, "_saved_training", False):
        return _shared(masks[:2])  # the shift is added
    if kind == "Convolution":
        return _shared(masks[:2])  # the bias is added
    if kind in _ADDED_PRODUCTS:
        return _shared(masks[1:])
    if kind in _PRODUCTS:
        return _shared(masks)
    if kind == "Div":
        return _union(masks[1:])  # linear in the numerator alone
    return _union(masks)


def _is_complex(node: Node) -> bool:
    return any(result.dtype.is_complex for result in node._input_metadata)


def _inputs_first(last: Node | None) -> Iterator[Node]:
    """Every node of the graph, each after the nodes that it takes its inputs from."""
    done: set[Node] = set()
    stack: list[tuple[Node, bool]] = [] if last is None else [(last, False)]
    while stack:
        node, expanded = stack.pop()
        if node in done:
            continue
        if expanded:
            done.add(node)
            yield node
            continue
        stack.append((node, True))
        stack.extend((source, False) for source, _ in node.next_functions if source is not None and source not in done)


def _union(masks: list[int]) -> int:
    result = 0
    for mask in masks:
        result |= mask
    return result


def _shared(masks: list[int]) -> int:
    """The bits that are set in two or more masks."""
    seen = shared = 0
    for mask in masks:
        shared |= seen & mask
        seen |= mask
    return shared


def _bits(mask: int) -> Iterator[int]:
    index = 0
    while mask:
        if mask & 1:
            yield index
        mask >>= 1
        index += 1
