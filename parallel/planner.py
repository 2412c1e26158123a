"""The cheapest layout of every layer, and of the ranks, by the alpha-beta model: exactly, over all grids and assignments."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hessian.colours import BLUE, GREEN, GREY, ORANGE
from hessian.drawn import new_axes
from hessian.tables import Table
from parallel.communication import AlphaBeta, Collective
from parallel.layer_cost import LAYOUTS, Grid, Layout, memory, obstacle, relayout, traffic
from parallel.layer_shape import LayerShape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"batch": BLUE, "model": ORANGE, "domain": GREEN}
_HATCHES = {"batch": "", "model": "//", "domain": ".."}


@dataclass(frozen=True)
class LayerPlan:
    """One layer: its layout, and what a rank sends for it in a step, the re-layout of its inputs included."""

    name: str
    layout: Layout
    seconds: float
    bytes: float
    collectives: tuple[Collective, ...]


@dataclass(frozen=True, repr=False)
class Plan(Table):
    """A grid and a layout for each layer.

    seconds, bytes: communication of a step, of the rank that sends most. memory: bytes a rank keeps. obstacles: why it cannot
    run; empty where it can.
    """

    grid: Grid
    layers: tuple[LayerPlan, ...]
    memory: float
    obstacles: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return math.fsum(layer.seconds for layer in self.layers)

    @property
    def bytes(self) -> float:
        return math.fsum(layer.bytes for layer in self.layers)

    def header(self) -> list[str]:
        return ["layer", "layout", "milliseconds", "megabytes sent"]

    def cells(self) -> list[list[str]]:
        return [[layer.name, layer.layout, f"{1e3 * layer.seconds:.4g}", f"{layer.bytes / 1e6:.4g}"] for layer in self.layers]

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the milliseconds that each layer communicates, the first on top, by layouts; `ax=None` makes a new figure."""
        ax = new_axes(len(self.layers)) if ax is None else ax
        for layout in _COLOURS:
            places = [place for place, layer in enumerate(self.layers) if layer.layout == layout]
            if places:
                bars = ax.barh(places, [1e3 * self.layers[place].seconds for place in places], edgecolor="white")
                for bar in bars:
                    bar.set(facecolor=_COLOURS[layout], hatch=_HATCHES[layout])
                bars.set_label(f"{layout}-parallel")
        ax.set_yticks(range(len(self.layers)), [layer.name for layer in self.layers], fontsize=8)
        ax.set_ylim(len(self.layers) - 0.4, -0.6)
        ax.set_xlabel("communication a step (ms)")
        ax.legend(fontsize=8, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        return ax

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "grid": [self.grid.model, self.grid.batch],
            "seconds": self.seconds,
            "bytes": self.bytes,
            "memory": self.memory,
            "obstacles": list(self.obstacles),
            "layers": [
                {"name": layer.name, "layout": layer.layout, "seconds": layer.seconds, "bytes": layer.bytes}
                for layer in self.layers
            ],
        }


@dataclass(frozen=True, repr=False)
class Plans(Table):
    """The best plan, and the two that everybody would try: all ranks share the batch, or all share every layer."""

    best: Plan
    pure_batch: Plan
    pure_model: Plan

    def named(self) -> dict[str, Plan]:
        """The plans by what they are."""
        return {"best": self.best, "all ranks share the batch": self.pure_batch, "all share every layer": self.pure_model}

    def header(self) -> list[str]:
        return ["plan", "model x batch", "milliseconds", "megabytes sent", "megabytes kept", "cannot run"]

    def cells(self) -> list[list[str]]:
        return [
            [
                name,
                f"{plan.grid.model} x {plan.grid.batch}",
                f"{1e3 * plan.seconds:.4g}",
                f"{plan.bytes / 1e6:.4g}",
                f"{plan.memory / 1e6:.4g}",
                "; ".join(plan.obstacles),
            ]
            for name, plan in self.named().items()
        ]


