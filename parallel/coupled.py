"""The loss of a model in which examples of different ranks meet, as they do in a global batch norm in training mode."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hessian.split_data import SplitObjective
from parallel.layouts.batch_norm import GlobalBatchNorm


class CoupledObjective(SplitObjective):
    """A SplitObjective whose batches are parts of whole ones: batch k of every rank, together, is one.

    Derivatives flow between ranks, so that each part's weight must be in its loss before that is differentiated. Raises
    ValueError where ranks have different numbers of batches.
    """

    @property
    def runs_alone(self) -> bool:
        return False

    def total_weight(self) -> float:
        numbers = self.gathered(lambda: sum(1 for _ in self.batches())) if self._total_weight is None else [1]
        if len(set(numbers)) > 1:
            raise ValueError(f"ranks have {numbers} batches, whose examples meet in a global batch norm: give all as many")
        return super().total_weight()

    def own_batches(self) -> Iterator[tuple[Any, float]]:
        for batch in self.batches():
            yield batch, 1.0

    def batch_loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        """This rank's part of the whole data's loss."""
        return super().batch_loss(outputs, batch) * (self.weight(batch) / self.total_weight())


def couples_examples(model: nn.Module) -> bool:
    """Whether the model takes moments over examples of several ranks."""
    return any(isinstance(module, GlobalBatchNorm) and module.takes_moments for module in model.modules())
