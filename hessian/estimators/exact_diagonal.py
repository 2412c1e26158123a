r"""The diagonal of the Gauss-Newton or empirical Fisher matrix without sampling: squares of per-example gradients.

.. math:: \mathrm{diag}(G)_i = \sum_n \sum_c \Big( \frac{\partial f_n}{\partial \theta_i} \cdot u_{nc} \Big)^2,
          \qquad \sum_c u_{nc} u_{nc}^\top = \nabla_f^2 \ell_n

for the Gauss-Newton matrix; `output_cotangents` tells what u is for the others.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from hessian.estimators.gradient_factors import GradientFactors
from hessian.estimators.layer_gradients import LayerGradients, layer_gradients
from hessian.estimators.per_example import is_vector, vector_gradients
from hessian.objective import Objective
from hessian.operators.base import NotExactError
from hessian.parameters import flatten, requiring_grad, unflatten
from hessian.structure import WeightUse


def gauss_newton_diagonal(
    objective: Objective, parameters: Mapping[str, nn.Parameter], kind: Literal["exact", "empirical"] = "exact"
) -> dict[str, torch.Tensor]:
    """The diagonal, shaped like each parameter; NotExactError with the reason.

    exact: of the Gauss-Newton matrix, one backward pass an output and batch; empirical: of the empirical Fisher matrix, one
    an item of an example.
    """
    like = list(parameters.values())
    size = sum(parameter.numel() for parameter in like)
    whole = objective.total(lambda: _own_diagonal(objective, parameters, kind), (size,), like[0].dtype, NotExactError)
    return dict(zip(parameters, unflatten(whole, like), strict=True))


def _own_diagonal(
    objective: Objective, parameters: Mapping[str, nn.Parameter], kind: Literal["exact", "empirical"]
) -> torch.Tensor:
    """The part of this process's data, (P,)."""
    diagonal = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    try:
        with requiring_grad(parameters), objective.undisturbed():
            for part in layer_gradients(objective, parameters, kind, seed=0, own=True):
                with torch.no_grad():
                    for name, use in part.uses.items():
                        squares = part.weight * _squares(part, use, parameters[name])
                        diagonal[name] += squares.view(parameters[name].shape).to(parameters[name])
                del part  # with it goes the batch's graph, before the next is made
    except ValueError as error:
        raise NotExactError(str(error)) from error
    return flatten(list(diagonal.values())).detach()


def _squares(part: LayerGradients, use: WeightUse, parameter: nn.Parameter) -> torch.Tensor:
    """Squares of one parameter's per-example gradients, summed over cotangents and examples."""
    if is_vector(use):
        gradients = [vector_gradients(use, gradient, len(part.counted)) for gradient in part.gradients[use.node]]
        return torch.stack([gradient.square().sum(0) for gradient in gradients]).sum(0)
    factors = GradientFactors(use, parameter, part.gradients[use.node], len(part.counted))
    total = parameter.new_zeros(())
    for examples in factors.chunks():
        inputs = factors.inputs(examples)
        for outputs in factors.output_gradients(examples):
            if factors.positions == 1:
                squares = torch.einsum("ngop,ngkp->gok", outputs.square(), inputs.square())
            else:
                squares = (outputs @ inputs.mT).square().sum(0)
            total = total + (squares.mT if factors.inputs_first else squares)
    return total
