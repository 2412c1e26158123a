"""The Hessian of one training step's loss, as its gradient was taken."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from hessian.operators.base import LinearOperator
from hessian.operators.hessian import Hessian
from hessian.split_data import SplitObjective
from parallel.gathered import Gathered
from parallel.laid_out_curvature import LaidOutHessian
from parallel.layouts.network import LaidOut
from parallel.sharded_vectors import ShardedVectors

PartLoss = Callable[[nn.Module, Any], torch.Tensor]


def step_hessian(model: nn.Module, loss: PartLoss, parts: Sequence[Any]) -> LinearOperator:
    r"""Products with the matrix of second derivatives of a sum over all ranks' parts.

    .. math:: H = \nabla^2 \sum_r \sum_p \ell_{rp}(\theta)

    model: whole on every rank, or laid out. loss(model, part): this rank's share of the loss of one pass, weighted already:
    where batch norms take their moments over all ranks, and where layers are divided, derivatives flow between ranks, and a
    weight given afterwards would be one of other ranks' shares, too. parts: this rank's, as many as every other's. Vectors are
    whole on every rank, but in parts of gathered or laid-out models. Collective.
    """
    objective = _StepObjective(model, loss, parts)
    if isinstance(model, LaidOut):
        return LaidOutHessian(objective)
    operator = Hessian(objective)
    return ShardedVectors(operator, model.group, model.refresh) if isinstance(model, Gathered) else operator


class _StepObjective(SplitObjective):
    """Every part counts, even one without examples that count: other ranks wait for its pass."""

    def __init__(self, model: nn.Module, loss: PartLoss, parts: Sequence[Any]) -> None:
        super().__init__(model, _already_weighted, list(parts), forward=loss)

    @property
    def runs_alone(self) -> bool:
        return False  # and the gradient's passes have just fitted

    def total_weight(self) -> float:
        return 1.0

    def own_batches(self) -> Iterator[tuple[Any, float]]:
        for part in self.batches():
            yield part, 1.0

    def batch_loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        del batch
        loss: torch.Tensor = outputs.reshape(())
        return loss


def _already_weighted(outputs: Any, targets: Any) -> torch.Tensor:
    del targets
    loss: torch.Tensor = outputs
    return loss
