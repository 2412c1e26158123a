"""The network as the ranks hold it: whole on each of them, or in parts."""

import contextlib
from collections.abc import Iterator
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from hessian.batch import tensors_of
from hessian.diagnosis import explained_forward
from hessian.structure import reachable_parameters
from parallel.evaluation_mode import in_evaluation_mode
from parallel.gathered import Gathered
from parallel.layouts.batch_norm import globalize

# whether rank 0's buffers go to all before a pass; renamed in torch 2.13
_BUFFERS = (
    "forward_sync_buffers" if "forward_sync_buffers" in signature(DistributedDataParallel).parameters else "broadcast_buffers"
)


class Replica:
    """A model, the same on all ranks, whose gradients are summed over those that share the batch. Collective.

    sum_gradients: what a loss must be multiplied by so that gradients of all ranks add up. some_unused: parameters may get no
    gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: DeviceMesh,
        *,
        shard: bool = False,
        global_batch_norm: bool = True,
        some_unused: bool = False,
    ) -> None:
        group = mesh.get_group()
        ranks = mesh.size()
        if ranks > 1 and global_batch_norm:
            globalize(model, group)
        self.model, self.sum_gradients = model, float(ranks)  # for DDP and FSDP2 divide the sum by the ranks
        self._call: nn.Module = model
        self._group = group
        if shard:
            for module in [*blocks(model), model]:
                fully_shard(module, mesh=mesh)
        elif ranks > 1:
            options: dict[str, Any] = {_BUFFERS: not global_batch_norm, "find_unused_parameters": some_unused}
            self._call = DistributedDataParallel(model, process_group=group, init_sync=False, **options)

    def __call__(self, inputs: Any) -> Any:
        return self._call(inputs)

    def outputs(self, inputs: Any) -> Any:
        """The model's outputs without regard to gradients, whatever the other ranks do."""
        return self.model(inputs)

    def accumulating(self, more: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients stay on each rank while there are `more` passes to come."""
        if isinstance(self._call, FSDPModule):
            self._call.set_requires_gradient_sync(not more)
        elif more and isinstance(self._call, DistributedDataParallel):
            return self._call.no_sync()
        return contextlib.nullcontext()

    def finish_gradients(self) -> None:
        """Behind the last pass: sum the gradients over ranks, where that did not happen during the pass."""

    def own_examples(self, examples: int) -> tuple[int, int]:
        """Which of the examples that this rank passes in its outputs are of."""
        return 0, examples

    def gradient_norm(self) -> torch.Tensor:
        """The Euclidean norm of the whole gradient, (), the same on every rank."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def shorten_gradient(self, norm: torch.Tensor, longest: float) -> None:
        """Scale the gradient down to `longest`, where its `norm` is more."""
        self.scale_gradient((longest / (norm + 1e-6)).clamp(max=1.0))

    def scale_gradient(self, factor: torch.Tensor | float) -> None:
        """Multiply the gradient."""
        gradients = [local_part(parameter.grad) for parameter in self.model.parameters() if parameter.grad is not None]
        torch._foreach_mul_(gradients, factor)

    @property
    def measured_model(self) -> nn.Module:
        """What `parallel.curvature` takes."""
        return self.model

    def curvature_model(self) -> nn.Module:
        """The model as second derivatives of its outputs can be taken: the same weights, whole where FSDP2 shards them.
        Collective."""
        if isinstance(self._call, FSDPModule):
            return Gathered(self.model, self._group)
        return self.model

    def state(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers by name, each rank's own parts; they change with the model."""
        return {name: tensor.detach() for name, tensor in self.model.state_dict(keep_vars=True).items()}


def has_unused_parameters(model: nn.Module, example: Any) -> bool:
    """Whether there are parameters that the outputs do not depend on. example: a batch of one input."""
    parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
    with in_evaluation_mode(model), torch.random.fork_rng(), torch.enable_grad(), explained_forward(model, example):
        total = sum(tensor.float().sum() for tensor in tensors_of(model(example)) if tensor.requires_grad)
    return isinstance(total, torch.Tensor) and len(reachable_parameters(total, parameters)) < len(parameters)


def local_part(tensor: Any) -> torch.Tensor:
    """This rank's part of a tensor, which changes with it."""
    local: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors gathered, on the CPU. Collective."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to("cpu", copy=True).contiguous()
        for name, tensor in tensors.items()
    }


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that a network repeats: those in a Sequential or a ModuleList that have weights and modules of their own."""
    lists = [module for module in model.modules() if isinstance(module, nn.Sequential | nn.ModuleList)]
    found = [child for module in lists for child in module if _has_any(child.parameters()) and _has_any(child.children())]
    return [one for one in found if not isinstance(one, nn.Sequential | nn.ModuleList)]


def _has_any(items: Iterator[Any]) -> bool:
    return next(items, None) is not None


def checkpoint_activations(model: nn.Module) -> int:
    """Let every block keep its inputs alone for the backward pass, and compute the rest anew; how many blocks there are."""
    found = blocks(model)
    for block in found:
        block.forward = _checkpointed(block)  # of this instance alone
    return len(found)


def _checkpointed(block: nn.Module) -> Any:
    inner = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        contexts = lambda: (contextlib.nullcontext(), _RememberingNothing(block))  # noqa: E731
        return checkpoint(inner, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return forward


class _RememberingNothing:
    """Batch norms inside leave their running moments alone: the first pass has seen to them.

    It can be entered again, as second derivatives do, which compute a block anew twice.
    """

    def __init__(self, block: nn.Module) -> None:
        self._norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    def __enter__(self) -> None:
        self._before = [(module.momentum, module.num_batches_tracked) for module in self._norms]
        for module in self._norms:
            module.momentum, module.num_batches_tracked = 0.0, None

    def __exit__(self, *_: object) -> None:
        for module, (momentum, count) in zip(self._norms, self._before, strict=True):
            module.momentum, module.num_batches_tracked = momentum, count
