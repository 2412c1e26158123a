"""What rounding a layer's weight changes: the weight itself, and the layer's output."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from tqdm.auto import tqdm

from hawq.affine import dequantize_weight
from hawq.graph import EMBEDDING, Layer, get_tensor, input_node
from hawq.layers import channel_dim
from hawq.rounding import round_to_nearest
from hessian.objective import Objective

Rounded = Callable[[str, int], torch.Tensor]  # from a layer's name and bits to its rounded weight, in real numbers


@dataclass(frozen=True)
class RoundingError:
    """Q_b(W) - W of one layer, shaped like its weight, and what is added to its bias (channels,), None for nothing."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def square(self) -> float:
        """The squared Euclidean norm of the weight's error."""
        return float(self.weight.double().square().sum())

    def of_output(self, layer: Layer, inputs: torch.Tensor) -> torch.Tensor:
        """The change of the layer's output, which is linear in weight and bias."""
        return layer.apply(inputs, self.weight, self.bias)


RoundingErrors = Mapping[str, Mapping[int, RoundingError]]


def nearest(graph: fx.GraphModule, layers: Mapping[str, Layer]) -> Rounded:
    """Rounding to nearest, as `hawq.rounding.nearest` does it."""

    def rounded(name: str, bits: int) -> torch.Tensor:
        weight, form = get_tensor(graph, layers[name].weight).detach(), layers[name].form
        return dequantize_weight(*round_to_nearest(weight, bits, form), form.channel_axis)

    return rounded


def weight_differences(
    graph: fx.GraphModule,
    layers: Mapping[str, Layer],
    bits: Sequence[int],
    rounded: Rounded | None = None,
    *,
    progress: bool = False,
) -> dict[str, dict[int, RoundingError]]:
    """Q_b(W) - W of every layer and width; `rounded` gives Q_b(W), by default rounding to nearest.

    ValueError where that has another shape than the weight or is not finite.
    """
    rounded = rounded or nearest(graph, layers)
    differences: dict[str, dict[int, RoundingError]] = {}
    for name, layer in tqdm(layers.items(), desc="rounding errors", unit="layer", disable=not progress):
        weight = get_tensor(graph, layer.weight).detach()
        differences[name] = {}
        for width in bits:
            result = rounded(name, width).detach()
            if result.shape != weight.shape or not torch.isfinite(result).all():
                raise ValueError(
                    f"the rounded weight of layer {name!r} at {width} bits has shape {tuple(result.shape)}, or is not "
                    f"finite; the weight has shape {tuple(weight.shape)}: return that weight in real numbers"
                )
            differences[name][width] = RoundingError(result - weight)
    return differences


def rounding_errors(
    graph: fx.GraphModule, layers: Mapping[str, Layer], bits: Sequence[int], *, progress: bool = False
) -> dict[str, dict[int, float]]:
    """The squared Euclidean norm of each layer's rounding error at each width, rounded to nearest."""
    return squares(weight_differences(graph, layers, bits, progress=progress))


def squares(errors: RoundingErrors) -> dict[str, dict[int, float]]:
    """The squared Euclidean norms."""
    return {name: {bits: error.square for bits, error in row.items()} for name, row in errors.items()}


@torch.no_grad()
def with_bias_correction(
    objective: Objective, layers: Mapping[str, Layer], errors: RoundingErrors, *, progress: bool = False
) -> dict[str, dict[int, RoundingError]]:
    """The errors with biases that take up the change of each output channel's mean over the data (see `hawq.calibration`)."""
    own = objective.gathered(lambda: _own_changes(objective, layers, errors, progress))
    parts = [part for part in own if any(part.counts.values())]

    def corrected(name: str, bits: int, error: RoundingError) -> RoundingError:
        total = torch.stack([part.totals[name, bits] for part in parts]).sum(0)
        return RoundingError(error.weight, -(total / sum(part.counts[name] for part in parts)).to(error.weight))

    return {name: {bits: corrected(name, bits, error) for bits, error in row.items()} for name, row in errors.items()}


@dataclass(frozen=True)
class _Changes:
    """Sums over examples and positions of the changes of outputs, (channels,) by layer and width; how many are summed."""

    totals: dict[tuple[str, int], torch.Tensor]
    counts: dict[str, int]


def _own_changes(objective: Objective, layers: Mapping[str, Layer], errors: RoundingErrors, progress: bool) -> _Changes:
    """Over this process's data."""
    graph = objective.model
    assert isinstance(graph, fx.GraphModule)
    names = {layer.node.name: name for name, layer in layers.items()}
    totals = {(name, bits): torch.zeros(0) for name, row in errors.items() for bits in row}
    counts = dict.fromkeys(names.values(), 0)

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            if n.name in names:
                name, x, rows = names[n.name], self.env[input_node(n)], 1
                if n.target is not EMBEDDING and x.dim() > 1:  # linear in x, row by row: the mean row has the mean change
                    x, rows = x.mean(0, keepdim=True), len(x)
                for bits, error in errors[name].items():
                    change = error.of_output(layers[name], x).double()
                    dims = [dim for dim in range(change.dim()) if dim != channel_dim(n.target) % change.dim()]
                    totals[name, bits] = rows * change.sum(dims) + (totals[name, bits] if counts[name] else 0)
                counts[name] += rows * change.numel() // len(totals[name, bits])
            return super().run_node(n)

    for batch in tqdm(objective.batches(), desc="bias corrections", unit="batch", disable=not progress):
        Recorder(graph).run(batch[0])
    return _Changes(totals, counts)
