"""The Hessian of an objective in its parameters."""

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import nn

from hessian.estimators.exact_diagonal import gauss_newton_diagonal
from hessian.estimators.exact_trace import exact_traces
from hessian.operators.base import NotExactError
from hessian.operators.curvature import (
    CurvatureOperator,
    Multiply,
    Tensors,
    central_difference,
    central_differences,
    differentiable_twice,
)
from hessian.parameters import flatten, requiring_grad


class Hessian(CurvatureOperator):
    r"""The matrix of second derivatives of the data set's loss.

    .. math:: (H v)_i = \sum_j \frac{\partial^2 L}{\partial\theta_i\,\partial\theta_j} v_j
              = \frac{\partial}{\partial\theta_i} \big\langle \nabla L(\theta), v \big\rangle

    (Pearlmutter, 1994). `model` may be an Objective; loss and data are then None. See Objective for `data` and its
    weighting, `hessian.parameters` for `params`.

    >>> import torch, hessian
    >>> model, batch = torch.nn.Linear(2, 1, bias=False), (torch.eye(2), torch.zeros(2, 1))
    >>> hessian.Hessian(model, torch.nn.MSELoss(), batch).to_dense()  # of (w_1^2 + w_2^2) / 2
    tensor([[1., 0.],
            [0., 1.]])
    """

    def difference_product(self, vector: torch.Tensor) -> torch.Tensor:
        """H v by central differences of the gradient, (P,): slower and coarser than `@`, and independent of it."""
        return self._row(central_difference(self._gradient_tensors, self.parameters, self._tensors(vector), self._norm))

    def difference_products(self, vector: torch.Tensor) -> Generator[torch.Tensor, None, None]:
        """H v by differences over shorter and shorter steps; the parameters are moved until the generator is closed."""
        directions = self._tensors(vector)
        with contextlib.closing(
            central_differences(self._gradient_tensors, self.parameters, directions, self._norm)
        ) as results:
            for found in results:
                yield self._row(found)

    def _gradient_tensors(self) -> list[torch.Tensor]:
        return list(self._tensors(self.gradient()).values())

    def exact_trace(self) -> float:
        """The trace, where the outputs are piecewise linear in every parameter (one at a time); else NotExactError."""
        with requiring_grad(self.parameters), self.objective.undisturbed():
            found = exact_traces(self.objective, self.parameters)
        if found.reasons:
            name, reason = next(iter(found.reasons.items()))
            raise NotExactError(f"the trace of {name!r} is not exact: {reason}")
        return sum(found.traces.values())

    def exact_diagonal(self) -> torch.Tensor:
        """The diagonal, (P,), under the same condition; it is then that of the Gauss-Newton matrix."""
        self.exact_trace()
        diagonal = gauss_newton_diagonal(self.objective, self.parameters)
        return flatten([diagonal[name] for name in self.parameters])

    def _differentiate(self, batch: Any, parameters: Mapping[str, nn.Parameter]) -> Multiply:
        gradients = self._gradients(batch, parameters, create_graph=True)
        differentiable_twice(gradients.values())

        def multiply(directions: Tensors) -> Tensors:
            curved = [name for name in directions if gradients[name].requires_grad]
            if not curved:  # the loss is linear in every parameter
                return {name: torch.zeros_like(direction) for name, direction in directions.items()}
            product = torch.autograd.grad(
                [gradients[name] for name in curved],
                [parameters[name] for name in directions],
                grad_outputs=[directions[name] for name in curved],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            return dict(zip(directions, product, strict=True))

        return multiply

    def _difference(self, batch: Any, parameters: Mapping[str, nn.Parameter]) -> Multiply:
        def multiply(directions: Tensors) -> Tensors:
            def gradients() -> list[torch.Tensor]:
                with self.objective.undisturbed():  # the same dropout masks and buffers each time
                    return list(self._gradients(batch, {name: parameters[name] for name in directions}).values())

            return dict(zip(directions, central_difference(gradients, parameters, directions), strict=True))

        return multiply

    def _gradients(self, batch: Any, parameters: Mapping[str, nn.Parameter], *, create_graph: bool = False) -> Tensors:
        loss = self.objective.batch_loss(self.objective.outputs(batch), batch)
        if not loss.requires_grad:
            raise ValueError("the loss depends on no selected parameter: forward or loss detach it or use no_grad")
        gradients = torch.autograd.grad(
            loss, list(parameters.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
        )
        return dict(zip(parameters, gradients, strict=True))
