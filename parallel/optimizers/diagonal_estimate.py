"""The Hessian's diagonal as an optimizer sees it: few probes, by parameter, in whole tensors."""

from collections.abc import Mapping

import torch

from hessian.operators.base import LinearOperator
from hessian.parameters import unflatten


def parameters_of(operator: LinearOperator) -> Mapping[str, torch.Tensor]:
    """The parameters whose coordinates an operator's vectors have, in their order; TypeError where it has none."""
    parameters = getattr(operator, "parameters", None)
    if not isinstance(parameters, Mapping):
        raise TypeError(
            f"a {type(operator).__name__} does not tell the parameters of its coordinates: pass hessian.Hessian(...) or what "
            "parallel.curvature.hessian(...) returns, not a sum or a multiple"
        )
    return parameters


def estimated_diagonal(
    operator: LinearOperator, samples: int = 1, generator: torch.Generator | None = None
) -> dict[str, torch.Tensor]:
    r"""An unbiased estimate of the diagonal, as a whole tensor for every parameter, the same on every rank.

    .. math:: \frac{1}{K} \sum_{k=1}^K z_k \odot H z_k, \qquad z_{ki} = \pm 1

    (Bekas, Kokiopoulou & Saad, 2007); one product a sample. Collective where the operator is. Raises ArithmeticError where a
    product is not finite, naming the parameter.
    """
    parameters = parameters_of(operator)
    signs = operator.space.random(samples, "rademacher", generator)
    mean = (signs * operator.rows(signs)).mean(0, keepdim=True)
    found = dict(zip(parameters, unflatten(operator.space.whole(mean)[0], list(parameters.values())), strict=True))
    for name, tensor in found.items():
        if not tensor.isfinite().all():
            raise ArithmeticError(f"the curvature of {name!r} is not finite")
    return found
