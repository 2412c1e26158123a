"""The loss as a function of the model's outputs: where Gauss-Newton and Fisher matrices take their inner part from."""

import copy
from collections.abc import Iterator
from typing import Any

import torch

from hessian.batch import map_tensors, tensors_of
from hessian.diagnosis import DataMismatchError
from hessian.objective import Objective


def differentiable(outputs: Any) -> list[torch.Tensor]:
    """The tensors of a model's outputs that depend on parameters, in the order in which they are found."""
    return [tensor for tensor in tensors_of(outputs) if tensor.requires_grad]


def loss_in_double(objective: Objective, outputs: Any, batch: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Copies of the differentiable outputs and the batch's loss of them, in float64 if the loss works there.

    Near a minimum the second derivatives are differences of nearly equal numbers (p - p^2 with p close to 1).
    """
    loss = objective.loss
    if type(loss).__module__ == "torch.nn.modules.loss":  # its own tensors, class weights, follow; others may hold the model
        loss = copy.deepcopy(objective.loss).double()  # type: ignore[attr-defined]
    in_double = copy.copy(objective)
    in_double.loss = loss
    try:
        leaves, copied = leaf_copy(outputs, torch.float64)
        return leaves, in_double.batch_loss(copied, map_tensors(_to_double, batch))
    except (RuntimeError, DataMismatchError):  # a loss that holds on to tensors of another precision
        leaves, copied = leaf_copy(outputs, None)
        return leaves, objective.batch_loss(copied, batch)


def leaf_copy(outputs: Any, dtype: torch.dtype | None) -> tuple[list[torch.Tensor], Any]:
    """New leaves in the place of the differentiable outputs, in another precision if one is given."""
    leaves = [tensor.detach().to(dtype or tensor.dtype).requires_grad_(True) for tensor in differentiable(outputs)]
    following: Iterator[torch.Tensor] = iter(leaves)

    def replaced(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.requires_grad:
            return next(following)
        return tensor if dtype is None else _to_double(tensor)

    return leaves, map_tensors(replaced, outputs)


def _to_double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
