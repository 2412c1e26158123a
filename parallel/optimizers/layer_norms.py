"""Euclidean norms of whole layers, of which every rank may hold a part."""

from collections.abc import Sequence

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def whole_norms(parts: Sequence[torch.Tensor], layouts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    r"""The Euclidean norms of tensors of which every rank has a part, one () each, in float32 at least.

    .. math:: \|w\| = \Big(\sum_r \|w_r\|^2\Big)^{1/2}

    parts: this rank's, plain tensors. layouts: for each part a tensor that is divided as it is, such as its parameter; where
    that is no DTensor, or is the same on all ranks of its mesh, the part is the whole and nothing is sent. The squares of all
    divided layers of a mesh take one reduction together (one a dimension, where a mesh divides layers along several).
    Collective.
    """
    if not parts:
        return []
    precision = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    norms = list(torch._foreach_norm(list(parts), 2, dtype=precision))
    divided: dict[tuple[DeviceMesh, tuple[int, ...]], list[int]] = {}
    for index, layout in enumerate(layouts):
        dims = _dividing_dims(layout)
        if isinstance(layout, DTensor) and dims:
            divided.setdefault((layout.device_mesh, dims), []).append(index)
    for (mesh, dims), indices in divided.items():
        squares = torch.stack([norms[index] for index in indices]).square_()
        for dim in dims:
            distributed.all_reduce(squares, group=mesh.get_group(dim))
        for index, norm in zip(indices, squares.sqrt_().unbind(), strict=True):
            norms[index] = norm
    return norms


def _dividing_dims(layout: torch.Tensor) -> tuple[int, ...]:
    """The dimensions of its mesh along which a tensor is in parts."""
    if not isinstance(layout, DTensor):
        return ()
    return tuple(dim for dim, placement in enumerate(layout.placements) if not placement.is_replicate())
