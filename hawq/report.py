"""What the job found: report.json."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import fx

from hawq.allocation import Allocation
from hawq.budgets import latencies
from hawq.evaluation import Evaluation
from hawq.graph import LAYER_OPERATIONS, Layer, float_weights, get_tensor
from hawq.job import Job
from hawq.kernels import Kernel
from hawq.measurement import Measured
from hawq.packing import packed_size
from hawq.sensitivity import SensitivityTable
from hawq.stability import Stability
from hessian.results import LayerReport

FORMAT = "hessianware.quantization-report"
VERSION = 1


def build_report(
    job: Job,
    *,
    traces: LayerReport,
    table: SensitivityTable,
    allocation: Allocation,
    results: Mapping[str, Evaluation],
    stability: Stability,
    trials: Mapping[str, Any] | None,
    raised: Sequence[Mapping[str, Any]],
    files: Mapping[str, int],
    kernels: Sequence[Kernel],
    may_saturate: Sequence[str],
    integers: Mapping[str, Any] | None,
    latency: Mapping[str, Mapping[str, float]],
    measured: Measured,
) -> dict[str, Any]:
    """The contents of report.json; docs/report.md describes every field."""
    layers = {name: layer for name, layer in job.layers.items() if name in allocation.bits}
    sizes = {name: packed_size(layer.num_params, allocation.bits[name]) for name, layer in layers.items()}
    quantized, onnx = results["quantized"], results["onnx"]
    predicted = None if table.predicts is None else table.predicts * allocation.objective
    report = {
        "format": FORMAT,
        "version": VERSION,
        "task": job.task.name,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(job.options).items()},
        "examples": len(quantized.outputs),
        "float": {"metric": results["float"].metric, "loss": results["float"].loss},
        "quantized": {"metric": quantized.metric, "loss": quantized.loss},
        "onnx": {
            "metric": onnx.metric,
            "loss": onnx.loss,
            "agreement": _agreement(quantized.outputs, onnx.outputs),
            "largest_output_difference": float((quantized.outputs - onnx.outputs).abs().max()),
            "kernels": dict(Counter(kernel.kernel for kernel in kernels).most_common()),
            "may_saturate": list(may_saturate),
        },
        "predicted_increase": predicted,
        "measured_increase": quantized.loss - results["float"].loss,
        "average_bits": allocation.average_bits({name: layer.num_params for name, layer in layers.items()}),
        "activation_bits": allocation.activation_bits,
        "activations": allocation.activations,
        "sensitivity": {"method": table.method, "predicts": table.predicts, "note": table.note},
        "stability": stability.to_dict(),
        "max_drop": trials,
        "raised_layers": list(raised),
        "gap": allocation.gap,
        "budgets": {name: asdict(use) for name, use in allocation.budgets.items()},
        "weight_bytes": sum(sizes.values()),
        "float_weight_bytes": 4 * sum(layer.num_params for layer in layers.values()),
        "file_bytes": dict(files),
        "latency_ms": {name: dict(times) for name, times in latency.items()},
        "latency_prediction": _latency_prediction(job, allocation, latency),
        "float_weights": float_weights(job.graph, layers),
        "float_weight_reasons": {
            name: _why_float(job.graph, name, [str(row["layer"]) for row in raised])
            for name in float_weights(job.graph, layers)
        },
        "kernels": [asdict(kernel) for kernel in kernels],
        "integer_only": integers,
        "layers": [
            _layer_row(layer, job, traces, table, allocation, stability) | {"weight_bytes": sizes[name]}
            for name, layer in layers.items()
        ],
        "frontier": [asdict(point) for point in measured.points],
        "audit": None
        if measured.audit is None or measured.on_evaluation is None
        else measured.audit.to_dict() | {"evaluation": asdict(measured.on_evaluation)},
        "not_measured": dict(measured.skipped),
        "seconds": dict(job.stages.seconds),
        "reused_stages": list(job.stages.reused),
    }
    result: dict[str, Any] = _finite(report)
    return result


def _finite(value: Any) -> Any:
    """The value with null in place of numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _latency_prediction(job: Job, allocation: Allocation, latency: Mapping[str, Mapping[str, float]]) -> dict[str, Any] | None:
    """The sum of the layers' measured times beside that of the network, where the first was a budget."""
    if job.options.max_latency is None or not set(job.layers) <= set(allocation.bits):
        return None
    table = latencies(job.options, job.layers, progress=False)
    found = table.compare(allocation.layers, latency["quantized"])
    return {
        "cpu": table.cpu,
        "threads_batch": f"{table.threads}_{table.batch}",
        "layers_ms": 1e3 * found.layers,
        "layers_ms_stderr": 1e3 * found.stderr,
        "network_ms": 1e3 * found.measured,
        "other_ms": 1e3 * found.other,
    }


def _why_float(graph: fx.GraphModule, name: str, raised: Sequence[str]) -> str:
    """Why a weight is not quantized."""
    if name.removesuffix(".weight") in raised:
        return "rounded to 8 bits, it made the loss infinite"
    readers = [user for node in graph.graph.nodes if node.op == "get_attr" and node.target == name for user in node.users]
    operations = ", ".join(sorted({str(reader.target).rpartition(".")[0] for reader in readers}))
    if len(readers) > 1:
        return f"read by {len(readers)} operations ({operations})"
    if any(reader.target in LAYER_OPERATIONS for reader in readers):
        return f"{operations} is not quantized in this form"
    return f"{operations} is no operation whose weights are quantized"


def _agreement(one: torch.Tensor, other: torch.Tensor) -> float | None:
    """The share of examples whose largest output is the same; None where outputs are not one score a class."""
    if one.dim() != 2 or one.shape[1] < 2:
        return None
    return float((one.argmax(1) == other.argmax(1)).double().mean())


def _layer_row(
    layer: Layer, job: Job, traces: LayerReport, table: SensitivityTable, allocation: Allocation, stability: Stability
) -> dict[str, Any]:
    row = traces[layer.weight]
    bits = allocation.bits[layer.name]
    held = stability.rows.get(layer.name)
    return {
        "name": layer.name,
        "weight": layer.weight,
        "operation": str(layer.node.target).split(".")[1],
        "shape": list(get_tensor(job.graph, layer.weight).shape),
        "num_params": layer.num_params,
        "macs": layer.macs,
        "average_trace": row.trace / layer.num_params,
        "average_trace_stderr": row.trace_stderr / layer.num_params,
        "exact": row.exact,
        "reason": row.reason,
        "bits": bits,
        "sensitivity": table[layer.name].get(bits),  # a width that was not on offer has none
        "sensitivity_stderr": table.stderr[layer.name].get(bits),
        "bits_range": None if held is None else [held.narrowest, held.widest],
        "tied_with": [name for tie in job.ties if layer.name in tie for name in tie if name != layer.name],
    }
