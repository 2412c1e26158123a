r"""Batch-norm re-estimation: running statistics moved toward those of calibration data, as far as the data support it.

.. math:: \mu' = \mu + a\,(\hat\mu - \mu), \qquad \sigma'^2 = \sigma^2 + a\,(\hat\sigma^2 - \sigma^2)

The measured statistics are averages over all calibration data at once, without momentum; a = 1 is naive re-estimation,
which suffers where the data are few or narrow. By default a is the positive-part James-Stein factor of each norm,
1 - (sampling variance of the measured statistics) / (squared distance from the stored ones), both summed over channels in
units of the stored variance: no distance beyond what chance explains, no move.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from hawq.graph import argument, find_layers, get_tensor, own_tensor, trace

aten = torch.ops.aten
_BATCH_NORM = aten._native_batch_norm_legit_no_training.default


@dataclass(frozen=True)
class Moved:
    """How far the statistics of a norm were moved: a of the mean, a of the variance."""

    mean: float
    variance: float


@torch.no_grad()
def reestimated(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    *,
    rounded: Mapping[str, torch.Tensor] | None = None,
    shrinkage: float | None = None,
) -> tuple[fx.GraphModule, dict[str, Moved]]:
    """The model's graph (see `trace`) with re-estimated batch norms, and how far each was moved, by its mean's name.

    inputs: calibration batches of at least two examples in all. Each norm is measured on what passed the re-estimated norms
    before it. rounded: weights by layer to measure with, while the graph keeps its own; then what rounding changes is
    measured on the same data, and the stored statistics change by it: :math:`\\hat\\mu - \\mu` is the difference of the
    rounded and the float network's means, :math:`\\hat\\sigma^2 / \\sigma^2` the ratio of their variances, so that narrow
    data do not count as a change. shrinkage: 1 - a, None: by the James-Stein factor.

    Raises ValueError for fewer than two examples, statistics that two operations share, activations that are not finite,
    and a rounded weight of a layer that there is not.
    """
    count = sum(len(batch) for batch in inputs)
    if count < 2:
        raise ValueError(f"{count} calibration examples: batch-norm statistics need at least two")
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage={shrinkage}: from 0 (the measured statistics) to 1 (the stored ones)")
    graph = trace(model, inputs[0][:2])
    layers = find_layers(graph)
    unknown = [name for name in rounded or {} if name not in layers]
    if unknown:
        raise ValueError(f"a rounded weight of {unknown[0]!r}, which is no layer; those are {', '.join(layers)}")
    weights = {argument(layers[name].node, 1): weight for name, weight in (rounded or {}).items()}
    changed, plain = _interpreters(graph, inputs), _interpreters(graph, inputs) if rounded else []
    moves: dict[str, Moved] = {}
    for node in graph.graph.nodes:
        if node.op == "output":
            break
        if node.target is _BATCH_NORM:
            old = _Statistics.stored(graph, node)
            found = _Statistics.measured([run.env[node.args[0]] for run in changed])
            if plain:
                base = _Statistics.measured([run.env[node.args[0]] for run in plain])
                found = found.relative_to(base, old)
            for run in plain:  # with the stored statistics: the float network as it is
                run.env[node] = run.run_node(node)
            moves[str(node.args[3].target)] = _move(graph, node, old, found, shrinkage)
            for run in changed:  # which fetched the stored ones at the start
                run.env.update({at: get_tensor(graph, str(at.target)) for at in node.args[3:5]})
            runs = changed
        else:
            runs = [*changed, *plain]
        for run in runs:
            run.env[node] = run.run_node(node)
            if run in changed and node in weights:
                run.env[node] = weights[node]
        for run in (*changed, *plain):
            for dead in run.user_to_last_uses.get(node, []):
                del run.env[dead]
    return graph, moves


@dataclass(frozen=True)
class _Statistics:
    """mean, variance: (channels,), float64. means, variances: the examples' own, (examples, channels)."""

    mean: torch.Tensor
    variance: torch.Tensor
    means: torch.Tensor
    variances: torch.Tensor

    @classmethod
    def stored(cls, graph: fx.GraphModule, node: fx.Node) -> "_Statistics":
        names = [own_tensor(argument(node, position)) for position in (3, 4)]
        if None in names:
            raise ValueError(
                f"the statistics of {node.args[3]} normalise the results of several operations and cannot fit them all: give "
                "each call a batch norm of its own"
            )
        mean, variance = (get_tensor(graph, str(name)).double() for name in names)
        return cls(mean, variance, mean[None], variance[None])

    @classmethod
    def measured(cls, values: list[torch.Tensor]) -> "_Statistics":
        x = torch.cat(values).double()
        if not torch.isfinite(x).all():
            raise ValueError("an input of a batch norm is NaN or Inf on the calibration data")
        x = x.flatten(2) if x.dim() > 2 else x[:, :, None]
        means = x.mean(2)
        mean = means.mean(0)
        positions = x.shape[0] * x.shape[2]
        variances = (x - mean[None, :, None]).square().mean(2) * (positions / (positions - 1))
        return cls(mean, variances.mean(0), means, variances)

    def relative_to(self, base: "_Statistics", stored: "_Statistics") -> "_Statistics":
        """The stored statistics with the change from `base` to these."""
        ratio = stored.variance / base.variance.clamp(min=torch.finfo(torch.float64).tiny)
        ratio = torch.where(base.variance > 0, ratio, 0.0)
        return _Statistics(
            stored.mean + self.mean - base.mean,
            stored.variance + ratio * (self.variance - base.variance),
            self.means - base.means,
            ratio * (self.variances - base.variances),
        )


def _move(graph: fx.GraphModule, node: fx.Node, old: _Statistics, found: _Statistics, shrinkage: float | None) -> Moved:
    unit = old.variance.clamp(min=torch.finfo(torch.float32).tiny)
    shares = []
    for position, before, after, examples, scale in (
        (3, old.mean, found.mean, found.means, unit),
        (4, old.variance, found.variance, found.variances, unit.square()),
    ):
        if shrinkage is None:
            noise = (examples.var(0) / len(examples) / scale).sum()
            distance = ((after - before).square() / scale).sum()
            share = float((1 - noise / distance).clamp(0, 1)) if distance > 0 else 0.0
        else:
            share = 1 - shrinkage
        module, _, name = str(node.args[position].target).rpartition(".")  # type: ignore[union-attr]
        value = before + share * (after - before)
        owner = graph.get_submodule(module)
        owner.register_buffer(name, value.to(getattr(owner, name).dtype))
        shares.append(share)
    return Moved(*shares)


def _interpreters(graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> list[fx.Interpreter]:
    interpreters = [fx.Interpreter(graph) for _ in inputs]
    for interpreter, batch in zip(interpreters, inputs, strict=True):
        interpreter.args_iter = iter(graph.graph.process_inputs(batch))
        interpreter.env = {}
    return interpreters
