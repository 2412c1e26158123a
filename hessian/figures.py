"""The pictures of a curvature report."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.special import stdtrit

from hessian.colours import BLUE, GREEN, GREY, ORANGE
from hessian.estimators.eigenpairs import Eigenpairs
from hessian.estimators.spectrum import Spectrum
from hessian.estimators.trace import Trace
from hessian.landscape import Line, Plane
from hessian.results import LayerReport, Quantity

_WIDTH = 7.2  # inches
_TOLERANCE = 1e-3  # of `top_eigenpairs`, relative to the largest eigenvalue
_LABEL_GAP = 0.035  # of the axis, between labels that can be read


def spectrum(result: Spectrum, top: Eigenpairs, outliers: Sequence[float], sigma: float) -> Figure:
    """The density of eigenvalues, once over their values with the outliers marked, once over magnitudes."""
    figure = Figure(figsize=(_WIDTH, 6.6), layout="constrained")
    axes = figure.add_subplot(2, 1, 1)
    result.density.plot(axes, sigma=sigma)
    height = axes.get_ylim()[1]
    axes.set_ylim(top=60 * height)
    for value in top.values.tolist():
        colour = ORANGE if value in outliers else GREY
        axes.plot([value, value], [axes.get_ylim()[0], height], color=colour, linewidth=0.8, linestyle=":")
    low, high = axes.get_xlim()
    free_from = high
    for number, value in enumerate(outliers, start=1):
        if value <= free_from - _LABEL_GAP * (high - low) or number == 1:
            axes.text(
                value, 1.3 * height, f"{number}: {value:.3g}", rotation=90, ha="center", va="bottom", fontsize=8, color=ORANGE
            )
            free_from = value
    end = result.smallest.value
    shows_end = end < free_from - _LABEL_GAP * (high - low)
    if shows_end:
        axes.plot([end, end], [axes.get_ylim()[0], height], color=GREEN, linewidth=1.0)
        axes.text(end, 1.3 * height, f"{end:.2g}", rotation=90, ha="center", va="bottom", fontsize=8, color=GREEN)
    marks = [
        axes.plot([], [], style, color=colour, label=label)[0]
        for style, colour, label, drawn in (
            (":", ORANGE, "eigenvalue apart from the bulk", bool(outliers)),
            (":", GREY, "other eigenvalue computed", len(outliers) < len(top.values)),
            ("-", GREEN, "smallest eigenvalue", shows_end),
        )
        if drawn
    ]
    axes.legend(handles=marks, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    magnitudes = figure.add_subplot(2, 1, 2)
    result.density.plot(magnitudes, scale="log")
    for one in (axes, magnitudes):
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    return figure


def layers(report: LayerReport, shapes: Mapping[str, tuple[int, ...]]) -> Figure | None:
    """Top eigenvalue and trace of every tensor of two or more dimensions, the first layer on top; None without such."""
    matrices = LayerReport({name: row for name, row in report.items() if len(shapes[name]) >= 2})
    if not matrices:
        return None
    quantities: list[Quantity] = ["trace"]
    if all(row.top_eigenvalue is not None for row in matrices.values()):
        quantities.insert(0, "top eigenvalue")
    figure = Figure(figsize=(_WIDTH, 1.1 + 0.2 * len(matrices)), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, len(quantities), sharey=True, squeeze=False)[0], quantities, strict=True):
        matrices.plot(axes, quantity)
        axes.tick_params(axis="x", labelsize=8)
    return figure


def landscape_line(line: Line) -> Figure:
    """The loss along the top eigenvector, and its quadratic model."""
    figure, axes = _figure(3.6)
    line.plot(axes)
    axes.set_xlabel("distance along the top eigenvector")
    axes.grid(alpha=0.3)
    return figure


def landscape_contour(plane: Plane) -> Figure:
    """The loss over the plane of the top two eigenvectors."""
    figure = Figure(figsize=(_WIDTH, 6.0), layout="compressed")  # which knows of axes of a fixed aspect
    axes = plane.plot(figure.add_subplot())
    axes.set_xlabel("distance along the top eigenvector")
    axes.set_ylabel("distance along the second eigenvector")
    return figure


def convergence(top: Eigenpairs, probe_traces: Sequence[float], trace: Trace) -> Figure:
    """How well the results are known: eigenvalues' residuals, and the trace by more and more probes of the density."""
    figure = Figure(figsize=(_WIDTH, 6.0), layout="constrained")
    axes = figure.add_subplot(2, 1, 1)
    scale = float(top.values.abs().max()) or 1.0
    residuals = top.residuals.numpy() / scale
    numbers = np.arange(1, len(residuals) + 1)
    axes.plot(numbers, residuals, "o", color=BLUE, markersize=5)
    axes.vlines(numbers, min(residuals.min(), _TOLERANCE) / 3, residuals, color=BLUE, linewidth=2)
    axes.axhline(_TOLERANCE, color=ORANGE, linestyle="--", label=f"tolerance {_TOLERANCE:g}")
    axes.set_yscale("log")
    axes.set_ylim(bottom=min(residuals.min(), _TOLERANCE) / 3)
    axes.set_xticks(numbers[:: max(1, len(numbers) // 20)])
    axes.set(xlabel="number of the eigenvalue, from the largest", ylabel="residual / largest eigenvalue")
    axes.legend(fontsize=8, loc="center left")
    below = figure.add_subplot(2, 1, 2)
    _running_mean(below, np.array(probe_traces), trace)
    for one in (axes, below):
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    return figure


def _running_mean(axes: Any, samples: np.ndarray, trace: Trace) -> None:
    """The mean of the first n samples with its 95% band by Student's t, beside the trace that the report states."""
    counts = np.arange(1, len(samples) + 1)
    means = samples.cumsum() / counts
    axes.plot(counts, means, "o-", color=BLUE, markersize=4, label="mean over the density's probes")
    if len(samples) > 1:
        errors = np.array([samples[:count].std(ddof=1) / count**0.5 * stdtrit(count - 1, 0.975) for count in counts[1:]])
        axes.fill_between(
            counts[1:], means[1:] - errors, means[1:] + errors, color=BLUE, alpha=0.2, linewidth=0, label="95% band"
        )
    note = "exact" if trace.stderr == 0 else "95% interval shaded"
    axes.axhline(trace.value, color=ORANGE, linestyle="--", label=f"trace in this report ({note})")
    if trace.stderr:
        axes.axhspan(*trace.interval, color=ORANGE, alpha=0.15, linewidth=0)
    seen = np.array([*means, *trace.interval])
    if len(samples) > 2:  # the band of two probes would hide all else
        seen = np.concatenate([seen, means[2:] - errors[1:], means[2:] + errors[1:]])
    margin = 0.1 * float(np.ptp(seen)) or 0.1 * abs(trace.value) or 1.0
    axes.set_ylim(seen.min() - margin, seen.max() + margin)
    axes.set_xticks(counts[:: max(1, len(counts) // 16)])
    axes.set(xlabel="probes", ylabel="trace")
    axes.legend(fontsize=8)


def _figure(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
