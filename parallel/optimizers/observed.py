"""What optimizers share that step by a curvature operator: it is observed, then a step is taken in its coordinates."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, cast, runtime_checkable

import torch

from hessian.operators.base import LinearOperator
from hessian.parameters import unflatten
from hessian.space import VectorSpace
from parallel.optimizers.by_parameter import matched, own_part
from parallel.replica import local_part


@runtime_checkable
class Curvature(Protocol):
    """A curvature matrix with the loss that it is of: `hessian`'s operators and those of `parallel.curvature`."""

    @property
    def parameters(self) -> Mapping[str, torch.Tensor]: ...

    @property
    def space(self) -> VectorSpace: ...

    def loss_and_gradient(self) -> tuple[float, torch.Tensor]: ...

    def loss_value(self) -> float: ...

    def __matmul__(self, vectors: torch.Tensor) -> torch.Tensor: ...


class ByOperator(torch.optim.Optimizer):
    """An optimizer of one group of parameters, each step of which needs an operator of just these."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        if len(self.param_groups) != 1:
            raise ValueError(
                f"{type(self).__name__} moves all parameters by one step: pass one group, not {len(self.param_groups)}"
            )
        self._operator: Curvature | None = None
        self._matched: list[torch.Tensor] = []

    def needs_curvature(self) -> bool:
        """Whether the coming step needs `observe`: every step does."""
        return True

    def observe(self, operator: LinearOperator, generator: torch.Generator | None = None) -> None:
        """The coming step is to use the loss and the curvature of `operator`.

        operator: such as `hessian.Hessian(model, loss, batch)` or `parallel.curvature.hessian(...)`, of the optimizer's
        parameters: the same tensors, or of the same names. generator: not used, for nothing here is random. ValueError for an
        operator of other parameters, TypeError for one that knows no loss.
        """
        del generator
        if not isinstance(operator, Curvature):
            raise TypeError(
                f"a {type(operator).__name__} knows no loss: observe an operator that does, such as "
                "hessian.Hessian(model, loss, batch)"
            )
        self._matched = matched(self.param_groups, operator.parameters)
        self._operator = cast(Curvature, operator)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, collective where the operator is. closure: called first, its value is returned.

        RuntimeError without an `observe` since the step before.
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        if self._operator is None:
            raise RuntimeError(
                f"{type(self).__name__} steps by curvature: call observe(hessian.Hessian(model, loss, batch)) before step()"
            )
        operator, self._operator = self._operator, None
        self._advance(operator)
        return value

    @abstractmethod
    def _advance(self, operator: Curvature) -> None:
        """Change the parameters."""

    def _positions(self) -> list[torch.Tensor]:
        """Copies of this rank's parts of the parameters, in the operator's order."""
        return [local_part(one).clone() for one in self._matched]

    def _move(self, operator: Curvature, origin: list[torch.Tensor], step: torch.Tensor | None, scale: float = 1.0) -> None:
        """Put the parameters at `origin` + scale * step, or at `origin` itself; `step` is a vector of the operator's."""
        if step is None:
            for one, before in zip(self._matched, origin, strict=True):
                local_part(one).copy_(before)
            return
        whole = operator.space.whole(step[None])[0]
        for one, before, piece in zip(self._matched, origin, unflatten(whole, self._matched), strict=True):
            torch.add(before, own_part(piece, one), alpha=scale, out=local_part(one))

    @property
    def _shared_state(self) -> dict[str, Any]:
        """What is of no parameter in particular is kept with the first, where `state_dict` finds it."""
        state: dict[str, Any] = self.state[self.param_groups[0]["params"][0]]
        return state


def inner(space: VectorSpace, left: list[torch.Tensor], right: list[torch.Tensor]) -> list[float]:
    """The inner products of vectors, pair by pair, in float64 and by one reduction."""
    found: list[float] = space.inner(torch.stack(left), torch.stack(right)).tolist()
    return found
