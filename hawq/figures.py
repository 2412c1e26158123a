"""The report's pictures, as SVG text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from hawq.affine import signed_range
from hawq.allocation import Allocation
from hawq.audit import Audit, Comparison
from hawq.model import QuantizedModel
from hawq.pareto import Frontier, Point
from hessian.colours import BLUE, GREY, ORANGE
from hessian.drawing import to_inline_svg

_MOST_HISTOGRAMS = 32
_TITLE = 36  # characters of a name that fit above a histogram
_AUDITED = ("frontier", "layers", "interaction")


def bits(layers: Sequence[Mapping[str, Any]]) -> str:
    """The width of every layer, in the order of the computation."""
    figure, axes = _figure(max(9.0, 0.34 * len(layers)), 3.4)
    Allocation({row["name"]: row["bits"] for row in layers}).plot(axes)
    return to_inline_svg(figure)


def sensitivity(layers: Sequence[Mapping[str, Any]]) -> str:
    """Every layer's average Hessian trace, and its sensitivity at the chosen width; bars of one standard error."""
    figure = Figure(figsize=(max(9.0, 0.34 * len(layers)), 5.2), layout="constrained")
    exact = sum(row["exact"] for row in layers)
    note = "all exact" if exact == len(layers) else f"{exact} of {len(layers)} exact; bars: one standard error"
    quantities = (("average_trace", "average Hessian trace"), ("sensitivity", "sensitivity"))
    top = None
    for position, (field, label) in enumerate(quantities):
        axes = top = figure.add_subplot(2, 1, position + 1, sharex=top)
        values = np.array([row[field] or 0.0 for row in layers])
        errors = np.array([row[f"{field}_stderr"] or 0.0 for row in layers])
        shown = np.flatnonzero(values > 0)
        axes.errorbar(shown, values[shown], yerr=errors[shown], fmt="o", color=BLUE, ecolor=ORANGE, capsize=3)
        if len(shown):
            axes.set_yscale("log")
        axes.set_ylabel(label)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelbottom=position == 1)
        if position == 0:
            axes.set_title(note, fontsize=9, color=GREY, loc="right")
    _name_layers(axes, layers)
    return to_inline_svg(figure)


def frontier(report: Mapping[str, Any]) -> str:
    """Bytes of the packed file against the predicted and the measured increase of the loss; a star for this file."""
    figure, axes = _figure(9.0, 4.2)
    chosen = report["file_bytes"]["model.safetensors"] / 1e3
    axes.plot([chosen], [report["measured_increase"]], "*", color="black", markersize=13, label="this file", zorder=5)
    Frontier(Point(**point) for point in report["frontier"]).plot(axes)
    return to_inline_svg(figure)


def audit(comparisons: Mapping[str, Any]) -> str:
    """Predicted against measured increases, of allocations and of single layers."""
    figure, axes = _figure(9.0, 5.0)
    parts: dict[str, Any] = {name: None if comparisons[name] is None else Comparison(**comparisons[name]) for name in _AUDITED}
    Audit(**parts).plot(axes)
    return to_inline_svg(figure)


def weights(values: Mapping[str, torch.Tensor], model: QuantizedModel) -> str:
    """Histograms of each layer's weights, every channel in units of its own scale, and the range that its codes cover."""
    layers = model.layers()
    names = list(layers)[:_MOST_HISTOGRAMS]
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.6 * columns, 1.6 * rows + 0.4), layout="constrained")
    for position, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, position + 1)
        layer = layers[name]
        qmin, qmax = signed_range(layer.bits)
        lowest = layer.lowest_codes()
        shift = 0 if lowest is None else layer.spread(lowest) - qmin  # to the same codes in every channel
        scaled = (values[name] / layer.spread(layer.scale) - shift).flatten().numpy()
        edge = float(max(np.abs(scaled).max(), -qmin)) * 1.05
        axes.hist(scaled, bins=61, range=(-edge, edge), color=BLUE, histtype="stepfilled")
        axes.axvspan(qmin - 0.5, qmax + 0.5, color=ORANGE, alpha=0.15, linewidth=0)
        outside = float(((scaled < qmin - 0.5) | (scaled > qmax + 0.5)).mean())
        short = name if len(name) <= _TITLE else f"…{name[1 - _TITLE :]}"
        axes.set_title(f"{short}\n{layer.bits} bits, {outside:.1%} clipped", fontsize=7)
        axes.tick_params(labelsize=6)
        axes.set_yticks([])
    if len(layers) > len(names):
        figure.supxlabel(f"weight / scale (first {len(names)} of {len(layers)} layers)", fontsize=8)
    else:
        figure.supxlabel("weight / scale", fontsize=8)
    return to_inline_svg(figure)


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _name_layers(axes: Any, layers: Sequence[Mapping[str, Any]]) -> None:
    axes.set_xticks(range(len(layers)), [row["name"] for row in layers], rotation=60, ha="right", fontsize=7)
    axes.set_xlim(-0.7, len(layers) - 0.3)
