"""What the job predicts: the sensitivities, the widths that keep the metric, and how sure both are."""

import time
from dataclasses import asdict
from typing import Any

from hawq.allocate import Budget
from hawq.allocation import Allocation
from hawq.budgets import offered
from hawq.cost.size import packed_bytes
from hawq.evaluation import evaluate
from hawq.job import Job, logger
from hawq.max_drop import smallest_within
from hawq.sensitivity import SensitivityTable, activation_sensitivity, automatic_method, rounding_errors, sensitivity
from hawq.sensitivity.hessian import hessian_trace
from hawq.stability import Stability, stability
from hessian.results import LayerReport

_STABILITY_SECONDS = 30
_MOST_DRAWS, _FEWEST_DRAWS = 64, 8


def sensitivities(job: Job, traces: LayerReport) -> SensitivityTable:
    """What each width offered to each layer, and to each activation where several are offered, costs."""
    options, bits = job.options, job.options.offered_bits
    method = options.sensitivity
    if method == "auto":
        method = automatic_method(job.objective(), job.layers)

    def weights() -> Any:
        if method == "hessian-trace":
            errors = rounding_errors(job.graph, job.layers, bits, progress=job.is_first)
            return hessian_trace(job.layers, errors, traces).to_dict()
        table = sensitivity(
            job.objective(),
            bits=bits,
            method=method,
            bias_correction=options.bias_correction,
            generator=job.generator,
            progress=job.is_first,
        )
        return table.to_dict()

    def activations() -> Any:
        table = activation_sensitivity(
            job.objective(),
            bits=options.activations,
            range_method=options.ranges,  # type: ignore[arg-type]  # one of its choices
            generator=job.generator,
            progress=job.is_first,
        )
        return table.to_dict()

    settings = {"bits": bits, "method": method, "bias_correction": options.bias_correction, "augment": options.augment}
    inputs = job.key | settings
    table = SensitivityTable.from_dict(job.stages.run_json("sensitivity", inputs, weights))
    if len(options.activations) > 1:
        inputs = job.key | {"bits": options.activations, "ranges": options.ranges}
        table |= SensitivityTable.from_dict(job.stages.run_json("activation-sensitivity", inputs, activations))
    if table.note:
        logger.warning("sensitivity: %s", table.note)
    restricted = offered(options, table)
    assert isinstance(restricted, SensitivityTable)
    return restricted


def smallest(job: Job, table: SensitivityTable, budgets: list[Budget]) -> tuple[Allocation, dict[str, Any]]:
    """The smallest allocation whose measured metric falls by at most `--max-drop`, and the trials (without their widths)."""
    assert job.options.max_drop is not None
    sizes = packed_bytes(job.layers, job.options.offered_bits)

    def measure(allocation: Allocation) -> float:
        return evaluate(job.quantized(allocation), job.task, job.evaluation).metric

    def compute() -> dict[str, Any]:
        found = smallest_within(
            table,
            sizes,
            budgets,
            job.ties,
            measure=measure,
            baseline=job.float_result.metric,
            max_drop=job.options.max_drop,  # type: ignore[arg-type]
            progress=True,
        )
        trials = [{name: value for name, value in asdict(trial).items() if name != "allocation"} for trial in found.trials]
        summary = {"max_drop": job.options.max_drop, "threshold": found.threshold, "metric": found.metric, "trials": trials}
        return {"allocation": found.allocation.to_json(), "summary": summary}

    limits = {budget.name: budget.limit for budget in budgets}
    inputs = job.key | job.settings() | {"table": dict(table), "limits": limits, "max_drop": job.options.max_drop}
    stored = job.stages.run_json("max-drop", inputs, compute)
    allocation = Allocation.from_json(stored["allocation"]).with_activations(job.options.activation_bits)
    return allocation, stored["summary"]


def stable(job: Job, table: SensitivityTable, budgets: list[Budget], allocation: Allocation) -> Stability:
    """How the allocation holds within the sensitivities' errors; fewer draws where one takes long."""
    if job.options.max_drop is not None:
        limit = allocation.budgets["size"].used
        sizes = packed_bytes(job.layers, job.options.offered_bits)
        budgets = [*budgets, Budget("size", sizes, limit)]
    started = time.perf_counter()
    job.allocate(table, budgets)
    seconds = time.perf_counter() - started
    samples = max(_FEWEST_DRAWS, min(_MOST_DRAWS, int(_STABILITY_SECONDS / seconds)))
    return stability(table, budgets, job.ties, samples=samples, generator=job.generator, progress=True)
