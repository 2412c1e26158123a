"""Rules: what each operation of a quantized network does to integers. An operation without a rule runs in float."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from hawq.graph import MOVING, aten
from hawq.integer.grid import Compute, Grid, Site, affine, fine_scale
from hawq.integer.pooling import AVERAGES, average

Rule = Callable[[Site, fx.Node], tuple[Grid, Compute] | None]

_ACCUMULATOR_BITS = 16  # integers this wide are so fine that a bound may be rounded to one of them
_BATCH_NORM = aten._native_batch_norm_legit_no_training.default

_CLIPS = frozenset((aten.relu.default, aten.hardtanh.default, aten.relu6.default, aten.clamp.default))
_KEEPS_CHANNELS = frozenset(
    (
        aten.clone.default,
        aten.contiguous.default,
        aten.dropout.default,
        aten.max_pool1d.default,
        aten.max_pool2d.default,
        aten.max_pool3d.default,
    )
)
_MOVES = (MOVING - _KEEPS_CHANNELS) | {aten.amax.default}
_PADS = frozenset((aten.pad.default, aten.constant_pad_nd.default))
# Monotone operations: they commute with rounding, so that their input may be rounded instead of their output.
_COMMUTES = _CLIPS | _KEEPS_CHANNELS | _MOVES | _PADS | {operator.getitem}


def clip(site: Site, node: fx.Node) -> tuple[Grid, Compute] | None:
    source = site.grid(node.args[0])
    if source is None:
        return None
    if node.target is aten.relu.default:
        return source, lambda x: x.clamp(min=0)
    low, high = _limits(node)
    if not all(limit is None or isinstance(limit, int | float) for limit in (low, high)):
        return None
    prepare: Compute | None = None
    wanted = site.wanted_scale(node, _COMMUTES)
    rounded_already = wanted is not None and source.is_uniform and bool(wanted == source.scale)
    if not rounded_already and source.bound < 2**_ACCUMULATOR_BITS:
        source, prepare = affine(site, node, [(torch.ones(()), source)], scale=wanted)
    least, most = (None if limit is None else torch.round(limit / source.scale).long() for limit in (low, high))

    def compute(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        x = x if prepare is None else prepare(x)
        x = x if least is None else torch.maximum(x, least)
        return x if most is None else torch.minimum(x, most)

    return source, compute


def _limits(node: fx.Node) -> tuple[Any, Any]:
    if node.target is aten.relu6.default:
        return 0, 6
    low, high = (-1.0, 1.0) if node.target is aten.hardtanh.default else (None, None)
    names = ("min_val", "max_val") if node.target is aten.hardtanh.default else ("min", "max")
    given = (*node.args[1:], *(None, None))[:2]
    return tuple(
        value if value is not None else node.kwargs.get(name, default)
        for value, name, default in zip(given, names, (low, high), strict=True)
    )  # type: ignore[return-value]


def move(site: Site, node: fx.Node) -> tuple[Grid, Compute] | None:
    """Operations that move or choose values: on integers as they are, channels of unlike scales brought to one first."""
    source = site.grid(node.args[0])
    if source is None:
        return None
    target: Any = node.target
    function: Compute = _INTEGER_FORMS.get(target, target)
    if source.is_uniform or node.target in _KEEPS_CHANNELS:
        return source, function
    source, rescale = affine(site, node, [(torch.ones(()), source)], scale=site.wanted_scale(node, _COMMUTES))
    return source, lambda x, *settings, **named: function(rescale(x), *settings, **named)


def _max_pool1d(x: torch.Tensor, kernel: Any, *settings: Any) -> torch.Tensor:
    """As two-dimensional pooling, which torch has for integers."""
    rows = [[neutral, *setting] if isinstance(setting, list) else setting for neutral, setting in zip((1, 0, 1), settings)]
    return aten.max_pool2d.default(x.unsqueeze(-2), [1, *kernel], *rows, *settings[3:]).squeeze(-2)


# Operations that torch has for real numbers only, or for contiguous tensors, in a form for integers.
_INTEGER_FORMS: dict[Any, Compute] = {
    aten._unsafe_view.default: aten.reshape.default,
    aten.max_pool1d.default: _max_pool1d,
    aten.view.default: aten.reshape.default,
}


def pad(site: Site, node: fx.Node) -> tuple[Grid, Compute] | None:
    source = site.grid(node.args[0])
    constant = node.target is aten.constant_pad_nd.default
    mode = "constant" if constant else (node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant"))
    position = 2 if constant else 3
    value = node.args[position] if len(node.args) > position else node.kwargs.get("value")
    if mode != "constant" or not value or source is None:
        return move(site, node)
    number = site.constant(value)
    if number is None:
        return None
    source, rescale = affine(site, node, [(torch.ones(()), source)], scale=site.wanted_scale(node, _COMMUTES))
    filling = int(torch.round(number / source.scale))
    return Grid(source.scale, max(source.bound, abs(filling))), lambda x, margins, *_, **__: F.pad(
        rescale(x), margins, value=filling
    )


def add(site: Site, node: fx.Node) -> tuple[Grid, Compute] | None:
    """Sums and differences of two grids, or of a grid and a constant: one dyadic multiplier each, rounded once."""
    alpha: Any = node.kwargs.get("alpha", 1)
    target: Any = node.target
    pair = {aten.add.Tensor: (1, alpha), aten.sub.Tensor: (1, -alpha)}.get(target, (-alpha, 1))
    factors = torch.tensor(pair, dtype=torch.float64)
    terms, constant, positions = [], None, []
    for position, (factor, argument) in enumerate(zip(factors, node.args, strict=False)):
        grid, number = site.grid(argument), site.constant(argument)
        if grid is not None:
            terms.append((factor, grid))
            positions.append(position)
        elif number is not None:
            constant = factor * number
        else:
            return None
    if not terms:
        return None
    grid, compute = affine(site, node, terms, constant, site.wanted_scale(node, _COMMUTES))
    return grid, lambda *arguments, **_: compute(*(arguments[position] for position in positions))


def multiply(site: Site, node: fx.Node) -> tuple[Grid, Compute] | None:
    """A grid times (or divided by) a constant, and the product of two grids."""
    first, second = node.args[:2]
    grids = site.grid(first), site.grid(second)
    if grids[0] is not None and grids[1] is not None and node.target is aten.mul.Tensor:
        a, b = grids
        if not (a.is_uniform and b.is_uniform) or a.bound * b.bound >= 2**31:  # type: ignore[union-attr]
            return None
        return Grid(a.scale * b.scale, a.bound * b.bound), torch.mul  # type: ignore[union-attr]
    position = 0 if grids[0] is not None else 1
    grid, number = grids[position], site.constant(node.args[1 - position])
    if grid is None or number is None or (node.target is aten.div.Tensor and position):
        return None
    factor = 1 / number if node.target is aten.div.Tensor else number
    result, compute = affine(site, node, [(factor, grid)], None, site.wanted_scale(node, _COMMUTES))
    return result, lambda *arguments, **_: compute(arguments[position])


def concatenate(site: Site, node: fx.Node) -> tuple[Grid, Compute] | None:
    """Inputs on different grids are brought to one first."""
    sources = [site.grid(argument) for argument in node.args[0]]  # type: ignore[union-attr]
    if any(source is None for source in sources):
        return None
    grids = [source for source in sources if source is not None]
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    if all(grid.is_uniform and bool(grid.scale == grids[0].scale) for grid in grids):
        return Grid(grids[0].scale, max(grid.bound for grid in grids)), aten.cat.default
    scale = site.wanted_scale(node, _COMMUTES)
    if scale is None:
        scale = fine_scale(grids)
    rescaled = [affine(site, node, [(torch.ones(()), grid)], scale=scale) for grid in grids]

    def compute(tensors: list[torch.Tensor], *_: Any) -> torch.Tensor:
        return torch.cat([function(x) for (_, function), x in zip(rescaled, tensors, strict=True)], dim)

    return Grid(scale, max(grid.bound for grid, _ in rescaled)), compute


def batch_norm(site: Site, node: fx.Node) -> tuple[Grid, Compute] | None:
    """One that could not be folded: x * gamma / sqrt(var + eps) + (beta - mean * gamma / sqrt(var + eps))."""
    source = site.grid(node.args[0])
    gamma, beta, mean, variance = (site.constant(argument) for argument in node.args[1:5])
    if source is None or mean is None or variance is None:
        return None
    factor = (variance + float(node.args[6])).rsqrt() * (1 if gamma is None else gamma)  # type: ignore[arg-type]
    shift = (0 if beta is None else beta) - mean * factor
    dims = site.value(node.args[0]).dim()
    shape = [-1 if dim == 1 else 1 for dim in range(dims)]
    result, compute = affine(site, node, [(factor.view(shape), source)], shift.view(shape), site.wanted_scale(node, _COMMUTES))
    return result, lambda x, *_: (compute(x),)


def item(site: Site, node: fx.Node) -> tuple[Grid, Compute] | None:
    source = site.grid(node.args[0])
    return None if source is None else (source, operator.getitem)


RULES: dict[Any, Rule] = {
    **dict.fromkeys(_CLIPS, clip),
    **dict.fromkeys(_KEEPS_CHANNELS | _MOVES, move),
    **dict.fromkeys(_PADS, pad),
    **dict.fromkeys(AVERAGES, average),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.rsub.Tensor), add),
    **dict.fromkeys((aten.mul.Tensor, aten.div.Tensor), multiply),
    aten.cat.default: concatenate,
    _BATCH_NORM: batch_norm,
    operator.getitem: item,
}
