"""A network laid out over a grid, as the trainer uses it."""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from parallel.layer_cost import Layout
from parallel.layouts.network import LaidOut
from parallel.replica import Replica, local_part


class LaidOutReplica(Replica):
    """A model whose layers are laid out over mesh["batch"] x mesh["shared"]; inputs are those of the rank's shared group.

    tiles: of images, as for `LaidOut`.
    """

    def __init__(
        self, model: nn.Module, layouts: Mapping[str, Layout], mesh: DeviceMesh, tiles: tuple[int, int] | None = None
    ) -> None:
        self.network = LaidOut(model, layouts, mesh, tiles=tiles)
        self.model, self.sum_gradients = self.network.model, 1.0
        self._call = self.network

    def own_examples(self, examples: int) -> tuple[int, int]:
        return self.network.own_examples(examples)

    def outputs(self, inputs: Any) -> Any:
        return self.network(inputs)

    @property
    def measured_model(self) -> nn.Module:
        return self.network

    def curvature_model(self) -> nn.Module:
        return self.network

    def accumulating(self, more: bool) -> contextlib.AbstractContextManager[None]:
        del more  # gradients stay on each rank until `finish_gradients`
        return contextlib.nullcontext()

    def finish_gradients(self) -> None:
        """One message a layer: the gradients of its weights, over all ranks that have a part of them."""
        for prefix, module in self.model.named_modules():
            named = [(f"{prefix}.{name}", one) for name, one in module.named_parameters(recurse=False) if one.grad is not None]
            if named:
                _sum([local_part(one.grad) for _, one in named], self.network.gradient_group(named[0][0]))

    def gradient_norm(self) -> torch.Tensor:
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        divided = [local_part(gradient) for gradient in gradients if isinstance(gradient, DTensor)]
        square = torch.nn.utils.get_total_norm(divided).square() if divided else gradients[0].new_zeros(())
        distributed.all_reduce(square, group=self.network.group)
        whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
        return (square + torch.nn.utils.get_total_norm(whole).square()).sqrt()


def _sum(tensors: list[torch.Tensor], group: Any) -> None:
    """Sums over the ranks of `group`, in place, as one message."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    distributed.all_reduce(flat, group=group)
    for tensor, piece in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(piece.view_as(tensor))
