"""Between an operator's vectors and an optimizer's parameters, which may be divided among ranks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def matched(param_groups: Sequence[Mapping[str, Any]], parameters: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The optimizer's parameters in the order of an operator's `parameters`: the same tensors, else those of the same names.

    Names are those that the optimizer was given (`Optimizer(model.named_parameters(), ...)`). ValueError, with the name, for a
    parameter that only one of the two has.
    """
    own = [one for group in param_groups for one in group["params"]]
    names = [name for group in param_groups for name in group.get("param_names", ())]
    by_name = dict(zip(names, own, strict=True)) if names else {}
    known = {id(one) for one in own}
    found = []
    for name, parameter in parameters.items():
        match = parameter if id(parameter) in known else by_name.get(name)
        if match is None or match.shape != parameter.shape:
            how = "" if names else ", or make it of model.named_parameters(), that they can be told by name"
            raise ValueError(
                f"the optimizer does not have the operator's parameter {name!r}: leave it out of the operator (params=){how}"
            )
        found.append(match)
    taken = {id(one) for one in found}
    for position, one in enumerate(own):
        if id(one) not in taken:
            name = repr(names[position]) if names else f"number {position}, of shape {tuple(one.shape)}"
            raise ValueError(
                f"the operator lacks the optimizer's parameter {name}: make the operator of it, too (params=), or leave it out "
                "of the optimizer"
            )
    return found


def own_part(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of a `whole` tensor that every rank has, divided as the parameter `like` is."""
    if not isinstance(like, DTensor):
        return whole.to(like.dtype)
    return distribute_tensor(whole.to(like.dtype), like.device_mesh, like.placements, src_data_rank=None).to_local()
