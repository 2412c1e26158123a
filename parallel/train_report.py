"""A training run as a page with its curves, and as a few lines of text."""

from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessian.colours import BLUE, GREEN, GREY, ORANGE
from hessian.page import render_page
from hessian.tables import metric_text
from parallel.train_options import Config

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def curves(rows: Sequence[Mapping[str, Any]], rollbacks: Sequence[Mapping[str, Any]]) -> "Figure":
    """Loss, metric, learning rate and gradient norm over the steps, batch size and sharpness where they are on record; dotted
    lines where the run went back."""
    from matplotlib.figure import Figure  # slow to import, and needed by the first rank alone
    from matplotlib.ticker import NullFormatter

    panels = [("loss", 3.0), ("metric", 2.0), ("learning rate", 1.4), ("gradient norm", 1.4)]
    if len({row["batch_size"] for row in rows}) > 1:
        panels.append(("batch size", 1.4))
    if any("top_eigenvalue" in row for row in rows):
        panels.append(("top eigenvalue", 1.4))
    figure = Figure(figsize=(7.2, 0.92 * sum(height for _, height in panels)), layout="constrained")
    drawn = figure.subplots(len(panels), 1, sharex=True, height_ratios=[height for _, height in panels])
    axes = dict(zip((name for name, _ in panels), drawn, strict=True))
    marked = {"color": ORANGE, "marker": "o", "markersize": 3}
    _plot(axes["loss"], rows, "loss", color=BLUE, linewidth=0.8, alpha=0.8, label="training, a step")
    _plot(axes["loss"], rows, "evaluation_loss", **marked, label="evaluation")
    if all(row["loss"] > 0 for row in rows):
        axes["loss"].set_yscale("log")
        axes["loss"].yaxis.set_major_formatter("{x:.3g}")
        axes["loss"].yaxis.set_minor_formatter("{x:.3g}" if _narrow(rows) else NullFormatter())
    axes["loss"].legend(fontsize=8, frameon=False)
    _plot(axes["metric"], rows, "evaluation_metric", **marked)
    _plot(axes["learning rate"], rows, "learning_rate", color=GREEN)
    _plot(axes["gradient norm"], rows, "gradient_norm", color=BLUE, linewidth=0.8)
    if "batch size" in axes:
        _plot(axes["batch size"], rows, "batch_size", color=GREEN, drawstyle="steps-post")
    if "top eigenvalue" in axes:
        _plot(axes["top eigenvalue"], rows, "top_eigenvalue", color=BLUE, marker="o", markersize=3)
    for name, one in axes.items():
        one.set_ylabel(name)
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
        for rollback in rollbacks:
            one.axvline(rollback["step"], color=GREY, linestyle=":", linewidth=0.8)
    drawn[-1].set_xlabel("step")
    return figure


def _plot(axes: "Axes", rows: Sequence[Mapping[str, Any]], name: str, **style: Any) -> None:
    """The rows that have it, over their steps."""
    having = [row for row in rows if name in row]
    axes.plot([row["step"] for row in having], [_number(row[name]) for row in having], **style)


def _number(value: float | None) -> float:
    """What JSON cannot write, as it was, or nearly so."""
    return nan if value is None else value


def _narrow(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the losses span less than a power of ten, so that their axis has few marks to write at."""
    losses = [row["loss"] for row in rows]
    return max(losses) < 10 * min(losses)


def render_html(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The run as one self-contained page. rows: of metrics.jsonl."""
    from hessian.drawing import to_inline_svg

    picture = to_inline_svg(curves(rows, report["rollbacks"])) if rows else None
    chosen, defaults = settings(report["config"])
    return render_page(
        "parallel",
        "train_report.html.jinja",
        report=report,
        picture=picture,
        facts=facts(report),
        chosen=chosen,
        defaults=defaults,
    )


def settings(config: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """The options that were chosen, and those left as they are by default, as a command line writes them."""
    usual = Config(config["task"]).to_dict()
    parts: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for name, value in config.items():
        if name != "task":
            parts[value == usual[name]]["--" + name.replace("_", "-")] = _option_text(value)
    return parts


def _option_text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "not given", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The headline, as (name, value)."""
    evaluation = report["evaluation"]
    ranks = report["world_size"]
    found = [
        ("evaluation metric", metric_text(_number(evaluation["metric"]))),
        ("evaluation loss", f"{_number(evaluation['loss']):.5g}"),
        ("steps", f"{report['steps']:,}"),
        ("examples", f"{report['examples']:,}"),
        ("ranks", str(ranks)),
        ("seconds", f"{report['seconds']:.1f}"),
    ]
    attacked = report["attacked"]
    if attacked is not None:
        name, moved = attacked["attack"], attacked["perturbation"]
        found.insert(
            1, (f"metric under {name}", f"{metric_text(attacked['metric'])} (inputs moved by {moved:.1%} of their norm)")
        )
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
