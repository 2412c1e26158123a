r"""HAWQ-V2 for activations: the Hessian's trace in an activation times its mean squared rounding error.

.. math:: \Omega_k(b) = \mathrm{Tr}\big(\nabla_{a_k}^2 \ell\big) \, \frac{1}{n_k} \|Q_b(a_k) - a_k\|_2^2

averaged over examples, with n_k the activation's size in one (Dong et al. 2020, section 3.4). Half of the sum over
activations is the expected increase of the loss, in the units of the weights' table.
"""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import fx, nn
from tqdm.auto import tqdm

from hawq.affine import dequantize, quantize
from hawq.allocation import Allocation
from hawq.fold import folded
from hawq.graph import example_inputs, find_layers, get_tensor, require_layers, traceable
from hawq.layers import LAYERS, QUANTIZERS, QuantizedLayer
from hawq.model import QuantizedModel, quantize_model
from hawq.observers import RangeMethod, activation_parameters, activation_range
from hawq.sensitivity.table import SensitivityTable
from hessian.estimators.activations import activation_report
from hessian.objective import Data, LossFunction, Objective

PREFIX = "activation:"


class _FloatLayer(nn.Module):
    """A quantized layer's operation with a float weight and bias."""

    def __init__(self, layer: QuantizedLayer, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.operation, self.settings = layer.operation, layer.settings
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.operation(x, self.weight, self.bias, *self.settings)


def activation_sensitivity(
    model: nn.Module | Objective,
    loss: LossFunction | None = None,
    data: Data | None = None,
    *,
    bits: Sequence[int] = (4, 8),
    range_method: RangeMethod = "mse",
    rtol: float = 0.05,
    max_probes: int = 128,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> SensitivityTable:
    """The sensitivity of every rounded activation at every width; rows "activation:NAME", NAME as in `model.quantizers()`.

    model: a float network, or a QuantizedModel, whose weights then stay rounded; its activations are taken in float. An
    activation's range is chosen as calibration does it. rtol, max_probes: see `hessian.activation_report`; standard errors
    are those of its traces, and a sampled trace below its own counts as that.

    Raises ValueError for widths outside 2 to 8, a QuantizedModel with float activations, and a model without a layer.
    """
    for width in bits:
        if not isinstance(width, int) or not 2 <= width <= 8:
            raise ValueError(f"a width of {width} bits: activations take whole numbers from 2 to 8")
    given = traceable(model, loss, data)
    graph, names = _observable(given)
    objective = given.of(graph)
    inputs = [batch[0] for batch in objective.whole_batches()]  # of all, since ranges are chosen from all
    found = objective.each(
        lambda named: (named[0], {width: _mean_squared_error(named[1], width, range_method) for width in bits}),
        _activations(graph, names, inputs, progress=progress),
    )
    errors = dict(found)
    report = activation_report(
        objective,
        modules=[f"{QUANTIZERS}.{name}" for name in names],
        rtol=rtol,
        max_probes=max_probes,
        generator=generator,
        progress=progress,
    )
    omega, stderr = {}, {}
    for name in names:
        row = report[f"{QUANTIZERS}.{name}"]
        trace = max(row.trace, row.trace_stderr)
        omega[PREFIX + name] = {width: trace * error for width, error in errors[name].items()}
        stderr[PREFIX + name] = {width: row.trace_stderr * error for width, error in errors[name].items()}
    return SensitivityTable(omega, stderr, "activation-trace", predicts=0.5)


def _observable(objective: Objective) -> tuple[fx.GraphModule, list[str]]:
    """A copy of the network with an identity wherever an activation is rounded for the first time, and their names."""
    model = objective.model
    if isinstance(model, QuantizedModel):
        graph: fx.GraphModule = copy.deepcopy(model)
        names = list(model.quantizers())
        if not names:
            raise ValueError("the quantized model has float activations: quantize it with activations=8")
    else:
        example = example_inputs(objective.whole_batches())[:2]
        floating = folded(model, example)
        layers = find_layers(floating)
        require_layers(layers)
        everything = Allocation(dict.fromkeys(layers, 8))
        few = (example, torch.zeros(len(example)))  # enough to find the places; ranges are chosen from all the data
        quantized = quantize_model(floating, everything, few, activations=8, bias_correction=False, range_method="min-max")
        graph, names = quantized, list(quantized.quantizers())
        for name, module in quantized.layers().items():
            layer = layers[name]
            bias = None if layer.bias is None else get_tensor(floating, layer.bias).detach()
            graph.set_submodule(f"{LAYERS}.{name}", _FloatLayer(module, get_tensor(floating, layer.weight).detach(), bias))
    seen: set[str] = set()
    for node in list(graph.graph.nodes):
        if node.op != "call_module" or not str(node.target).startswith(f"{QUANTIZERS}."):
            continue
        if node.target in seen:  # the same values after moving: rounding them again changes nothing
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        seen.add(str(node.target))
    for name in names:
        graph.set_submodule(f"{QUANTIZERS}.{name}", nn.Identity())
    graph.recompile()
    return graph, names


@torch.no_grad()
def _activations(
    graph: fx.GraphModule, names: Sequence[str], inputs: Sequence[torch.Tensor], *, progress: bool
) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Each activation of all batches, which pass node by node, so that few values are kept."""
    runs = [fx.Interpreter(graph) for _ in inputs]
    for run, batch in zip(runs, inputs, strict=True):
        run.args_iter, run.env = iter(graph.graph.process_inputs(batch)), {}
    nodes = [node for node in graph.graph.nodes if node.op != "output"]
    for node in tqdm(nodes, desc="activation errors", unit="node", disable=not progress):
        for run in runs:
            run.env[node] = run.run_node(node)
        name = str(node.target).removeprefix(f"{QUANTIZERS}.")
        if node.op == "call_module" and name in names and str(node.target).startswith(f"{QUANTIZERS}."):
            yield name, [run.env[node] for run in runs]
        for run in runs:
            for dead in run.user_to_last_uses.get(node, []):
                del run.env[dead]


@torch.no_grad()
def _mean_squared_error(values: Sequence[torch.Tensor], bits: int, method: RangeMethod) -> float:
    scale, zero_point = activation_parameters(*activation_range(values, method, bits=bits), bits=bits)
    total = 0.0
    for value in values:
        rounded = dequantize(quantize(value, scale, zero_point, 0, 2**bits - 1), scale, zero_point)
        total += float((rounded - value).double().square().sum())
    return total / sum(value.numel() for value in values)
