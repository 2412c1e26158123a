"""The audit: does the predicted loss increase order, and match, what is measured?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from hawq.allocate import Table
from hawq.allocation import Allocation
from hessian import tables
from hessian.colours import BLUE, GREEN, GREY, ORANGE
from hessian.drawn import new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FEWEST = 3  # two points always rank perfectly, or perfectly wrong
_MOST_LABELS = 40


@dataclass(frozen=True)
class Comparison:
    """Predicted against measured increases of the loss, point by point.

    spearman: rank correlation, None below 3 points and where one side is constant. ratio: measured total over predicted
    total, None where the prediction has other units or its total is not positive. not_positive: measured increases of at most
    0, which count in both (quantization may improve the loss by chance, and then ranks below all that hurts).
    """

    labels: tuple[str, ...]
    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    num_points: int
    spearman: float | None
    ratio: float | None
    not_positive: int

    @classmethod
    def of(
        cls, labels: Sequence[str], predicted: Sequence[float], measured: Sequence[float], same_units: bool = True
    ) -> "Comparison":
        """The statistics of the points; ValueError for an increase that is not finite."""
        from scipy.stats import spearmanr  # slow to import, and needed here alone

        for label, *increases in zip(labels, predicted, measured, strict=True):
            if not np.isfinite(increases).all():
                raise ValueError(f"{label}: predicted {increases[0]} and measured {increases[1]}, which is not finite")
        constant = len(set(predicted)) < 2 or len(set(measured)) < 2
        return cls(
            tuple(labels),
            tuple(map(float, predicted)),
            tuple(map(float, measured)),
            num_points=len(labels),
            spearman=None if constant or len(labels) < _FEWEST else float(spearmanr(predicted, measured).statistic),
            ratio=float(sum(measured) / sum(predicted)) if same_units and sum(predicted) > 0 else None,
            not_positive=sum(increase <= 0 for increase in measured),
        )


@dataclass(frozen=True, repr=False)
class Audit(tables.Table):
    """Three comparisons, of which the last two need single layers to be measured.

    frontier: whole allocations. layers: only one row quantized. interaction: as "predicted" the sum of the measured
    increases of an allocation's rows one by one, as "measured" all together; a ratio of 1 means that errors add up.
    """

    frontier: Comparison
    layers: Comparison | None = None
    interaction: Comparison | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def _parts(self) -> dict[str, Comparison]:
        """The comparisons that there are, by what they compare."""
        parts = {
            "allocations": self.frontier,
            "single layers": self.layers,
            "all together over sum of singles": self.interaction,
        }
        return {title: part for title, part in parts.items() if part is not None}

    def header(self) -> list[str]:
        return ["compared", "points", "rank correlation", "measured / predicted", "not positive"]

    def cells(self) -> list[list[str]]:
        return [
            [
                title,
                str(part.num_points),
                *("" if number is None else f"{number:.3g}" for number in (part.spearman, part.ratio)),
                str(part.not_positive),
            ]
            for title, part in self._parts().items()
        ]

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Measured over predicted increases, both logarithmic, with the line where they agree; `ax=None` makes a new figure.

        What is not positive has no place on such an axis: it is drawn hollow at the edge, and counted in the legend. Names that
        would cover others are left out.
        """
        ax = new_axes() if ax is None else ax
        present = self._parts()
        positive = [value for part in present.values() for value in (*part.predicted, *part.measured) if value > 0]
        low, high = (min(positive) / 3, max(positive) * 3) if positive else (0.1, 10.0)
        named: list[np.ndarray] = []
        for (title, part), colour, marker in zip(present.items(), (BLUE, ORANGE, GREEN), "os^", strict=False):
            x, y = np.array(part.predicted, dtype=float), np.array(part.measured, dtype=float)
            shown = (x > 0) & (y > 0)
            rank = "" if part.spearman is None else f", rank correlation {part.spearman:.2f}"
            label = f"{title}: {part.num_points}{rank}"
            ax.scatter(x[shown], y[shown], s=22, color=colour, marker=marker, label=label, alpha=0.8)
            if not shown.all():
                edge = np.maximum(x[~shown], low), np.maximum(y[~shown], low)
                ax.scatter(
                    *edge,
                    s=30,
                    facecolors="none",
                    edgecolors=colour,
                    marker=marker,
                    label=f"of these not positive: {(~shown).sum()}",
                )
            if part.num_points <= _MOST_LABELS:
                for name, across, up in zip(part.labels, np.maximum(x, low), np.maximum(y, low), strict=True):
                    place = np.log([across / low, up / low]) / np.log(high / low)  # shares of the axes
                    if all(abs(place[1] - other[1]) > 0.025 or abs(place[0] - other[0]) > 0.2 for other in named):
                        named.append(place)
                        ax.annotate(name, (across, up), textcoords="offset points", xytext=(4, 3), fontsize=6, color=GREY)
        ax.plot([low, high], [low, high], color=GREY, linewidth=0.8, label="as predicted")
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlim(low, high)
        ax.set_ylim(low, high)
        ax.set_xlabel("predicted increase of the loss")
        ax.set_ylabel("measured increase of the loss")
        ax.legend(fontsize=7)
        return ax


def audit(
    table: Table,
    measured: Mapping[str, tuple[Allocation, float]],
    *,
    measure_layer: Callable[[str, int], float] | None = None,
    predicts_loss: bool = True,
    progress: bool = False,
) -> Audit:
    """Compare half of the table's sums with measured loss increases, {label: (allocation, increase)}, and single rows likewise.

    measure_layer: the increase with only that row of the table quantized, to that width; called once for each width that
    one of the allocations gives a row. predicts_loss: whether half of an entry is a loss increase (HAWQ-V2's table) or
    has other units, where only ranks are compared.
    """
    allocations = [allocation.bits for allocation, _ in measured.values()]
    together = [increase for _, increase in measured.values()]
    predicted = [sum(table[name][width] for name, width in bits.items()) / 2 for bits in allocations]
    frontier = Comparison.of(list(measured), predicted, together, predicts_loss)
    if measure_layer is None:
        return Audit(frontier)
    pairs = [(name, width) for name in table for width in sorted({bits[name] for bits in allocations})]
    bar = tqdm(pairs, desc="audit", unit="layer", disable=not progress)
    single = {pair: float(measure_layer(*pair)) for pair in bar}
    layers = Comparison.of(
        [f"{name} at {width}" for name, width in pairs],
        [table[name][width] / 2 for name, width in pairs],
        list(single.values()),
        predicts_loss,
    )
    added = [sum(single[pair] for pair in bits.items()) for bits in allocations]
    return Audit(frontier, layers, Comparison.of(list(measured), added, together))
