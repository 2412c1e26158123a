"""Integer tensors and what they stand for, as it is known before any input is seen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from hawq.graph import only_user
from hawq.integer.dyadic import Dyadic, dyadic, room_for, shift_right
from hawq.layers import ActivationQuantizer

_FINE_BITS = 30  # of integers on a grid that no quantizer dictates
Compute = Callable[..., Any]


@dataclass(frozen=True)
class Grid:
    """Integers n stand for n * scale. Zero points are subtracted already, so that zero is 0 on every grid.

    scale: float64, a scalar, or shaped to broadcast over the tensor where channels differ. bound: the largest |n|.
    """

    scale: torch.Tensor
    bound: int

    @property
    def is_uniform(self) -> bool:
        return self.scale.dim() == 0


@dataclass
class Site:
    """What the rule of an operation may look at: the grids, constants and example values of the nodes before it."""

    graph: fx.GraphModule
    bits: int
    grids: dict[fx.Node, Grid] = field(default_factory=dict)
    constants: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    multipliers: dict[str, tuple[Dyadic, ...]] = field(default_factory=dict)

    def grid(self, argument: Any) -> Grid | None:
        return self.grids.get(argument) if isinstance(argument, fx.Node) else None

    def value(self, argument: Any) -> torch.Tensor:
        """A tensor of the example's run."""
        return self.values[argument]

    def constant(self, argument: Any) -> torch.Tensor | None:
        """A number, or a tensor that does not depend on the input, in float64."""
        if isinstance(argument, int | float):
            return torch.tensor(argument, dtype=torch.float64)
        value = self.constants.get(argument) if isinstance(argument, fx.Node) else None
        return None if value is None else value.double()

    def module(self, node: fx.Node) -> torch.nn.Module | None:
        return self.graph.get_submodule(str(node.target)) if node.op == "call_module" else None

    def wanted_scale(self, node: fx.Node, passes: frozenset[Any]) -> torch.Tensor | None:
        """The scale on which the node's result will be rounded, if only operations that commute with rounding are between."""
        user = only_user(node)
        while user is not None:
            module = self.module(user)
            if isinstance(module, ActivationQuantizer):
                return module.scale.double()
            if user.target not in passes or user.args[0] is not node:
                return None
            node, user = user, only_user(user)
        return None


def affine(
    site: Site,
    node: fx.Node,
    terms: Sequence[tuple[torch.Tensor, Grid]],
    constant: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> tuple[Grid, Compute]:
    """sum_i f_i x_i + constant on one uniform grid, rounded once: (sum_i m_i n_i 2^(c - c_i) + k) >> c.

    terms: factors f_i (float64) and grids of the x_i. scale: of the result; without it one so fine that its rounding is
    far below that of 8 bits.
    """
    constant = torch.zeros_like(terms[0][0]) if constant is None else constant
    reach = _reach(terms) + float(constant.abs().max())
    if scale is None:
        scale = torch.tensor((reach or 1.0) / 2.0**_FINE_BITS, dtype=torch.float64)
    room = room_for(torch.as_tensor(reach) / scale)
    parts = tuple(dyadic(factor * grid.scale / scale, site.bits, room) for factor, grid in terms)
    shift = torch.stack([part.shift.max() for part in parts]).max()
    k = torch.round(torch.ldexp(constant / scale, shift)).long()
    site.multipliers[node.name] = (*site.multipliers.get(node.name, ()), *parts)

    def compute(*tensors: torch.Tensor) -> torch.Tensor:
        products = [x * part.multiplier << (shift - part.shift) for x, part in zip(tensors, parts, strict=True)]
        return shift_right(sum(products, k), shift)

    return Grid(scale, int(reach / float(scale)) + 1), compute


def fine_scale(grids: Sequence[Grid]) -> torch.Tensor:
    """A scale on which every one of these grids fits and loses next to nothing."""
    reach = max(_reach([(torch.ones(()), grid)]) for grid in grids)
    return torch.tensor(reach / 2.0**_FINE_BITS, dtype=torch.float64)


def _reach(terms: Sequence[tuple[torch.Tensor, Grid]]) -> float:
    """The largest magnitude that the sum of the terms can have."""
    return sum(float((factor * grid.scale).abs().max()) * grid.bound for factor, grid in terms)
