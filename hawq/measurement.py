"""What the job measures beside the result: the frontier, and the audit of what was predicted."""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from hawq import storage
from hawq.allocation import Allocation
from hawq.audit import Audit, Comparison, audit
from hawq.evaluation import evaluate, mean_loss
from hawq.graph import input_node
from hawq.job import Job, logger
from hawq.layers import QUANTIZERS
from hawq.model import QuantizedModel
from hawq.pareto import AVERAGES, FINE_AVERAGES, Frontier, Outcome, Point, frontier
from hawq.sensitivity import SensitivityTable

_SECONDS = 60  # for the frontier, and for single layers, unless all is asked for
_MOST_LAYERS = 64


@dataclass
class Measured:
    """The frontier and the audit; `skipped` says what was not measured and why, by name."""

    points: Frontier = field(default_factory=Frontier)
    audit: Audit | None = None
    on_evaluation: Comparison | None = None
    skipped: dict[str, str] = field(default_factory=dict)


class _Replaced(fx.Interpreter):
    """The float graph with rounded layers in place of some of its own, by node name."""

    def __init__(self, graph: fx.GraphModule, rounded: Mapping[str, nn.Module]) -> None:
        super().__init__(graph)
        self.rounded = rounded

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.rounded:
            return self.rounded[n.name](self.env[input_node(n)])
        return super().run_node(n)


def single_layer(job: Job, model: QuantizedModel, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The float network with one layer's weight and bias as in `model`."""
    return _Replaced(job.graph, {job.layers[name].node.name: model.layers()[name]}).run


def weights_alone(model: QuantizedModel) -> fx.GraphModule:
    """The quantized network with activations in float."""
    result = copy.deepcopy(model)
    for name in model.quantizers():
        result.set_submodule(f"{QUANTIZERS}.{name}", nn.Identity())
    return result


def audited_loss(job: Job, model: QuantizedModel, allocation: Allocation) -> float:
    """The loss that the sensitivities are about: on the calibration data, with float activations unless they have rows."""
    network = model if allocation.activations else weights_alone(model)
    return mean_loss(network, job.task, job.calibration)


def measure(job: Job, table: SensitivityTable, allocation: Allocation, model: QuantizedModel, seconds: float) -> Measured:
    """The frontier and the audit, as far as they take a minute; all of it with `--pareto`.

    model: the chosen allocation's network before fine-tuning. seconds: what one allocation took to be quantized and evaluated.
    """
    found = Measured()
    float_loss = mean_loss(job.graph, job.task, job.calibration)
    averages = FINE_AVERAGES if job.options.pareto else AVERAGES
    widths = sorted({bits for name in job.layers for bits in table[name]})
    number = sum(widths[0] <= average <= widths[-1] for average in averages)
    if _fits(job, found, "frontier", number * seconds):
        found.points = _frontier(job, table, averages, float_loss)
    labels = [f"{point.average_bits:.3g} bits" for point in found.points]
    factor = table.predicts or 0.5
    predicted = [factor * point.objective for point in found.points]
    units = table.predicts is not None
    on_calibration = Comparison.of(labels, predicted, [point.audited_increase for point in found.points], units)
    found.on_evaluation = Comparison.of(labels, predicted, [point.measured_increase for point in found.points], units)
    found.audit = Audit(on_calibration)
    singles = _single_layers(job, table, allocation, model, float_loss, found)
    if singles is not None:
        found.audit = replace(singles, frontier=on_calibration)
    return found


def _fits(job: Job, found: Measured, name: str, seconds: float) -> bool:
    """Whether to measure; where not, that is noted and logged."""
    if job.options.pareto or seconds <= _SECONDS:
        return True
    found.skipped[name] = f"would take about {seconds:,.0f} s, more than {_SECONDS}: --pareto measures it"
    logger.info("%s: %s", name, found.skipped[name])
    return False


def _frontier(job: Job, table: SensitivityTable, averages: Sequence[float], float_loss: float) -> Frontier:
    """The best allocation at each average width, quantized and measured; those of infinite loss left out."""

    def measure(allocation: Allocation) -> Outcome:
        model = job.quantized(allocation)
        result = evaluate(model, job.task, job.evaluation)
        audited = audited_loss(job, model, allocation) - float_loss
        return Outcome(len(storage.to_bytes(model)), result.loss - job.float_result.loss, result.metric, audited)

    def compute() -> list[dict[str, Any]]:
        counts = {name: layer.num_params for name, layer in job.layers.items()}
        points = frontier(table, counts, measure, predicts=table.predicts, ties=job.ties, averages=averages, progress=True)
        finite = [point for point in points if math.isfinite(point.measured_increase + point.audited_increase)]
        if len(finite) < len(points):
            logger.warning("frontier: %d of %d points have an infinite loss", len(points) - len(finite), len(points))
        return [asdict(point) for point in Frontier(finite)]

    inputs = job.key | job.settings() | {"table": table.to_dict(), "averages": averages}
    return Frontier(Point(**point) for point in job.stages.run_json("frontier", inputs, compute))


def _single_layers(
    job: Job, table: SensitivityTable, allocation: Allocation, model: QuantizedModel, float_loss: float, found: Measured
) -> Audit | None:
    """One layer at its chosen width and the others in float, for as many as 64 layers."""
    names = list(model.layers())[:_MOST_LAYERS]
    started = time.perf_counter()
    together = audited_loss(job, model, replace(allocation, bits=allocation.layers)) - float_loss
    seconds = time.perf_counter() - started
    if not math.isfinite(together) or not _fits(job, found, "single layers", len(names) * seconds):
        return None
    if len(names) < len(model.layers()):
        found.skipped["single layers"] = f"only the first {_MOST_LAYERS} of {len(model.layers())} were measured"

    def measure_layer(name: str, bits: int) -> float:
        assert bits == allocation.bits[name]
        return mean_loss(single_layer(job, model, name), job.task, job.calibration) - float_loss

    def compute() -> dict[str, Any]:
        factor = 2 * (table.predicts or 0.5)  # the audit takes half of each entry
        rows = {name: {allocation.bits[name]: factor * table[name][allocation.bits[name]]} for name in names}
        chosen = {"this file": (Allocation({name: allocation.bits[name] for name in names}), together)}
        result = audit(rows, chosen, measure_layer=measure_layer, predicts_loss=table.predicts is not None, progress=True)
        return result.to_dict()

    inputs = job.inputs(allocation) | {"table": table.to_dict()}
    stored = job.stages.run_json("audit", inputs, compute)
    parts: dict[str, Any] = {name: Comparison(**part) for name, part in stored.items()}
    if len(names) < len(model.layers()):
        parts["interaction"] = None  # of some layers with all of them
    return Audit(**parts)


def guilty_layer(job: Job, table: SensitivityTable, allocation: Allocation, model: QuantizedModel) -> str:
    """The layer that, rounded alone, raises the loss on the calibration data most (to infinity, if any does)."""

    def increase(name: str) -> tuple[float, float]:
        alone = mean_loss(single_layer(job, model, name), job.task, job.calibration)
        return (alone if math.isfinite(alone) else math.inf), table[name].get(allocation.bits[name], 0.0)

    return max(model.layers(), key=increase)