def plot_by_ranks(plans: Mapping[int, Plans], ax: "Axes | None" = None) -> "Axes":
    """Draw the seconds that a step communicates over the number of ranks, {ranks: plans}; hollow where a plan cannot run.

    `ax=None` makes a new figure. ValueError where there are no plans.
    """
    if not plans:
        raise ValueError("there are no plans to draw: give {ranks: parallel.best_plans(...)}")
    ax = new_axes() if ax is None else ax
    styles = ((GREEN, "-"), (BLUE, "--"), (ORANGE, ":"))
    by_name = {name: [found.named()[name] for found in plans.values()] for name in next(iter(plans.values())).named()}
    for (name, row), (colour, style) in zip(by_name.items(), styles, strict=True):
        ax.plot(list(plans), [one.seconds for one in row], style, color=colour, label=name)
        for ranks, one in zip(plans, row, strict=True):
            ax.plot(ranks, one.seconds, "o", color=colour, markerfacecolor="white" if one.obstacles else colour, markersize=5)
    if any(one.obstacles for row in by_name.values() for one in row):
        ax.plot([], [], "o", color=GREY, markerfacecolor="white", label="cannot run")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(list(plans), [f"{ranks:,}" for ranks in plans], rotation=45)
    ax.set(xlabel="ranks", ylabel="communication a step (s)")
    ax.legend(fontsize=8, frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return ax


@dataclass(frozen=True)
class _Partial:
    """Layouts of the first layers, and what they cost."""

    seconds: float
    memory: float
    layouts: tuple[Layout, ...]


def best_plans(
    layers: Sequence[LayerShape], world_size: int, batch_size: int, network: AlphaBeta, *, most_memory: float | None = None
) -> Plans:
    """The plans for `world_size` ranks and `batch_size` examples a step.

    layers: in the order in which they compute, each the only reader of the one before (see `describe`). most_memory: bytes
    that a rank may keep. Time is that of communication, of which nothing overlaps; computation is taken to be the same in every
    plan (norms, pools and embeddings, which every rank of a model-parallel group computes, are cheap). Exact: all grids
    Pr x Pc = `world_size` are tried, on each a dynamic program over the layers keeps every assignment that no other beats in
    both seconds and bytes.

    Raises ValueError where no plan can run, saying what is in the way.

    >>> from parallel import AlphaBeta, alexnet, best_plans
    >>> best = best_plans(alexnet(), world_size=512, batch_size=2048, network=AlphaBeta(2e-6, 1 / 6e9)).best
    >>> best.grid, [layer.layout for layer in best.layers[-3:]]
    (Grid(model=32, batch=16), ['model', 'model', 'model'])
    """
    for name, value in (("world_size", world_size), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value}: give at least 1")
    if not layers:
        raise ValueError("there are no layers to plan for")
    grids = [Grid(parts, world_size // parts) for parts in range(1, world_size + 1) if world_size % parts == 0]
    found = [_best_on(layers, grid, batch_size, network, most_memory) for grid in grids]
    best = min((one for one in found if one is not None), key=lambda one: (one.seconds, one.grid.model), default=None)
    pure = (
        assignment(layers, ["batch"] * len(layers), Grid(1, world_size), batch_size, network),
        assignment(layers, ["model"] * len(layers), Grid(world_size, 1), batch_size, network),
    )
    if best is None:
        why = "; ".join(dict.fromkeys(text for one in pure for text in one.obstacles))
        if most_memory is not None and any(_best_on(layers, grid, batch_size, network, None) for grid in grids):
            least = min(_least_memory(layers, grid, batch_size) for grid in grids)
            why = f"every plan needs {least:,.0f} bytes a rank or more, and {most_memory:,.0f} are allowed"
        raise ValueError(f"no layout runs on {world_size} ranks with a batch of {batch_size}: {why}")
    return Plans(best, *pure)


def assignment(
    layers: Sequence[LayerShape], layouts: Sequence[Layout], grid: Grid, batch_size: int, network: AlphaBeta
) -> Plan:
    """The plan with these layouts, whether it can run or not."""
    rows = []
    for position, (layer, layout) in enumerate(zip(layers, layouts, strict=True)):
        before = layouts[position - 1] if position else None
        sent = tuple(_collectives(layer, before, layout, grid, batch_size))
        seconds = math.fsum(network.seconds(one) for one in sent)
        rows.append(LayerPlan(layer.name, layout, seconds, math.fsum(one.sent for one in sent), sent))
    kept = math.fsum(memory(layer, layout, grid, batch_size) for layer, layout in zip(layers, layouts, strict=True))
    found = (obstacle(layer, layout, grid, batch_size) for layer, layout in zip(layers, layouts, strict=True))
    return Plan(grid, tuple(rows), kept, tuple(dict.fromkeys(filter(None, found))))


def _collectives(layer: LayerShape, before: Layout | None, layout: Layout, grid: Grid, batch_size: int) -> list[Collective]:
    """The layer's own, and those of the re-layout of its inputs; `before` is None for the first layer."""
    moved = [] if before is None else relayout(before, layout, layer.inputs, grid, batch_size)
    return moved + traffic(layer, layout, grid, batch_size, first=before is None)


def _best_on(
    layers: Sequence[LayerShape], grid: Grid, batch_size: int, network: AlphaBeta, most_memory: float | None
) -> Plan | None:
    """The best plan on this grid, None where none can run."""
    reached: dict[Layout | None, list[_Partial]] = {None: [_Partial(0.0, 0.0, ())]}
    for layer in layers:
        following: dict[Layout | None, list[_Partial]] = {}
        for layout in LAYOUTS:
            if obstacle(layer, layout, grid, batch_size):
                continue
            kept = memory(layer, layout, grid, batch_size)
            options = []
            for before, partials in reached.items():
                seconds = math.fsum(network.seconds(one) for one in _collectives(layer, before, layout, grid, batch_size))
                options += [
                    _Partial(one.seconds + seconds, one.memory + kept, (*one.layouts, layout))
                    for one in partials
                    if most_memory is None or one.memory + kept <= most_memory
                ]
            if options:
                following[layout] = _undominated(options, by_memory=most_memory is not None)
        reached = following
    finished = [one for partials in reached.values() for one in partials]
    if not finished:
        return None
    return assignment(layers, min(finished, key=lambda one: one.seconds).layouts, grid, batch_size, network)


def _undominated(options: list[_Partial], *, by_memory: bool) -> list[_Partial]:
    """Those than which none is as fast and as small; the fastest alone where memory does not count."""
    kept: list[_Partial] = []
    for one in sorted(options, key=lambda one: (one.seconds, one.memory)):
        if not kept or (by_memory and one.memory < kept[-1].memory):
            kept.append(one)
    return kept


def _least_memory(layers: Sequence[LayerShape], grid: Grid, batch_size: int) -> float:
    """Bytes of the smallest layout of each layer."""
    return math.fsum(
        min(
            (memory(layer, layout, grid, batch_size) for layout in LAYOUTS if not obstacle(layer, layout, grid, batch_size)),
            default=math.inf,
        )
        for layer in layers
    )
