"""The pictures of a plan: what it costs against the number of ranks, and its layouts along the layers."""

from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hessian.colours import BLUE, GREEN, GREY, ORANGE
from parallel.planner import Plan, Plans

_COLOURS = {"batch": BLUE, "model": ORANGE, "domain": GREEN}
_HATCHES = {"batch": "", "model": "//", "domain": ".."}
_WIDTH = 7.2  # inches


def cost_by_ranks(plans: Mapping[int, Plans]) -> Figure:
    """Seconds of communication a step against the number of ranks; hollow where the plan could not run."""
    figure = Figure(figsize=(_WIDTH, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for label, colour, style in (("best", GREEN, "-"), ("pure batch", BLUE, "--"), ("pure model", ORANGE, ":")):
        points = [(ranks, getattr(found, label.replace(" ", "_"))) for ranks, found in plans.items()]
        axes.plot([ranks for ranks, _ in points], [one.seconds for _, one in points], style, color=colour, label=label)
        for ranks, one in points:
            axes.plot(ranks, one.seconds, "o", color=colour, markerfacecolor="white" if one.obstacles else colour, markersize=5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("ranks")
    axes.set_ylabel("seconds of communication a step")
    axes.set_xticks(list(plans), [f"{ranks:,}" for ranks in plans], rotation=45)
    axes.plot([], [], "o", color=GREY, markerfacecolor="white", label="cannot run")
    axes.legend(fontsize=8, frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def layouts(plan: Plan) -> Figure:
    """A bar a layer, the first on top: its layout, and the milliseconds of communication that it costs."""
    figure = Figure(figsize=(_WIDTH, 1.2 + 0.2 * len(plan.layers)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(plan.layers))
    bars = axes.barh(
        places,
        [1e3 * layer.seconds for layer in plan.layers],
        color=[_COLOURS[layer.layout] for layer in plan.layers],
        edgecolor="white",
    )
    for bar, layer in zip(bars, plan.layers, strict=True):
        bar.set_hatch(_HATCHES[layer.layout])
    axes.set_yticks(places, [layer.name for layer in plan.layers], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of communication a step")
    used = [layout for layout in _COLOURS if any(layer.layout == layout for layer in plan.layers)]
    marks = [Patch(facecolor=_COLOURS[one], hatch=_HATCHES[one], edgecolor="white", label=f"{one}-parallel") for one in used]
    axes.legend(handles=marks, fontsize=8, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    return figure
