"""Curvature as an adaptive optimizer sees it."""

import torch

from hessian.operators.base import LinearOperator
from hessian.operators.curvature import CurvatureOperator
from hessian.space import VectorSpace


class Preconditioned(LinearOperator):
    """D^-1/2 A D^-1/2 for a positive diagonal D, (P,)."""

    def __init__(self, operator: LinearOperator, diagonal: torch.Tensor) -> None:
        if diagonal.shape != (operator.shape[0],):
            raise ValueError(f"a diagonal of shape {tuple(diagonal.shape)} for an operator of size {operator.shape[0]}")
        if not bool((diagonal > 0).all()) or not bool(torch.isfinite(diagonal).all()):
            raise ValueError("the diagonal of a preconditioner must be positive and finite: add the optimizer's eps to it")
        self._operator = operator
        self._scale = diagonal.detach().to(operator.device, operator.dtype).rsqrt()
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device

    @property
    def space(self) -> VectorSpace:
        return self._operator.space

    def _matmat(self, vectors: torch.Tensor) -> torch.Tensor:
        scale = self._scale.unsqueeze(1)
        return scale * (self._operator @ (scale * vectors))


def preconditioned(operator: LinearOperator, diagonal: torch.Tensor) -> Preconditioned:
    r"""The operator :math:`D^{-1/2} A D^{-1/2}`, D = diag(`diagonal`), which has the eigenvalues of :math:`D^{-1} A`.

    With the diagonal of `adam_preconditioner`, its largest eigenvalue is Adam's preconditioned sharpness, which training
    drives to 38 / learning rate with the usual betas (Cohen et al., 2022, "Adaptive gradient methods at the edge of
    stability").

    >>> import torch, hessian
    >>> A = hessian.Dense(torch.diag(torch.tensor([4.0, 9.0])))
    >>> hessian.preconditioned(A, torch.tensor([4.0, 1.0])) @ torch.ones(2)
    tensor([1., 9.])
    """
    return Preconditioned(operator, diagonal)


def adam_preconditioner(optimizer: torch.optim.Optimizer, operator: CurvatureOperator) -> torch.Tensor:
    r"""Adam's current diagonal :math:`\sqrt{v / (1 - \beta_2^t)} + \epsilon`, (P,), in the operator's order of parameters.

    Reads the state of torch.optim.Adam, AdamW and NAdam (`exp_avg_sq`, `step`; amsgrad too), and of RMSprop (`square_avg`).
    ValueError for a parameter that the optimizer has not stepped yet.
    """
    pieces = []
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in operator.parameters.items():
        state, group = optimizer.state.get(parameter, {}), groups.get(id(parameter), {})
        if "exp_avg_sq" in state:
            moment = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
            second = moment / (1 - group["betas"][1] ** float(state["step"]))
        elif "square_avg" in state:
            second = state["square_avg"] - state["grad_avg"] ** 2 if group.get("centered") else state["square_avg"]
        else:
            raise ValueError(f"the optimizer keeps no second moment of {name!r}: take a step first, or leave it out by params=")
        pieces.append((second.sqrt() + group["eps"]).reshape(-1))
    return torch.cat(pieces)
