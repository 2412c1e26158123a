"""The network as a graph of operations: which of them hold quantizable weights, and which share a width."""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from math import prod
from typing import Any

import torch
from torch import fx, nn

from hawq.patches import TRANSPOSED, MatrixForm
from hessian.batch import describe
from hessian.diagnosis import explained_forward, first_line
from hessian.objective import Data, LossFunction, Objective
from hessian.operators.curvature import as_objective

aten = torch.ops.aten

# Operations f(input, weight, bias, ...) whose weights are quantized.
_MULTIPLIES = frozenset(
    (
        aten.conv1d.default,
        aten.conv1d.padding,
        aten.conv2d.default,
        aten.conv2d.padding,
        aten.conv3d.default,
        aten.conv3d.padding,
        aten.linear.default,
        *TRANSPOSED,
    )
)
# Operations that only move or choose values.
MOVING = frozenset(
    (
        aten.clone.default,
        aten.contiguous.default,
        aten.expand.default,
        aten.flatten.using_ints,
        aten.permute.default,
        aten.reshape.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.transpose.int,
        aten.unsqueeze.default,
    )
)
EMBEDDING = aten.embedding.default  # of (weight, indices, ...): a table that is looked up
LAYER_OPERATIONS = _MULTIPLIES | {EMBEDDING}


_TRACED = "hawq.traced"


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

    @property
    def form(self) -> MatrixForm:
        """The layer as a matrix product."""
        weight = weight_node(self.node)
        assert weight is not None
        return MatrixForm(self.node.target, settings(self.node), weight.meta["val"].shape)

    def apply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The layer's operation with another weight and bias."""
        return apply_layer(self.node.target, settings(self.node), x, weight, bias)


def trace(model: nn.Module, example: Any) -> fx.GraphModule:
    """A copy of `model` in evaluation mode as a functional graph of ATen operations, its batch dimension dynamic.

    `example`: an input with a leading batch dimension. Parameters keep their qualified names. Raises ValueError if the
    model's control flow depends on data or its code fixes the batch size. A graph that this function returned is copied.
    """
    if isinstance(model, fx.GraphModule) and model.meta.get(_TRACED):
        return copy.deepcopy(model)
    frozen = copy.deepcopy(model).eval()
    for name, tensor in (*frozen.named_parameters(), *frozen.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(
                f"{name!r} is {tensor.dtype}: quantization starts from float32, so pass model.float() and such data"
            )
    if not len(example):
        raise ValueError(f"the first batch is empty, inputs of shape {tuple(example.shape)}: a network is traced with examples")
    if len(example) < 2:
        example = torch.cat([example, example])  # torch.export takes a batch of one for a constant
    _check_runs(frozen, example)
    batch = torch.export.Dim.DYNAMIC
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch.export about its own insides
            program = torch.export.export(frozen, (example,), dynamic_shapes=({0: batch},))
            program = program.run_decompositions({})
    except Exception as error:  # torch.export raises a wide family of errors, all of them about the model
        raise ValueError(
            f"the model cannot be read as a graph: {first_line(error)}. Its forward must not branch on values of tensors and "
            "must accept any batch size"
        ) from error
    module = program.module(check_guards=False)
    graph = module.graph
    results = graph.output_node().args[0]
    if isinstance(results, tuple) and len(results) == 1 and program.call_spec.out_spec.is_leaf():
        graph.set_codegen(fx.graph.CodeGen())  # one tensor in, one out: no containers to take apart and put together
        graph.output_node().args = results
    for node in graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # kernels chosen at run time may lay out their results differently
    traced = fx.GraphModule(module, graph)
    traced.meta[_TRACED] = True
    return traced


def _check_runs(model: nn.Module, example: torch.Tensor) -> None:
    """ValueError where the model does not take the example, or returns what no graph can: torch.export says less of it."""
    with torch.no_grad(), torch.random.fork_rng(), explained_forward(model, example):
        outputs = model(example)
    if is_dataclass(outputs):
        raise ValueError(
            f"the model's output is {describe(outputs)}, which a graph cannot return: give a model that returns one tensor"
        )


def find_layers(graph: fx.GraphModule) -> dict[str, Layer]:
    """The quantizable layers by name, in the order of the computation.

    A weight that is computed (not stored), or used by more than one operation, stays in float, as does that of a transposed
    convolution whose groups have several inputs and outputs.
    """
    layers: dict[str, Layer] = {}
    batch_size = next((_sizes(node)[0] for node in graph.graph.nodes if node.op == "placeholder"), 1)
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target not in LAYER_OPERATIONS:
            continue
        weight, bias = weight_node(node), bias_node(node)
        stored = own_tensor(weight)
        if weight is None or stored is None or (bias is not None and bias.op != "get_attr"):
            continue
        shape = weight.meta["val"].shape
        if not MatrixForm(node.target, settings(node), shape).has_channel_scales:
            continue
        name = stored.removesuffix(".weight")
        bias_name = str(bias.target) if bias is not None else None
        layers[name] = Layer(name, node, stored, bias_name, prod(shape), _macs(node, shape) // batch_size)
    return layers


def input_node(node: fx.Node) -> fx.Node:
    """What a layer's operation reads."""
    read = node.args[1 if node.target is EMBEDDING else 0]
    assert isinstance(read, fx.Node)
    return read


def weight_node(node: fx.Node) -> fx.Node | None:
    """The weight of a layer's operation."""
    return argument(node, 0 if node.target is EMBEDDING else 1)


def bias_node(node: fx.Node) -> fx.Node | None:
    """The bias of a layer's operation, None where it has none."""
    return None if node.target is EMBEDDING else argument(node, 2)


def settings(node: fx.Node) -> tuple[Any, ...]:
    """The arguments of a layer's operation after its input, weight and bias."""
    return tuple(node.args[2 if node.target is EMBEDDING else 3 :])


def apply_layer(
    operation: Any, settings: tuple[Any, ...], x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """A layer's operation on its input, weight and bias."""
    return operation(weight, x, *settings) if operation is EMBEDDING else operation(x, weight, bias, *settings)


def _macs(node: fx.Node, shape: torch.Size) -> int:
    """Multiply-accumulates for the batch that the graph was traced with."""
    if node.target is EMBEDDING:
        return 0
    if node.target in TRANSPOSED:
        return prod(_sizes(input_node(node))) * prod(shape[1:])
    return prod(_sizes(node)) * prod(shape[1:])


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
        readers.setdefault(input_node(layer.node), []).append(layer.name)
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


def traceable(model: nn.Module | Objective, loss: LossFunction | None, data: Data | None) -> Objective:
    """The Objective that a public function was called with; TypeError where it calls the network in a way of its own."""
    objective = as_objective(model, loss, data)
    if objective.forward is not None:
        raise TypeError("a network is traced from batches of (inputs, targets): pass an Objective without `forward`")
    return objective


def example_inputs(batches: Any) -> torch.Tensor:
    """The inputs of the first batch; TypeError unless they are one tensor."""
    for batch in batches:
        if not isinstance(batch[0], torch.Tensor):
            raise TypeError(f"the network's input is {describe(batch[0])}: only one tensor, examples first, can be traced")
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
