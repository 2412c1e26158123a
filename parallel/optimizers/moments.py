"""Adam's running means, of parts of parameters."""

import torch

from parallel.optimizers.partwise import Trained


def mean_gradient(trained: Trained, steps: list[int]) -> list[torch.Tensor]:
    r"""The bias-corrected running mean of the gradient, with this step's taken in.

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad \hat m = m / (1 - \beta_1^t)

    (Kingma & Ba, 2015). steps: t of every parameter.
    """
    means, betas = trained.slot("exp_avg"), [group["betas"][0] for group in trained.groups]
    torch._foreach_lerp_(means, trained.gradients, [1 - beta for beta in betas])
    return list(torch._foreach_div(means, [1 - beta**step for beta, step in zip(betas, steps, strict=True)]))


def take_in_squares(squares: list[torch.Tensor], values: list[torch.Tensor], betas: list[float]) -> None:
    r"""Update running means of squares in place.

    .. math:: v \leftarrow \beta_2 v + (1 - \beta_2) x^2
    """
    torch._foreach_mul_(squares, betas)
    torch._foreach_addcmul_(squares, values, values, [1 - beta for beta in betas])


def corrected_squares(squares: list[torch.Tensor], betas: list[float], counts: list[int]) -> list[torch.Tensor]:
    r"""Running means of `counts` squares without the bias of their beginning at zero: :math:`v / (1 - \beta_2^n)`."""
    return list(torch._foreach_div(squares, [1 - beta**count for beta, count in zip(betas, counts, strict=True)]))
