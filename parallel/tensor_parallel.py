"""Curvature of a model whose parameters are DTensors: every rank has its parts of them, and of vectors alike."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from hessian.objective import Objective
from hessian.operators.base import NotExactError
from hessian.operators.curvature import CurvatureOperator
from hessian.operators.gauss_newton import GaussNewton
from hessian.operators.hessian import Hessian
from hessian.parameters import Selection
from hessian.space import VectorSpace
from hessian.split_data import SplitObjective
from parallel.layouts.network import LaidOut
from parallel.sharded_vectors import ShardedSpace

Tensors = dict[str, torch.Tensor]


class InParts(CurvatureOperator):
    """Vectors are divided as the parameters are; those that every rank has count once."""

    def __init__(self, objective: Objective, params: Selection = None) -> None:
        super().__init__(objective, params=params)
        mesh = self._mesh()
        positions, copies, start = [], [], 0
        for parameter in self.parameters.values():
            own, count = _own_positions(parameter, mesh)
            positions.append(own + start)
            copies.append(torch.full_like(own, count))
            start += parameter.numel()
        shared = torch.cat(copies)
        counted = shared if bool((shared > 1).any()) else None
        drawn_by = objective.group if isinstance(objective, SplitObjective) else group_of(mesh)
        self._space = ShardedSpace(self.shape[0], torch.cat(positions), counted, self.dtype, group_of(mesh), drawn_by)

    @property
    def positions(self) -> torch.Tensor:
        """Where this rank's entries are in the whole vector."""
        return self._space.positions

    def _mesh(self) -> DeviceMesh:
        """The ranks that the parameters are divided among."""
        if isinstance(self.objective.model, LaidOut):
            return self.objective.model.mesh["shared"]
        return next(one.device_mesh for one in self.objective.model.parameters() if isinstance(one, DTensor))

    @property
    def space(self) -> VectorSpace:
        return self._space

    def exact_trace(self) -> float:
        raise NotExactError("the parameters are divided among ranks, whose graphs tell nothing of the whole")

    def exact_diagonal(self) -> torch.Tensor:
        raise NotExactError("the parameters are divided among ranks, whose graphs tell nothing of the whole")

    def _excess(self) -> str:
        return ""  # what a part of a layer saves does not tell what the model needs

    def _tensors(self, row: torch.Tensor) -> Tensors:
        locals_ = [_local(parameter) for parameter in self.parameters.values()]
        pieces = row.split([local.numel() for local in locals_])
        return {
            name: _like(piece.view(local.shape), parameter)
            for (name, parameter), piece, local in zip(self.parameters.items(), pieces, locals_, strict=True)
        }

    def _row(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        placed = [_placed(tensor, parameter) for tensor, parameter in zip(tensors, self.parameters.values(), strict=True)]
        return torch.cat([_local(tensor).reshape(-1) for tensor in placed])


class TensorParallelHessian(InParts, Hessian):
    """The Hessian in DTensor parameters."""


class TensorParallelGaussNewton(InParts, GaussNewton):
    """The Gauss-Newton matrix in DTensor parameters."""


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(local: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def _placed(tensor: Any, parameter: nn.Parameter) -> torch.Tensor:
    """A gradient, divided as its parameter is."""
    placed: torch.Tensor = tensor.redistribute(placements=parameter.placements) if isinstance(parameter, DTensor) else tensor
    return placed


def _own_positions(parameter: torch.Tensor, mesh: DeviceMesh) -> tuple[torch.Tensor, int]:
    """Where this rank's entries are in the flat parameter, and how many ranks of `mesh` have each."""
    every = torch.arange(parameter.numel(), device=parameter.device)
    if not isinstance(parameter, DTensor):
        return every, mesh.size()
    if parameter.device_mesh != mesh:
        raise TypeError("parameters lie on different meshes: their vectors have no common group of ranks")
    placed = distribute_tensor(every.view(parameter.shape), mesh, parameter.placements, src_data_rank=None)
    count = 1
    for dim, placement in enumerate(parameter.placements):
        if isinstance(placement, Replicate):
            count *= mesh.size(dim)
    return placed.to_local().reshape(-1), count


def group_of(mesh: DeviceMesh) -> ProcessGroup | None:
    """All ranks of a mesh."""
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == distributed.get_world_size():
        return None
    raise TypeError(f"parameters on a mesh of {mesh.ndim} dimensions that has not all ranks: use one of one dimension")
