"""The Hessian of an objective in its parameters, by double backward."""

import torch
from torch import nn

from hessian.objective import Data, LossFunction, Objective
from hessian.operators.base import LinearOperator
from hessian.parameters import Selection, flatten, requiring_grad, select_parameters, unflatten


class Hessian(LinearOperator):
    r"""The matrix of second derivatives of the data set's loss.

    .. math:: (H v)_i = \sum_j \frac{\partial^2 L}{\partial\theta_i\,\partial\theta_j} v_j
              = \frac{\partial}{\partial\theta_i} \big\langle \nabla L(\theta), v \big\rangle

    (Pearlmutter, 1994). Coordinates follow `named_parameters` order over the selected parameters. The parameters'
    current values and the modules' current modes count; nothing of the model is changed.

    `model` may be an Objective; loss and data are then None. See Objective for `data` and its weighting.
    """

    def __init__(
        self,
        model: nn.Module | Objective,
        loss: LossFunction | None = None,
        data: Data | None = None,
        params: Selection = None,
    ) -> None:
        self.objective = as_objective(model, loss, data)
        self.parameters = select_parameters(self.objective.model, params)
        first = next(iter(self.parameters.values()))
        for name, parameter in self.parameters.items():
            if (parameter.dtype, parameter.device) != (first.dtype, first.device):
                raise TypeError(
                    f"parameter {name!r} is {parameter.dtype} on {parameter.device}, others are {first.dtype} on "
                    f"{first.device}: select parameters of one kind"
                )
        size = sum(parameter.numel() for parameter in self.parameters.values())
        self.shape, self.dtype, self.device = (size, size), first.dtype, first.device

    def block(self, params: Selection) -> "Hessian":
        """The diagonal block of the parameters that `params` (names, globs) chooses."""
        return Hessian(self.objective, params=params)

    def _matmat(self, vectors: torch.Tensor) -> torch.Tensor:
        parameters = list(self.parameters.values())
        products = torch.zeros_like(vectors)
        with requiring_grad(self.parameters), self.objective.undisturbed():
            for batch, weight in self.objective.weighted_batches():
                loss = self.objective.batch_loss(self.objective.outputs(batch), batch)
                if not loss.requires_grad:
                    raise ValueError("the loss depends on no selected parameter: forward or loss detach it or use no_grad")
                gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
                curved = [index for index, gradient in enumerate(gradients) if gradient.requires_grad]
                if not curved:
                    continue  # the loss is linear in every parameter
                for column in range(vectors.shape[1]):
                    directions = unflatten(vectors[:, column], parameters)
                    product = torch.autograd.grad(
                        [gradients[index] for index in curved],
                        parameters,
                        grad_outputs=[directions[index] for index in curved],
                        retain_graph=column + 1 < vectors.shape[1],
                        allow_unused=True,
                        materialize_grads=True,
                    )
                    products[:, column] += weight * flatten(product)
        return products


def as_objective(model: nn.Module | Objective, loss: LossFunction | None, data: Data | None) -> Objective:
    """The Objective that a public function was called with, in either form."""
    if isinstance(model, Objective):
        if loss is not None or data is not None:
            raise TypeError("pass either an Objective or a model with its loss and data, not both")
        return model
    if loss is None or data is None:
        raise TypeError("a loss and data are needed beside the model")
    return Objective(model, loss, data)
