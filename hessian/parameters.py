"""Named parameters, chosen by name or glob, and their one flat vector."""

import contextlib
import difflib
import fnmatch
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

Selection = str | nn.Parameter | Sequence[str] | Sequence[nn.Parameter] | None


def select_parameters(model: nn.Module, params: Selection = None) -> dict[str, nn.Parameter]:
    """Parameters of `model` by name, in `named_parameters` order.

    `params`: None for every parameter that requires a gradient; a name or glob (`"layer1.*"`), several of them, or
    the parameters themselves. Raises ValueError for a glob that matches nothing, TypeError for a parameter that is
    not real floating point.
    """
    named = dict(model.named_parameters())
    if params is None:
        chosen = {name for name, parameter in named.items() if parameter.requires_grad}
    else:
        patterns: list[str | nn.Parameter] = [params] if isinstance(params, str | nn.Parameter) else list(params)
        chosen = set()
        for pattern in patterns:
            chosen |= _matches(pattern, named)
    if not chosen:
        raise ValueError("no parameter is selected: the model has none that requires a gradient, or `params` is empty")
    selected = {name: parameter for name, parameter in named.items() if name in chosen}
    for name, parameter in selected.items():
        if not parameter.is_floating_point():
            raise TypeError(f"parameter {name!r} is {parameter.dtype}: curvature needs real floating-point parameters")
    return selected


def _matches(pattern: str | nn.Parameter, named: Mapping[str, nn.Parameter]) -> set[str]:
    if isinstance(pattern, str):
        names = {name for name in named if fnmatch.fnmatchcase(name, pattern)}
        if not names:
            near = difflib.get_close_matches(pattern, named, n=3, cutoff=0.3) or list(named)[:3]
            raise ValueError(f"no parameter matches {pattern!r}; the nearest names are {', '.join(near)}")
        return names
    names = {name for name, parameter in named.items() if parameter is pattern}
    if not names:
        raise ValueError(f"a parameter of shape {tuple(pattern.shape)} in `params` does not belong to the model")
    return names


@contextlib.contextmanager
def requiring_grad(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Let frozen parameters take part in differentiation, and freeze them again afterwards."""
    frozen = [parameter for parameter in parameters.values() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def flatten(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate tensors into one vector of shape (P,)."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten(vector: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Cut a (P,) vector into tensors shaped like `like`."""
    pieces = vector.split([tensor.numel() for tensor in like])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]


def positions(parameters: Mapping[str, nn.Parameter], names: Sequence[str]) -> torch.Tensor:
    """Where the named parameters' entries are in the flat vector of `parameters`, in that vector's order."""
    pieces, start = [], 0
    for name, parameter in parameters.items():
        if name in names:
            pieces.append(torch.arange(start, start + parameter.numel()))
        start += parameter.numel()
    return torch.cat(pieces)
