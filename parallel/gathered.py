"""A model that FSDP2 shards, as a module with whole parameters: its curvature can be computed without FSDP's hooks."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from hessian.split_data import least_of_all


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether FSDP2's `fully_shard` was applied to the model or a part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


class Gathered(nn.Module):
    """`model` with the values that its parameters have, gathered on every rank of `group`; collective to make and to refresh.

    It has the model's names, buffers and modes; the model itself is not changed.
    """

    def __init__(self, model: nn.Module, group: ProcessGroup | None) -> None:
        super().__init__()
        self.group = group
        self._inner = (model,)  # in a tuple, so that it is no submodule
        self._whole: dict[str, torch.Tensor] = {
            name: nn.Parameter(_full(parameter), requires_grad=parameter.requires_grad)
            for name, parameter in model.named_parameters()
        }
        self._parts = [part.clone() for part in self._current()]

    @torch.no_grad()
    def refresh(self) -> None:
        """Gather the parameters anew, where some rank's have changed since."""
        current = self._current()
        same = all(torch.equal(new, old) for new, old in zip(current, self._parts, strict=True))
        if least_of_all(float(same), current[0].device, self.group):
            return
        for name, parameter in self._inner[0].named_parameters():
            self._whole[name].copy_(_full(parameter))
        self._parts = [part.clone() for part in current]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (model,) = self._inner
        with _without_hooks(model):
            return functional_call(model, self._whole, args, kwargs)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        del recurse, remove_duplicate
        for name, parameter in self._whole.items():
            assert isinstance(parameter, nn.Parameter)
            yield f"{prefix}.{name}" if prefix else name, parameter

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        yield from self._inner[0].named_modules(memo, prefix, remove_duplicate)

    def _current(self) -> list[torch.Tensor]:
        """This rank's parts of the parameters; their version counters do not tell of FSDP's updates."""
        parameters: Iterator[Any] = self._inner[0].parameters()
        return [(one.to_local() if isinstance(one, DTensor) else one).detach() for one in parameters]


@torch.no_grad()
def _full(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach().clone()


@contextlib.contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """FSDP's own hooks, which gather and free parameters, are set aside inside."""
    taken = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.fsdp"):
                    taken.append((hooks, dict(hooks)))
                    del hooks[key]
    try:
        yield
    finally:
        for hooks, before in reversed(taken):
            hooks.clear()
            hooks.update(before)
