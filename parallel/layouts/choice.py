"""Which layout each layer of a task's network takes: what a mesh asks for, or the planner's best."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from parallel.communication import AlphaBeta
from parallel.layer_cost import Grid, Layout, obstacle
from parallel.layer_shape import LayerShape, describe
from parallel.layouts.network import divides_channels, divides_rows
from parallel.planner import plan

MESH = ("batch", "model", "domain")


def read_mesh(text: str, world_size: int) -> dict[str, int]:
    """`batch=2,model=2,domain=1` as ranks by dimension; what is left out is 1. ValueError for one that is not this world's."""
    found = dict.fromkeys(MESH, 1)
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name not in found or not number.isdecimal() or int(number) < 1:
            raise ValueError(f"--mesh {text}: {part!r} is none of batch=N, model=N and domain=N")
        found[name] = int(number)
    ranks = found["batch"] * found["model"] * found["domain"]
    if ranks != world_size:
        raise ValueError(f"--mesh {text} has {ranks} ranks, and there are {world_size}: the product must be {world_size}")
    if found["model"] > 1 and found["domain"] > 1:
        raise ValueError(f"--mesh {text}: either model or domain can be more than 1; --plan auto mixes both on one dimension")
    return found


def shapes(model: nn.Module, example: Any) -> list[LayerShape]:
    """The layers as `describe` has them, with rows and channels only where they can be divided here."""
    modules = dict(model.named_modules())
    found = []
    for layer in describe(model, example):
        module = modules[layer.name]
        if not divides_rows(module):
            layer = replace(layer, rows_in=1, rows_out=1, kernel_rows=1)
        found.append(layer if divides_channels(module) else replace(layer, channels=0))
    return found


def for_mesh(model: nn.Module, example: Any, mesh: Mapping[str, int], batch_size: int) -> dict[str, Layout]:
    """The layouts that a mesh asks for: `model`, every layer that has channels for all; `domain`, the layers from the first on
    whose rows can be divided among all; batch for the rest."""
    grid = Grid(mesh["model"] * mesh["domain"], mesh["batch"])
    layout: Layout = "model" if mesh["model"] > 1 else "domain"
    layers = shapes(model, example)
    reasons = {layer.name: obstacle(layer, layout, grid, batch_size) for layer in layers}
    if layout == "model":
        return {name: "batch" if reason else "model" for name, reason in reasons.items()}
    found: dict[str, Layout] = {}
    for name, reason in reasons.items():
        if reason:
            break
        found[name] = "domain"
    if not found:
        name, reason = next(iter(reasons.items()))
        raise ValueError(f"--mesh domain={mesh['domain']}: the first layer cannot be divided: {reason or name}")
    return found


def planned(
    model: nn.Module, example: Any, world_size: int, batch_size: int, network: AlphaBeta
) -> tuple[Grid, dict[str, Layout]]:
    """The planner's best grid, and its layout of every layer."""
    best = plan(shapes(model, example), world_size, batch_size, network).best
    return best.grid, {layer.name: layer.layout for layer in best.layers}
