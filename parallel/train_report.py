"""A training run as a page with its curves, and as a few lines of text."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from math import nan
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from hessian.figures import to_svg

_BLUE, _ORANGE, _GREEN = "#0072b2", "#d55e00", "#009e73"  # told apart by every colour vision (Okabe, Ito)


def curves(rows: Sequence[Mapping[str, Any]], rollbacks: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss, metric, learning rate and gradient norm over the steps; dotted lines where the run went back."""
    figure = Figure(figsize=(7.2, 7.2), layout="constrained")
    axes = figure.subplots(4, 1, sharex=True, height_ratios=(3, 2, 1.4, 1.4))
    steps = [row["step"] for row in rows]
    evaluated = [row for row in rows if "evaluation_metric" in row]
    axes[0].plot(steps, [row["loss"] for row in rows], color=_BLUE, linewidth=0.8, alpha=0.8, label="training, a step")
    axes[0].plot(
        [row["step"] for row in evaluated],
        [_number(row["evaluation_loss"]) for row in evaluated],
        color=_ORANGE,
        marker="o",
        markersize=3,
        label="evaluation",
    )
    axes[0].set_ylabel("loss")
    if all(row["loss"] > 0 for row in rows):
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_formatter("{x:.3g}")
        axes[0].yaxis.set_minor_formatter("{x:.3g}" if _narrow(rows) else NullFormatter())
    axes[0].legend(fontsize=8, frameon=False)
    axes[1].plot(
        [row["step"] for row in evaluated],
        [_number(row["evaluation_metric"]) for row in evaluated],
        color=_ORANGE,
        marker="o",
        markersize=3,
    )
    axes[1].set_ylabel("metric")
    axes[2].plot(steps, [row["learning_rate"] for row in rows], color=_GREEN)
    axes[2].set_ylabel("learning rate")
    axes[3].plot(steps, [row["gradient_norm"] for row in rows], color=_BLUE, linewidth=0.8)
    axes[3].set_ylabel("gradient norm")
    axes[3].set_xlabel("step")
    for one in axes:
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
        for rollback in rollbacks:
            one.axvline(rollback["step"], color="#666666", linestyle=":", linewidth=0.8)
    return figure


def _number(value: float | None) -> float:
    """What JSON cannot write, as it was, or nearly so."""
    return nan if value is None else value


def _narrow(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the losses span less than a power of ten, so that their axis has few marks to write at."""
    losses = [row["loss"] for row in rows]
    return max(losses) < 10 * min(losses)


def render_html(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The run as one self-contained page. rows: of metrics.jsonl."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((files("parallel") / "train_report.html.jinja").read_text())
    picture = to_svg(curves(rows, report["rollbacks"])) if rows else None
    return template.render(report=report, picture=picture, facts=facts(report))


def facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The headline, as (name, value)."""
    evaluation = report["evaluation"]
    ranks = report["world_size"]
    found = [
        ("evaluation metric", f"{_number(evaluation['metric']):.4f}"),
        ("evaluation loss", f"{_number(evaluation['loss']):.5g}"),
        ("steps", f"{report['steps']:,} of {report['config']['batch_size']} examples"),
        ("ranks", str(ranks)),
        ("seconds", f"{report['seconds']:.1f}"),
    ]
    if report["curvature_seconds"] > 0.001:
        share = report["curvature_seconds"] / report["seconds"]
        found.append(("of which on curvature", f"{report['curvature_seconds']:.1f} ({share:.1%})"))
    if report["resumed_at"] is not None:
        found.append(("resumed at step", f"{report['resumed_at']:,}"))
    return found


def summary(report: Mapping[str, Any], folder: Path) -> str:
    """The headline as text, and where the results are."""
    rows = facts(report)
    width = max(len(name) for name, _ in rows)
    lines = [str(report["task"]), *(f"{name:{width}}  {value}" for name, value in rows)]
    lines += [f"went back from step {one['step']} to {one['back_to']}: {one['reason']}" for one in report["rollbacks"]]
    lines += [f"report: {folder / 'report.html'}", f"weights: {folder / 'model.safetensors'}"]
    return "\n".join(lines)
