"""The generalized Gauss-Newton matrix: the Hessian without the network's own curvature."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from hessian.estimators.exact_diagonal import gauss_newton_diagonal
from hessian.estimators.exact_trace import exact_traces
from hessian.operators.base import NotExactError
from hessian.operators.curvature import CurvatureOperator, Multiply, Tensors, central_difference, differentiable_twice
from hessian.output_loss import differentiable, loss_in_double
from hessian.parameters import flatten, requiring_grad
from hessian.structure import reachable_parameters

Inner = Callable[[list[torch.Tensor]], list[torch.Tensor]]  # A: from directions of the outputs to the same


class OuterProductOperator(CurvatureOperator):
    r"""Matrices :math:`J^\top A J`, with J the Jacobian of the outputs in the parameters and A a matrix between outputs.

    J v is the derivative, in u, of :math:`J^\top u`, which is linear in u and whose graph is kept (two backward passes
    instead of forward-mode derivatives, which many operations lack).
    """

    @abstractmethod
    def _inner(self, outputs: Any, batch: Any) -> Inner:
        """Products with A for one batch; directions come and go in the outputs' precision."""

    def _differentiate(self, batch: Any, parameters: Mapping[str, nn.Parameter]) -> Multiply:
        outputs = self.objective.outputs(batch)
        inner = self._inner(outputs, batch)
        tensors = differentiable(outputs)
        if not tensors:
            raise ValueError("the outputs depend on no selected parameter: forward detaches them or uses no_grad")
        dummies = [torch.zeros_like(tensor, requires_grad=True) for tensor in tensors]
        pulled = dict(zip(parameters, _pull(tensors, dummies, list(parameters.values()), create_graph=True), strict=True))
        differentiable_twice(pulled.values())

        def multiply(directions: Tensors) -> Tensors:
            known = [name for name in directions if pulled[name].requires_grad]
            if not known:  # the outputs do not depend on these parameters
                return {name: torch.zeros_like(direction) for name, direction in directions.items()}
            pushed = torch.autograd.grad(
                [pulled[name] for name in known],
                dummies,
                grad_outputs=[directions[name] for name in known],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            product = _pull(tensors, inner(list(pushed)), [parameters[name] for name in directions])
            return dict(zip(directions, product, strict=True))

        return multiply

    def _difference(self, batch: Any, parameters: Mapping[str, nn.Parameter]) -> Multiply:
        def multiply(directions: Tensors) -> Tensors:
            def values() -> list[torch.Tensor]:
                with self.objective.undisturbed():  # the same dropout masks and buffers each time
                    return differentiable(self.objective.outputs(batch))

            pushed = central_difference(values, parameters, directions)
            with self.objective.undisturbed():
                outputs = self.objective.outputs(batch)
                weights = self._inner(outputs, batch)(pushed)
                product = _pull(differentiable(outputs), weights, [parameters[name] for name in directions])
            return dict(zip(directions, product, strict=True))

        return multiply


class GaussNewton(OuterProductOperator):
    r"""The generalized Gauss-Newton matrix of any loss that is twice differentiable in the model's outputs.

    .. math:: G = \sum_b \frac{w_b}{\sum w} J_b^\top \big(\nabla_f^2 \, \ell(f_b, y_b)\big) J_b

    (Schraudolph, 2002). Positive semi-definite where the loss is convex in the outputs; equal to the Fisher matrix of the
    model's distribution for cross-entropy without label smoothing and for squared error. The inner matrix is computed
    in float64 where the loss allows it.

    ValueError for a loss that reaches parameters other than through the outputs, or that the model computes itself: a
    Gauss-Newton matrix needs the loss as a function of the outputs.

    >>> import torch, hessian
    >>> model, batch = torch.nn.Linear(2, 1, bias=False), (torch.eye(2), torch.zeros(2, 1))
    >>> hessian.GaussNewton(model, torch.nn.MSELoss(), batch).exact_trace()
    2.0
    """

    def exact_trace(self) -> float:
        """The trace, where per-example gradients of every parameter can be read off the graph; else NotExactError."""
        with requiring_grad(self.parameters), self.objective.undisturbed():
            found = exact_traces(self.objective, self.parameters, gauss_newton=True)
        if found.reasons:
            name, reason = next(iter(found.reasons.items()))
            raise NotExactError(f"the trace of {name!r} is not exact: {reason}")
        return sum(found.traces.values())

    def exact_diagonal(self) -> torch.Tensor:
        """The diagonal, (P,), under the same condition."""
        diagonal = gauss_newton_diagonal(self.objective, self.parameters)
        return flatten([diagonal[name] for name in self.parameters])

    def _inner(self, outputs: Any, batch: Any) -> Inner:
        leaves, loss = loss_in_double(self.objective, outputs, batch)
        check_loss_of_outputs(loss, leaves, dict(self.objective.model.named_parameters()))
        gradients = _gradients(loss, leaves)
        curved = [index for index, gradient in enumerate(gradients) if gradient.requires_grad]

        def multiply(directions: list[torch.Tensor]) -> list[torch.Tensor]:
            if not curved:  # the loss is linear in the outputs
                return [torch.zeros_like(direction) for direction in directions]
            try:
                products = torch.autograd.grad(
                    [gradients[index] for index in curved],
                    leaves,
                    grad_outputs=[directions[index].to(leaves[index].dtype) for index in curved],
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
            except RuntimeError as error:
                raise ValueError(f"the loss cannot be differentiated twice in the outputs: {error}") from error
            return [product.to(direction.dtype) for product, direction in zip(products, directions, strict=True)]

        return multiply


def check_loss_of_outputs(loss: torch.Tensor, leaves: list[torch.Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """ValueError unless the loss reaches the parameters through the outputs alone."""
    if not loss.requires_grad:
        raise ValueError("the loss does not depend on the outputs: it detaches them, or compares something else")
    direct = reachable_parameters(loss, {name: parameter for name, parameter in parameters.items() if parameter.requires_grad})
    if direct:
        raise ValueError(
            f"the loss depends on {direct[0]!r} other than through the outputs (a regularizer?): a Gauss-Newton matrix is "
            "not defined for it; use Hessian, or add the regularizer's curvature as an operator"
        )
    used = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    if all(leaf.dim() == 0 for leaf, gradient in zip(leaves, used, strict=True) if gradient is not None):
        raise ValueError(
            "the model computes its own loss: a Gauss-Newton matrix needs the loss as a function of outputs such as logits; "
            "pass a loss that compares those"
        )


def _pull(
    outputs: list[torch.Tensor], weights: list[torch.Tensor], inputs: list[nn.Parameter], *, create_graph: bool = False
) -> tuple[torch.Tensor, ...]:
    """J^T applied to `weights`."""
    return torch.autograd.grad(
        outputs,
        inputs,
        grad_outputs=weights,
        create_graph=create_graph,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )


def _gradients(loss: torch.Tensor, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
