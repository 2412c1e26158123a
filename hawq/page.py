"""The report for people: report.html, and a table for the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import fx

from hawq.graph import get_tensor
from hawq.model import QuantizedModel
from hessian.page import render_page
from hessian.tables import metric_text


def render_html(report: Mapping[str, Any], graph: fx.GraphModule, model: QuantizedModel) -> str:
    """The report as one self-contained page."""
    from hawq import figures  # matplotlib is slow to import, and needed at a job's end alone

    weights = {row["name"]: get_tensor(graph, row["weight"]).detach() for row in report["layers"]}
    pictures = {
        "bits": figures.bits(report["layers"]),
        "sensitivity": figures.sensitivity(report["layers"]),
        "frontier": figures.frontier(report),
        "audit": figures.audit(report["audit"]) if report["audit"] is not None else "",
        "weights": figures.weights(weights, model),
    }
    return render_page(
        "hawq",
        "report.html.jinja",
        metric_change=metric_change,
        metric_text=metric_text,
        report=report,
        pictures=pictures,
        rows=comparison(report),
        fidelity=_fidelity(report),
        left_in_float=_left_in_float(report),
        saturation=_saturation(report),
        flips=[row["name"] for row in report["layers"] if row["bits_range"] and len(set(row["bits_range"])) > 1],
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


def _saturation(report: Mapping[str, Any]) -> list[str]:
    """How the file must be opened where processors have no VNNI, as a line of text, if that matters."""
    layers = len(report["onnx"]["may_saturate"])
    if not layers:
        return []
    have = "layers have" if layers > 1 else "layer has"
    return [
        f"{layers} {have} codes beyond -64 to 63: on x64 processors without VNNI open model.onnx with "
        "session.x64quantprecision=1, as was done here, or leave 8 out of --bits"
    ]


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
    gap = report["gap"]
    proof = "no proof" if gap is None else "proven optimal" if gap <= 1e-9 else f"gap {gap:.1e}"
    lines += [
        "",
        f"bits by layer: {bits} ({proof})",
        _fidelity(report),
        *_left_in_float(report),
        *_saturation(report),
        *(f"not measured: {what}: {why}" for what, why in report["not_measured"].items()),
        f"report: {folder / 'report.html'}",
    ]
    return "\n".join(lines)
