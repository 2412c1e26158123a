"""Curvature of a model that several processes train: operators that every estimator of `hessian` takes."""

from collections.abc import Callable
from typing import Any

from torch import distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hessian.objective import Data, LossFunction, Objective
from hessian.operators.base import LinearOperator
from hessian.operators.curvature import CurvatureOperator
from hessian.operators.gauss_newton import GaussNewton
from hessian.operators.hessian import Hessian
from hessian.parameters import Selection
from hessian.split_data import SplitObjective
from parallel.coupled import CoupledObjective, couples_examples
from parallel.gathered import Gathered, is_fully_sharded
from parallel.laid_out_curvature import LaidOutGaussNewton, LaidOutHessian, LaidOutObjective
from parallel.layouts.network import LaidOut
from parallel.sharded_vectors import ShardedVectors
from parallel.tensor_parallel import TensorParallelGaussNewton, TensorParallelHessian, group_of


def hessian(model: nn.Module, loss: LossFunction, data: Data, params: Selection = None, **options: Any) -> LinearOperator:
    """The Hessian of the loss over all ranks' data; an operator like `hessian.Hessian`. Collective.

    model: plain or wrapped by DistributedDataParallel (the same on every rank), sharded by FSDP2, with DTensor parameters as
    `parallelize_module` makes them, or laid out over a grid (`parallel.LaidOut`). data: this rank's part, of any size, weighted
    by items over all ranks; ranks that share the layers of a tensor-parallel or laid-out model pass the same data. Every rank
    must make the operator and call what multiplies by it; an error on one rank is raised on all that share the data.

    Options: group, the ranks that hold parts of the data (default: those of DDP or FSDP2, all for a plain model, none but the
    rank itself for a tensor-parallel one); micro_batch, as for `hessian.Hessian`; shard_vectors, whether each rank keeps a part
    of every vector (default: for FSDP2 and tensor-parallel models, which have no other way), so that a Krylov basis takes
    1 / ranks of the memory. Results are the same on every rank but for vectors in parts.
    """
    kinds = (Hessian, TensorParallelHessian, LaidOutHessian)
    return _operator(*kinds, model, loss, data, params, **options)


def gauss_newton(model: nn.Module, loss: LossFunction, data: Data, params: Selection = None, **options: Any) -> LinearOperator:
    """The Gauss-Newton matrix of the loss over all ranks' data; otherwise as `hessian`."""
    kinds = (GaussNewton, TensorParallelGaussNewton, LaidOutGaussNewton)
    return _operator(*kinds, model, loss, data, params, **options)


def objective(
    model: nn.Module,
    loss: LossFunction,
    data: Data,
    *,
    group: ProcessGroup | None = None,
    micro_batch: int | None = None,
) -> Objective:
    """The loss over all ranks' data: `hessian.layer_report`, landscapes and operators take it in place of a model.

    Of a model that FSDP2 shards, whole parameters are gathered, as they now are, and stay on every rank with it. TypeError for
    a tensor-parallel model, which no rank has whole.
    """
    if isinstance(model, DistributedDataParallel):
        group, model = group or model.process_group, model.module
    if is_fully_sharded(model):
        group = group or _group(model)
        model = Gathered(model, group)
    elif isinstance(model, LaidOut):
        return LaidOutObjective(model, loss, data, micro_batch=micro_batch)
    elif (name := _sharded_parameter(model)) is not None:
        raise TypeError(f"parameter {name!r} is in parts on several ranks: use parallel.curvature.hessian or gauss_newton")
    if not distributed.is_initialized():
        return Objective(model, loss, data, micro_batch=micro_batch)
    kind = CoupledObjective if couples_examples(model) else SplitObjective
    return kind(model, loss, data, group=group, micro_batch=micro_batch)


def _operator(
    plain: type[CurvatureOperator],
    in_parts: type[CurvatureOperator],
    laid_out: Callable[[LaidOutObjective, Selection], CurvatureOperator],
    model: nn.Module,
    loss: LossFunction,
    data: Data,
    params: Selection,
    *,
    group: ProcessGroup | None = None,
    micro_batch: int | None = None,
    shard_vectors: bool | None = None,
) -> LinearOperator:
    if isinstance(model, LaidOut):
        return laid_out(LaidOutObjective(model, loss, data, micro_batch=micro_batch), params)
    if _sharded_parameter(model) is not None and not is_fully_sharded(model):
        split = SplitObjective(model, loss, data, group=group, micro_batch=micro_batch) if group is not None else None
        return in_parts(split or Objective(model, loss, data, micro_batch=micro_batch), params=params)
    whole = objective(model, loss, data, group=group, micro_batch=micro_batch)
    operator = plain(whole, params=params)
    shard_vectors = is_fully_sharded(model) if shard_vectors is None else shard_vectors
    if not shard_vectors:
        return operator
    if not isinstance(whole, SplitObjective):
        raise ValueError("shard_vectors=True divides vectors among ranks: call torch.distributed.init_process_group first")
    if isinstance(whole.model, Gathered):
        return ShardedVectors(operator, whole.group, whole.model.refresh)
    return ShardedVectors(operator, whole.group)


def _sharded_parameter(model: nn.Module) -> str | None:
    return next((name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)), None)


def _group(model: nn.Module) -> ProcessGroup | None:
    """The ranks among which FSDP2 divides the parameters, which are those that share the data."""
    return group_of(next(one for one in model.parameters() if isinstance(one, DTensor)).device_mesh)
