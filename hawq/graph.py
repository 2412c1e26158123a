"""The network as a graph of operations: which of them hold quantizable weights, and which share a width."""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx, nn

aten = torch.ops.aten

# Operations f(input, weight, bias, ...) whose weights are quantized, output channels first.
LAYER_OPERATIONS = frozenset(
    (
        aten.conv1d.default,
        aten.conv1d.padding,
        aten.conv2d.default,
        aten.conv2d.padding,
        aten.conv3d.default,
        aten.conv3d.padding,
        aten.linear.default,
    )
)


@dataclass(frozen=True)
class Layer:
    """One operation with a weight of its own.

    name: the module's (or, of a weight outside a module, the parameter's) qualified name. weight, bias: qualified
    names of the parameters. macs: multiply-accumulates for one example.
    """

    name: str
    node: fx.Node
    weight: str
    bias: str | None
    num_params: int
    macs: int


def trace(model: nn.Module, example: Any) -> fx.GraphModule:
    """A copy of `model` in evaluation mode as a functional graph of ATen operations, its batch dimension dynamic.

    `example`: an input with a leading batch dimension. Parameters keep their qualified names. Raises ValueError if the
    model's control flow depends on data or its code fixes the batch size.
    """
    frozen = copy.deepcopy(model).eval()
    for name, tensor in (*frozen.named_parameters(), *frozen.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(
                f"{name!r} is {tensor.dtype}: quantization starts from float32, so pass model.float() and such data"
            )
    if example.shape[0] < 2:
        example = torch.cat([example, example])  # torch.export takes a batch of one for a constant
    batch = torch.export.Dim.DYNAMIC
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch.export about its own insides
            program = torch.export.export(frozen, (example,), dynamic_shapes=({0: batch},))
            program = program.run_decompositions({})
    except Exception as error:  # torch.export raises a wide family of errors, all of them about the model
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"the model cannot be read as a graph: {first}. Its forward must not branch on values of tensors and must "
            "accept any batch size"
        ) from error
    module = program.module(check_guards=False)
    graph = module.graph
    results = graph.output_node().args[0]
    if isinstance(results, tuple) and len(results) == 1 and program.call_spec.out_spec.is_leaf():
        graph.set_codegen(fx.graph.CodeGen())  # one tensor in, one out: no containers to take apart and put together
        graph.output_node().args = results
    return fx.GraphModule(module, graph)


def find_layers(graph: fx.GraphModule) -> dict[str, Layer]:
    """The quantizable layers by name, in the order of the computation.

    A weight that is computed (not stored), or used by more than one operation, stays in float.
    """
    layers: dict[str, Layer] = {}
    batch_size = next((_sizes(node)[0] for node in graph.graph.nodes if node.op == "placeholder"), 1)
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target not in LAYER_OPERATIONS:
            continue
        weight, bias = argument(node, 1), argument(node, 2)
        stored = own_tensor(weight)
        if weight is None or stored is None or (bias is not None and bias.op != "get_attr"):
            continue
        name = stored.removesuffix(".weight")
        shape = weight.meta["val"].shape
        macs = prod(_sizes(node)) // batch_size * prod(shape[1:])
        layers[name] = Layer(name, node, stored, str(bias.target) if bias is not None else None, prod(shape), macs)
    return layers


def _sizes(node: fx.Node) -> list[int]:
    """The shape of a node's result for the batch that the graph was traced with."""
    return [size if isinstance(size, int) else int(size.node.hint) for size in node.meta["val"].shape]


def require_layers(layers: Mapping[str, Layer]) -> None:
    """Raise ValueError where there is nothing to quantize."""
    if not layers:
        raise ValueError("the model has no quantizable layer: no linear or convolutional operation with its own weight")


def tied_layers(layers: dict[str, Layer]) -> list[tuple[str, ...]]:
    """Groups of layers that read the same tensor: the first convolution of a residual branch and the projection of its
    shortcut, the query, key and value of attention. HAWQ-V3 gives each group one width (its section 3.4)."""
    readers: dict[fx.Node, list[str]] = {}
    for layer in layers.values():
        readers.setdefault(layer.node.args[0], []).append(layer.name)  # type: ignore[arg-type]
    return [tuple(names) for names in readers.values() if len(names) > 1]


def argument(node: fx.Node, position: int) -> fx.Node | None:
    """The node at that position among a node's arguments, None where there is none."""
    value = node.args[position] if position < len(node.args) else None
    return value if isinstance(value, fx.Node) else None


def own_tensor(node: fx.Node | None) -> str | None:
    """The qualified name of the tensor that `node` fetches for one reader alone, None for anything else."""
    if node is None or node.op != "get_attr" or len(node.users) > 1:
        return None
    return str(node.target)


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads `node`, None if there are more or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def get_tensor(graph: fx.GraphModule, target: str) -> torch.Tensor:
    """The parameter or buffer of that qualified name."""
    module, _, name = target.rpartition(".")
    return getattr(graph.get_submodule(module), name)


def set_parameter(graph: fx.GraphModule, target: str, value: torch.Tensor) -> None:
    """Replace or create the parameter of that qualified name."""
    module, _, name = target.rpartition(".")
    owner = graph.get_submodule(module)
    setattr(owner, name, nn.Parameter(value, requires_grad=True))


def example_inputs(batches: Any) -> torch.Tensor:
    """The inputs of the first batch; TypeError unless they are one tensor."""
    for batch in batches:
        if not isinstance(batch[0], torch.Tensor):
            raise TypeError(
                f"the network's input is a {type(batch[0]).__name__}: only one tensor, examples first, can be traced"
            )
        return batch[0]
    raise ValueError("the data is empty: there is no batch to trace the model with")


def float_weights(graph: fx.GraphModule, layers: Mapping[str, Layer]) -> dict[str, int]:
    """Weights (tensors of two or more dimensions) that no layer quantizes, and their sizes."""
    quantized = {layer.weight for layer in layers.values()}
    named = graph.named_parameters()
    return {name: tensor.numel() for name, tensor in named if tensor.dim() > 1 and name not in quantized}


def unreached_weights(model: nn.Module, graph: fx.GraphModule) -> list[str]:
    """Weights (tensors of two or more dimensions) of `model` that no operation of its graph uses."""
    used = {name for name, _ in graph.named_parameters()}
    return [name for name, parameter in model.named_parameters() if parameter.dim() > 1 and name not in used]
