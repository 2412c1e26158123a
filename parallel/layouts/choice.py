"""Which layout each layer of a task's network takes: what a mesh asks for, or the planner's best."""

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from parallel.communication import AlphaBeta
from parallel.layer_cost import Grid, Layout, obstacle
from parallel.layer_shape import LayerShape, describe
from parallel.layouts.network import divides_channels, divides_rows
from parallel.planner import best_plans


@dataclass(frozen=True)
class Mesh:
    """How many groups share the batch, and how many ranks of a group share a model, or the tiles of images."""

    batch: int
    model: int = 1
    tiles: tuple[int, int] = (1, 1)

    @property
    def shared(self) -> int:
        """Ranks of a group."""
        return self.model * math.prod(self.tiles)


def read_mesh(text: str, world_size: int) -> Mesh:
    """`batch=2,model=2,domain=1`; what is left out is 1, and `domain=2x2` divides height and width. ValueError for one that is
    not this world's."""
    found: dict[str, tuple[int, ...]] = {"batch": (1,), "model": (1,), "domain": (1,)}
    for part in text.split(","):
        name, _, numbers = part.partition("=")
        sizes = tuple(int(number) if number.isdecimal() else 0 for number in numbers.split("x"))
        if name not in found or 0 in sizes or len(sizes) > (2 if name == "domain" else 1):
            raise ValueError(f"--mesh {text}: {part!r} is none of batch=N, model=N, domain=N and domain=NxN")
        found[name] = sizes
    rows, columns = (*found["domain"], 1)[:2]
    mesh = Mesh(found["batch"][0], found["model"][0], (rows, columns))
    ranks = mesh.batch * mesh.shared
    if ranks != world_size:
        raise ValueError(f"--mesh {text} has {ranks} ranks, and there are {world_size}: the product must be {world_size}")
    if 1 < mesh.model < mesh.shared:
        raise ValueError(f"--mesh {text}: either model or domain can be more than 1; --plan auto mixes both on one dimension")
    return mesh


def shapes(model: nn.Module, example: Any) -> list[LayerShape]:
    """The layers as `describe` has them, with rows and channels only where they can be divided here."""
    modules = dict(model.named_modules())
    found = []
    for layer in describe(model, example):
        module = modules[layer.name]
        if not divides_rows(module):
            layer = replace(layer, rows_in=1, rows_out=1, kernel_rows=1, columns=1)
        found.append(layer if divides_channels(module) else replace(layer, channels=0))
    return found


def for_mesh(model: nn.Module, example: Any, mesh: Mesh, batch_size: int) -> dict[str, Layout]:
    """The layouts that a mesh asks for: `model`, every layer that has channels for all; `domain`, the layers from the first on
    whose images can be divided among all; batch for the rest."""
    layers = shapes(model, example)
    if mesh.model > 1:
        grid = Grid(mesh.model, mesh.batch)
        return {layer.name: "batch" if obstacle(layer, "model", grid, batch_size) else "model" for layer in layers}
    rows, columns = mesh.tiles
    reasons = {}
    for layer in layers:
        reasons[layer.name] = obstacle(layer, "domain", Grid(rows, mesh.batch), batch_size)
        if layer.columns < columns:
            reasons[layer.name] = f"{layer.name!r} has {layer.columns} columns for {columns} ranks"
    found: dict[str, Layout] = {}
    for name, reason in reasons.items():
        if reason:
            break
        found[name] = "domain"
    if not found:
        name, reason = next(iter(reasons.items()))
        raise ValueError(f"--mesh domain={rows}x{columns}: the first layer cannot be divided: {reason or name}")
    return found


def planned(
    model: nn.Module, example: Any, world_size: int, batch_size: int, network: AlphaBeta
) -> tuple[Grid, dict[str, Layout]]:
    """The planner's best grid, and its layout of every layer."""
    best = best_plans(shapes(model, example), world_size, batch_size, network).best
    return best.grid, {layer.name: layer.layout for layer in best.layers}
