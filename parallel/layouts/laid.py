"""Activations that know how they are divided among the ranks of a group, and change it where an operation needs it.

Three layouts of the N examples that a group has: `batch`, every rank has some of the examples; `domain`, every rank has a tile
of all images; `model`, every rank has all. An operation on activations keeps their layout where it works element by
element; elsewhere activations are laid out anew first, as the next layer wants them, by `batch` if nothing is known of it, in
which whatever treats examples alike is right.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import distributed
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from torch.utils import _pytree as tree

from parallel.halo import Block, Exchange, fetch, partition
from parallel.layer_cost import Layout
from parallel.layouts.domain import Pair, Tiles
from parallel.layouts.replicated import gathered, sliced

_ELEMENTWISE: frozenset[Callable[..., Any]] = frozenset(
    getattr(owner, name)
    for owner, names in (
        (torch, ("relu", "sigmoid", "tanh", "exp", "abs", "square", "add", "sub", "mul", "div", "neg", "clamp", "erf")),
        (
            F,
            (
                *("relu", "relu6", "gelu", "silu", "leaky_relu", "elu", "selu", "hardtanh", "hardswish", "hardsigmoid", "mish"),
                *("softplus", "sigmoid", "tanh", "dropout"),
            ),
        ),
        (
            torch.Tensor,
            (
                *(
                    "relu",
                    "relu_",
                    "sigmoid",
                    "tanh",
                    "exp",
                    "abs",
                    "square",
                    "add",
                    "add_",
                    "sub",
                    "mul",
                    "mul_",
                    "div",
                    "neg",
                ),
                *("clamp", "__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__"),
                *("__neg__", "contiguous", "clone", "float", "double", "bfloat16"),
            ),
        ),
    )
    for name in names
)
_OF_THE_PART = ("as_subclass", "__get__", "__set__", "dim", "is_floating_point", "is_complex", "get_device")
_TRANSPOSED = (torch.Tensor.mT.__get__, torch.Tensor.T.__get__)  # type: ignore[attr-defined]  # descriptors have it
_RESHAPING = (torch.Tensor.view, torch.Tensor.reshape, torch.reshape, torch.Tensor.expand)
_SHAPE = (torch.Tensor.shape.__get__, torch.Tensor.size)  # type: ignore[attr-defined]  # descriptors have it


@dataclass(frozen=True)
class Division:
    """How activations are divided. examples: N of the group. grid: of tiles, where images are divided. size: (height, width) of
    whole images, for `domain`. otherwise: the layout that they take where an operation cannot be done on tiles."""

    layout: Layout
    examples: int
    group: ProcessGroup | None
    grid: Pair
    size: Pair = (0, 0)
    otherwise: Layout = "batch"

    def blocks(self) -> tuple[Block, ...]:
        """Each rank's (examples, rows, columns)."""
        ranks = distributed.get_world_size(self.group)
        everything, image = (0, self.examples), ((0, self.size[0]), (0, self.size[1]))
        if self.layout == "batch":
            return tuple((own, *image) for own in partition(self.examples, ranks))
        if self.layout == "domain":
            return tuple((everything, *own) for own in self.tiles.blocks())
        return ((everything, *image),) * ranks

    @property
    def tiles(self) -> Tiles:
        """Of images laid out by domain."""
        return Tiles(self.size, self.grid, self.group)


