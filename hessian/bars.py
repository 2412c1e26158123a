"""Named rows as bars."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import NullFormatter


def signed_bars(axes: Any, names: Sequence[str], values: Sequence[float], errors: Sequence[float], colour: str) -> None:
    """Horizontal bars of magnitudes on a logarithmic axis, the first on top; negative values are hatched, zeros left out."""
    signed, spread = np.array(values, dtype=float), np.array(errors, dtype=float)
    magnitudes = np.abs(signed)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    rows = np.flatnonzero(magnitudes > 0)
    if not len(rows):
        return
    negative = signed < 0
    for chosen, style in (
        (rows[~negative[rows]], {"color": colour}),
        (rows[negative[rows]], {"color": "white", "hatch": "////"}),
    ):
        if len(chosen):
            axes.barh(chosen, magnitudes[chosen], height=0.7, edgecolor=colour, linewidth=0.6, **style)
    lower = np.minimum(spread, 0.99 * magnitudes)  # a logarithmic axis ends above 0
    shown = rows[spread[rows] > 0.01 * magnitudes[rows]]
    axes.errorbar(
        magnitudes[shown], shown, xerr=[lower[shown], spread[shown]], fmt="none", ecolor="black", elinewidth=0.8, capsize=2
    )
    axes.set_xscale("log")
    low, high = np.log10(magnitudes[rows].min() / 2), np.log10((magnitudes + spread)[rows].max())
    axes.set_xlim(10 ** np.floor(low), 10 ** np.ceil(high))  # whole decades, so that there are ticks to read
    axes.xaxis.set_minor_formatter(NullFormatter())
    if negative.any():
        axes.barh([0], [0], color="white", edgecolor=colour, hatch="////", label="negative")
        axes.legend(fontsize=7)
