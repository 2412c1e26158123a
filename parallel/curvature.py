"""Curvature of a model that several processes train: operators that every estimator of `hessian` takes."""

from torch import distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hessian.objective import Data, LossFunction, Objective
from hessian.operators.gauss_newton import GaussNewton
from hessian.operators.hessian import Hessian
from hessian.parameters import Selection
from hessian.split_data import SplitObjective


def hessian(
    model: nn.Module,
    loss: LossFunction,
    data: Data,
    params: Selection = None,
    *,
    group: ProcessGroup | None = None,
    micro_batch: int | None = None,
) -> Hessian:
    """The Hessian of the loss over all ranks' data; an operator like `hessian.Hessian`, the same on every rank.

    model: the same on every rank, plain or wrapped by DistributedDataParallel, whose group is then the default. data: this
    rank's part, of any size, weighted by items over all ranks. Collective: every rank must make the operator, and call
    what multiplies by it. An error on one rank is raised on all.
    """
    return Hessian(objective(model, loss, data, group=group, micro_batch=micro_batch), params=params)


def gauss_newton(
    model: nn.Module,
    loss: LossFunction,
    data: Data,
    params: Selection = None,
    *,
    group: ProcessGroup | None = None,
    micro_batch: int | None = None,
) -> GaussNewton:
    """The Gauss-Newton matrix of the loss over all ranks' data; otherwise as `hessian`."""
    return GaussNewton(objective(model, loss, data, group=group, micro_batch=micro_batch), params=params)


def objective(
    model: nn.Module,
    loss: LossFunction,
    data: Data,
    *,
    group: ProcessGroup | None = None,
    micro_batch: int | None = None,
) -> Objective:
    """The loss over all ranks' data: `hessian.layer_report`, landscapes and operators take it in place of a model."""
    if isinstance(model, DistributedDataParallel):
        group, model = group or model.process_group, model.module
    sharded = next((name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)), None)
    if sharded is not None:
        raise TypeError(f"parameter {sharded!r} is sharded: only models that are whole on every rank are supported so far")
    if not distributed.is_initialized():
        return Objective(model, loss, data, micro_batch=micro_batch)
    return SplitObjective(model, loss, data, group=group, micro_batch=micro_batch)
