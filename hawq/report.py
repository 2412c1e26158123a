"""What the job found: report.json, report.html, and a table for the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import fx

from hawq import figures
from hawq.allocation import Allocation
from hawq.evaluation import Evaluation
from hawq.graph import Layer, float_weights, get_tensor
from hawq.job import Job
from hawq.model import QuantizedModel
from hawq.packing import packed_size
from hawq.pareto import Point
from hawq.sensitivity import SensitivityTable
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
    files: Mapping[str, int],
    kernels: Mapping[str, int],
    latency: Mapping[str, Mapping[str, float]],
    points: Sequence[Point],
) -> dict[str, Any]:
    """The contents of report.json; docs/report.md describes every field."""
    layers = job.layers
    sizes = {name: packed_size(layer.num_params, allocation.bits[name]) for name, layer in layers.items()}
    quantized, onnx = results["quantized"], results["onnx"]
    predicted = allocation.objective / 2 if table.method == "hessian-trace" else None
    return {
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
            "kernels": dict(kernels),
        },
        "predicted_increase": predicted,
        "measured_increase": quantized.loss - results["float"].loss,
        "average_bits": allocation.average_bits({name: layer.num_params for name, layer in layers.items()}),
        "activation_bits": allocation.activation_bits,
        "gap": allocation.gap,
        "budgets": {name: asdict(use) for name, use in allocation.budgets.items()},
        "weight_bytes": sum(sizes.values()),
        "float_weight_bytes": 4 * sum(layer.num_params for layer in layers.values()),
        "file_bytes": dict(files),
        "latency_ms": {name: dict(times) for name, times in latency.items()},
        "float_weights": float_weights(job.graph, layers),
        "layers": [
            _layer_row(layer, job, traces, table, allocation) | {"weight_bytes": sizes[name]} for name, layer in layers.items()
        ],
        "frontier": [asdict(point) for point in points],
        "seconds": dict(job.stages.seconds),
        "reused_stages": list(job.stages.reused),
    }


def _agreement(one: torch.Tensor, other: torch.Tensor) -> float | None:
    """The share of examples whose largest output is the same; None where outputs are not one score a class."""
    if one.dim() != 2 or one.shape[1] < 2:
        return None
    return float((one.argmax(1) == other.argmax(1)).double().mean())


def _layer_row(layer: Layer, job: Job, traces: LayerReport, table: SensitivityTable, allocation: Allocation) -> dict[str, Any]:
    row = traces[layer.weight]
    bits = allocation.bits[layer.name]
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
        "sensitivity": table[layer.name][bits],
        "sensitivity_stderr": table.stderr[layer.name][bits],
        "tied_with": [name for tie in job.ties if layer.name in tie for name in tie if name != layer.name],
    }


def render_html(report: Mapping[str, Any], graph: fx.GraphModule, model: QuantizedModel) -> str:
    """The report as one self-contained page."""
    weights = {row["name"]: get_tensor(graph, row["weight"]).detach() for row in report["layers"]}
    pictures = {
        "bits": figures.bits(report["layers"]),
        "sensitivity": figures.sensitivity(report["layers"]),
        "frontier": figures.frontier([point | {"label": metric_text(point["metric"])} for point in report["frontier"]], report),
        "weights": figures.weights(weights, model),
    }
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["digits"] = lambda value, places=4: f"{value:.{places}g}"
    environment.globals["metric_change"] = metric_change
    template = environment.from_string((files("hawq") / "report.html.jinja").read_text())
    return template.render(
        report=report,
        pictures=pictures,
        rows=comparison(report),
        fidelity=_fidelity(report),
        left_in_float=_left_in_float(report),
    )


def comparison(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows (what, float, quantized, ratio or difference) that a person compares."""
    plain, small, onnx, bytes_ = report["float"], report["quantized"], report["onnx"], report["file_bytes"]
    rows = [
        ("metric (torch)", metric_text(plain["metric"]), metric_text(small["metric"]), metric_change(plain, small)),
        ("metric (onnxruntime)", "", metric_text(onnx["metric"]), metric_change(plain, onnx)),
        ("loss", f"{plain['loss']:.4f}", f"{small['loss']:.4f}", f"{small['loss'] - plain['loss']:+.4f}"),
        ("average bits of a weight", "32", f"{report['average_bits']:.2f}", ""),
        _bytes_row("weights", report["float_weight_bytes"], report["weight_bytes"]),
        _bytes_row("model.safetensors", bytes_["float.safetensors"], bytes_["model.safetensors"]),
        _bytes_row("model.onnx", bytes_["float.onnx"], bytes_["model.onnx"]),
    ]
    for setting, before in report["latency_ms"]["float"].items():
        threads, batch = setting.split("_")
        after = report["latency_ms"]["quantized"][setting]
        label = f"latency, {threads} thread{'s' * (threads != '1')}, batch {batch}"
        rows.append((label, f"{before:.3f} ms", f"{after:.3f} ms", _ratio(before, after, "faster", "slower")))
    return rows


def metric_text(value: float) -> str:
    """A share in per cent; a metric that is no share as it is."""
    return f"{value:.2%}" if 0 <= value <= 1 else f"{value:.4g}"


def metric_change(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """The difference of two results' metrics, in points where both are shares."""
    difference = after["metric"] - before["metric"]
    shares = all(0 <= result["metric"] <= 1 for result in (before, after))
    return f"{100 * difference:+.2f} points" if shares else f"{difference:+.4g}"


def _ratio(before: float, after: float, better: str, worse: str) -> str:
    return f"{before / after:.2f} x {better}" if before >= after else f"{after / before:.2f} x {worse}"


def _bytes_row(name: str, before: int, after: int) -> tuple[str, str, str, str]:
    return name, f"{before:,} B", f"{after:,} B", _ratio(before, after, "smaller", "larger")


def _fidelity(report: Mapping[str, Any]) -> str:
    """How close the file in onnxruntime is to the quantized torch module."""
    agreement, difference = report["onnx"]["agreement"], report["onnx"]["largest_output_difference"]
    if agreement is None:
        return f"largest difference between outputs in onnxruntime and torch: {difference:.3g}"
    return (
        f"onnxruntime and torch agree on {agreement:.2%} of {report['examples']} examples; "
        f"largest output difference {difference:.3g}"
    )


def _left_in_float(report: Mapping[str, Any]) -> list[str]:
    """What was not quantized, as a line of text, if anything."""
    left: Mapping[str, int] = report["float_weights"]
    if not left:
        return []
    total = sum(left.values()) + sum(row["num_params"] for row in report["layers"])
    names = ", ".join(list(left)[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
    return [f"left in float: {names} ({sum(left.values()) / total:.1%} of all weights)"]


def summary(report: Mapping[str, Any], folder: Path) -> str:
    """The comparison as a table of text, and where the report is."""
    rows = [("", "float", "quantized", ""), *comparison(report)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}".rstrip() for row in rows
    ]
    lines.insert(1, "-" * max(len(line) for line in lines))
    bits = " ".join(str(row["bits"]) for row in report["layers"])
    proof = "proven optimal" if report["gap"] is not None and report["gap"] <= 1e-9 else f"gap {report['gap']:.1e}"
    lines += [
        "",
        f"bits by layer: {bits} ({proof})",
        _fidelity(report),
        *_left_in_float(report),
        f"report: {folder / 'report.html'}",
    ]
    return "\n".join(lines)
