"""Curvature of a network whose layers are laid out over a grid of ranks."""

from typing import Any

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from hessian.batch import count_examples, take_examples
from hessian.objective import Objective
from hessian.operators.curvature import NoSecondDerivativeError
from hessian.operators.gauss_newton import GaussNewton
from hessian.operators.hessian import Hessian
from hessian.parameters import Selection
from hessian.split_data import SplitObjective
from parallel.layouts.network import LaidOut
from parallel.tensor_parallel import InParts


class LaidOutObjective(SplitObjective):
    """The loss over all groups' data, of which the ranks of a shared group pass the same batches."""

    @property
    def network(self) -> LaidOut:
        assert isinstance(self.model, LaidOut)
        return self.model

    def targets(self, batch: Any) -> Any:
        """Those of this rank's outputs."""
        return super().targets(self._own(batch))

    def total_weight(self) -> float:
        """The sum of all batches' weights, each once for the ranks that share it."""
        return super().total_weight() / (1 if self.is_sum else distributed.get_world_size(self.network.group))

    def batch_loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        """This rank's part of the batch's loss: those of the ranks that share the batch, between which derivatives flow, add
        up to it."""
        part = self._count_of(self._own(batch)) / self._count_of(batch)
        return super().batch_loss(outputs, batch) * (1.0 if self.is_sum else part)

    def _count(self, batch: Any) -> float:
        return self._count_of(batch)

    def _count_of(self, batch: Any) -> float:
        return Objective(self.model, self.loss, [], items=self.items)._count(batch)

    def _own(self, batch: Any) -> Any:
        count = count_examples(batch)
        ranks = distributed.get_world_size(self.network.group)
        if count < ranks:
            raise ValueError(f"a batch of {count} examples for the {ranks} ranks that share it: pass at least {ranks}")
        return take_examples(batch, slice(*self.network.own_examples(count)))


class _LaidOut(InParts):
    """Vectors are divided as the parameters are; a product is summed over all ranks by one reduction of its whole size."""

    def __init__(self, objective: SplitObjective, params: Selection = None) -> None:
        super().__init__(objective, params)
        network = objective.model
        assert isinstance(network, LaidOut)
        shared = distributed.get_world_size(network.group)
        scales = []
        for name, parameter in self.parameters.items():
            own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            complete = network.gradient_group(name.removeprefix("model.")) is not None and own is parameter
            scales.append(torch.full((own.numel(),), 1 / shared if complete else 1.0, dtype=self.dtype, device=self.device))
        self._scales = torch.cat(scales)

    def loss_and_gradient(self) -> tuple[float, torch.Tensor]:
        value = 0.0

        def compute() -> torch.Tensor:
            nonlocal value
            value, gradient = self._own_loss_and_gradient()
            return self._spread(gradient.unsqueeze(0))

        whole = self.objective.total(compute, (1, self.shape[0]), self.dtype)
        return sum(self.objective.gathered(lambda: value)), self.space.part(whole)[0]

    def _products(self, rows: torch.Tensor) -> torch.Tensor:
        shape = (len(rows), self.shape[0])
        whole = self.objective.total(lambda: self._spread(self._own_products(rows)), shape, self.dtype, NoSecondDerivativeError)
        return self.space.part(whole)

    def _spread(self, rows: torch.Tensor) -> torch.Tensor:
        """This rank's part of a sum of whole vectors."""
        whole = rows.new_zeros(len(rows), self.shape[0])
        whole[:, self.positions] = rows * self._scales
        return whole


class LaidOutHessian(_LaidOut, Hessian):
    """The Hessian of a laid-out network's loss."""


class LaidOutGaussNewton(_LaidOut, GaussNewton):
    """The Gauss-Newton matrix of a laid-out network's loss."""
