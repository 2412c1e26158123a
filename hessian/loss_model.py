"""The second-order model of the loss: what a change of the parameters will do to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from hessian.colours import BLUE
from hessian.drawn import new_axes
from hessian.objective import Data, LossFunction, Objective
from hessian.operators.hessian import Hessian
from hessian.parameters import Selection, flatten, unflatten
from hessian.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Increase:
    """g . d and 1/2 d . H d, in units of the loss."""

    first_order: float
    second_order: float

    @property
    def total(self) -> float:
        return self.first_order + self.second_order


@dataclass(frozen=True, repr=False)
class PredictedIncrease(Table):
    """How much the loss is predicted to rise.

    total, first_order, second_order: of the whole change. layers: the parts of each parameter tensor, g_l . d_l and
    1/2 d_l . (H d)_l, which contain its cross terms with all others and add up to the whole.
    """

    layers: Mapping[str, Increase]

    @property
    def first_order(self) -> float:
        return sum(part.first_order for part in self.layers.values())

    @property
    def second_order(self) -> float:
        return sum(part.second_order for part in self.layers.values())

    @property
    def total(self) -> float:
        return self.first_order + self.second_order

    def __float__(self) -> float:
        return self.total

    def header(self) -> list[str]:
        return ["name", "g . d", "d . H d / 2", "total"]

    def cells(self) -> list[list[str]]:
        parts = {**self.layers, "all": Increase(self.first_order, self.second_order)}
        return [
            [name, f"{part.first_order:.4g}", f"{part.second_order:.4g}", f"{part.total:.4g}"] for name, part in parts.items()
        ]

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw each tensor's part on a logarithmic axis, negative ones hatched; `ax=None` makes a new figure."""
        from hessian.bars import signed_bars

        ax = new_axes(len(self.layers)) if ax is None else ax
        totals = [part.total for part in self.layers.values()]
        signed_bars(ax, list(self.layers), totals, [0.0] * len(totals), BLUE)
        ax.set_xlabel("predicted increase of the loss")
        return ax


def predict_increase(
    model: nn.Module | Objective,
    loss: LossFunction | None = None,
    data: Data | None = None,
    delta: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
    params: Selection = None,
) -> PredictedIncrease:
    r"""The change of the loss that its second-order Taylor polynomial predicts for a change of the parameters.

    .. math:: L(\theta + d) - L(\theta) \approx g \cdot d + \tfrac12\, d^\top H d

    from one gradient and one Hessian-vector product. `delta`: (P,), in `named_parameters` order over the selected parameters,
    or tensors by parameter name, which then are the selected ones. ValueError where they do not fit.

    >>> import torch, hessian
    >>> model, batch = torch.nn.Linear(1, 1, bias=False), (torch.ones(1, 1), torch.zeros(1, 1))
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> increase = hessian.predict_increase(model, torch.nn.MSELoss(), batch, torch.tensor([0.5]))  # of w^2, from 1 to 1.5
    >>> increase.first_order, increase.second_order, increase.total
    (1.0, 0.25, 1.25)
    """
    if delta is None:
        raise TypeError("delta is needed: the change of the parameters, (P,) or tensors by name")
    if isinstance(delta, Mapping):
        if params is not None:
            raise TypeError("delta by name says which parameters change: leave params out")
        params = list(delta)
    operator = Hessian(model, loss, data, params)
    direction = _flat(delta, operator)
    gradient = operator.gradient()
    product = operator @ direction
    parameters = list(operator.parameters.values())
    pieces = [unflatten(vector.double(), parameters) for vector in (gradient, product, direction)]
    layers = {
        name: Increase(float((g * d).sum()), float((h * d).sum()) / 2)
        for name, g, h, d in zip(operator.parameters, *pieces, strict=True)
    }
    return PredictedIncrease(layers)


def _flat(delta: torch.Tensor | Mapping[str, torch.Tensor], operator: Hessian) -> torch.Tensor:
    if not isinstance(delta, Mapping):
        if delta.shape != (operator.shape[0],):
            raise ValueError(f"delta has shape {tuple(delta.shape)}: pass ({operator.shape[0]},), or tensors by parameter name")
        return delta.detach().to(operator.device, operator.dtype)
    for name, parameter in operator.parameters.items():
        if name not in delta:
            raise ValueError(f"delta names a pattern that stands for {name!r}: name every parameter that changes by itself")
        if delta[name].shape != parameter.shape:
            raise ValueError(f"delta of {name!r} has shape {tuple(delta[name].shape)}, the parameter {tuple(parameter.shape)}")
    return flatten([delta[name].detach().to(operator.device, operator.dtype) for name in operator.parameters])
