"""What optimizers share that compute on each rank's parts of the parameters."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch.distributed.tensor import DTensor

from parallel.optimizers.hyperparameters import check
from parallel.replica import local_part


@dataclass(frozen=True)
class Trained:
    """The parameters that have a gradient, of all groups together; lists of one entry a parameter.

    weights, gradients: this rank's parts, plain tensors; the weights change with the parameters.
    """

    parameters: list[torch.Tensor]
    weights: list[torch.Tensor]
    gradients: list[torch.Tensor]
    groups: list[dict[str, Any]]
    states: list[dict[str, Any]]

    def of(self, name: str) -> list[float]:
        """A hyperparameter, as each parameter's group has it."""
        return [float(group[name]) for group in self.groups]

    def slot(self, name: str) -> list[torch.Tensor]:
        """This rank's parts of the tensors that the optimizer keeps by that name, zero at first."""
        return slot(self.parameters, self.states, name)

    def count(self) -> list[int]:
        """How many steps each parameter has taken, this one included."""
        for state in self.states:
            state["step"] = int(state.get("step", 0)) + 1
        return [state["step"] for state in self.states]

    def only(self, indices: Sequence[int]) -> "Trained":
        """Some of the parameters."""
        fields = (self.parameters, self.weights, self.gradients, self.groups, self.states)
        return Trained(*([field[index] for index in indices] for field in fields))  # type: ignore[arg-type]


class PartwiseOptimizer(torch.optim.Optimizer):
    """An optimizer of plain tensors and DTensors in any mixture: a step is computed on this rank's parts by foreach operations.

    `slots` names what it keeps for a parameter. Parameters without a gradient are left alone. Raises ValueError for
    hyperparameters out of their range, of any group, and for the state of another kind of optimizer; RuntimeError for sparse
    gradients.
    """

    slots: tuple[str, ...]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; hyperparameters that the group lacks are the optimizer's own."""
        super().add_param_group(param_group)
        check(self.param_groups[-1])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's."""
        name = type(self).__name__
        for group in state_dict["param_groups"]:
            missing = sorted(self.defaults.keys() - group.keys())
            if missing:
                raise ValueError(f"the state is of another optimizer: its groups have no {missing[0]!r}, those of {name} have")
        for state in state_dict["state"].values():
            unknown = sorted(state.keys() - set(self.slots))
            if unknown:
                raise ValueError(
                    f"the state is of another optimizer: it keeps {unknown[0]!r}, {name} keeps {', '.join(self.slots)}"
                )
        super().load_state_dict(state_dict)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; `closure` computes the loss and its gradient anew, and its result is returned. Collective, where
        parameters are in parts."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        trained = self._trained()
        if trained.parameters:
            self._update(trained)
        return loss

    @abstractmethod
    def _update(self, trained: Trained) -> None:
        """Change the weights."""

    def _trained(self) -> Trained:
        found = [
            (parameter, own_part(parameter), self._gradient(parameter), group, self.state[parameter])
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        return Trained(*(list(column) for column in zip(*found, strict=True))) if found else Trained([], [], [], [], [])

    def _gradient(self, parameter: torch.Tensor) -> torch.Tensor:
        gradient = parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients: make the embedding with sparse=False")
        if isinstance(parameter, DTensor) and isinstance(gradient, DTensor) and gradient.placements != parameter.placements:
            gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
        return own_part(gradient)


def slot(parameters: Sequence[torch.Tensor], states: Sequence[dict[str, Any]], name: str) -> list[torch.Tensor]:
    """This rank's parts of the tensors in `states` by that name, one for each of `parameters`; zero where there is none."""
    for parameter, state in zip(parameters, states, strict=True):
        if name not in state:
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return [own_part(state[name]) for state in states]


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, without its graph; it changes with the tensor."""
    return local_part(tensor).detach()