class Laid(torch.Tensor):
    """A rank's part of activations, with their `division`."""

    division: Division

    @staticmethod
    def of(part: torch.Tensor, division: Division) -> "Laid":
        """`part` as this rank's share."""
        result = part.as_subclass(Laid)
        result.division = division
        return result

    @property
    def part(self) -> torch.Tensor:
        """This rank's share, a plain tensor."""
        return self.as_subclass(torch.Tensor)

    def laid(self, layout: Layout) -> "Laid":
        """The same activations in another layout. Collective within the group."""
        before = self.division
        if before.layout == layout:
            return self
        part = self.part
        by_tiles = "domain" in (before.layout, layout)
        if by_tiles and part.dim() != 4:
            raise ValueError(f"a tensor of {part.dim()} dimensions has no rows to divide: lay this layer out by batch or model")
        size = before.size
        if by_tiles and before.layout != "domain":
            size = (part.shape[2], part.shape[3])
        examples, *_ = before.blocks()[distributed.get_rank(before.group)]
        if part.shape[0] != examples[1] - examples[0]:
            raise ValueError(
                f"a tensor of shape {tuple(part.shape)} does not have its {examples[1] - examples[0]} examples first: the "
                "model moves or mixes them, and can be laid out by batch alone (leave out --mesh and --plan)"
            )
        dims = (0, 2, 3) if by_tiles else (0,)
        old = replace(before, size=size)
        new = Division(layout, before.examples, before.group, before.grid, size)
        cut = (lambda blocks: blocks) if by_tiles else (lambda blocks: tuple(block[:1] for block in blocks))
        if before.layout == "model":
            moved = sliced(part, Exchange(cut(new.blocks()), cut(old.blocks()), dims, before.group))
        elif layout == "model":
            moved = gathered(part, Exchange(cut(old.blocks()), cut(new.blocks()), dims, before.group))
        else:
            moved = fetch(part, Exchange(cut(old.blocks()), cut(new.blocks()), dims, before.group))
        return Laid.of(moved, replace(new, size=size if layout == "domain" else (0, 0)))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if getattr(func, "__name__", "") in _OF_THE_PART and func not in (*_SHAPE, *_TRANSPOSED):
                return func(*args, **kwargs)
            laid = [value for value in tree.tree_leaves((args, kwargs)) if isinstance(value, Laid)]
            division = laid[0].division
            if division.layout == "domain" and func not in _SHAPE and not _keeps_tiles(func, args, kwargs):
                division = replace(division, layout=division.otherwise, size=(0, 0))
            if division.layout == "model" and any(_is_weight(value) for value in tree.tree_leaves((args, kwargs))):
                division = replace(division, layout="batch")  # weights outside a layer: gradients are parts of a sum
            layout = division.layout

            def plain(value: Any) -> Any:
                return value.laid(layout).part if isinstance(value, Laid) else value

            args, kwargs = tree.tree_map(plain, (tuple(args), kwargs))
            if func in _RESHAPING and layout == "batch":
                args = _of_own_examples(args, division)
            result = func(*args, **kwargs)
            if func in _SHAPE:
                return _whole_shape(result, laid[0].division, args, kwargs)
            return tree.tree_map(lambda value: Laid.of(value, division) if _is_activation(value) else value, result)


def _is_activation(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _is_weight(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, Laid) and value.requires_grad


def _keeps_tiles(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an operation can be done on tiles as if they were all: element by element, or a concatenation of channels."""
    if func is torch.cat:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        return dim in (1, -3) and all(isinstance(part, Laid) for part in args[0])
    if func not in _ELEMENTWISE:
        return False
    others = [value for value in tree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    return all(isinstance(value, Laid) or value.numel() == 1 or set(value.shape[-2:]) == {1} for value in others)


def _whole_shape(result: Any, division: Division, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A shape as the user's code expects it: with all examples, rows and columns."""
    part = args[0]
    shape = list(part.shape)
    shape[0] = division.examples
    if division.layout == "domain":
        shape[2:] = division.size
    if isinstance(result, torch.Size):
        return torch.Size(shape)
    return shape[kwargs.get("dim", args[1] if len(args) > 1 else 0)]


def _of_own_examples(args: Sequence[Any], division: Division) -> tuple[Any, ...]:
    """Arguments of `view` and its like, whose first size is that of all examples: this rank's instead."""
    tensor, *sizes = args
    flat = list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else sizes
    if flat and flat[0] == division.examples:
        flat[0] = len(tensor)
    return tensor, tuple(flat)
