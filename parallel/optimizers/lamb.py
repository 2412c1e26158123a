"""LAMB: Adam's direction, as long in every layer as the layer's weights."""

import torch
from torch.optim.optimizer import ParamsT

from parallel.optimizers.layer_norms import whole_norms
from parallel.optimizers.moments import corrected_squares, mean_gradient, take_in_squares
from parallel.optimizers.partwise import PartwiseOptimizer, Trained


class LAMB(PartwiseOptimizer):
    r"""Layer-wise adaptive moments.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        u &= \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} + \lambda w \\
        w &\leftarrow w - \gamma \, \frac{\phi(\|w\|)}{\|u\|} \, u

    for every parameter w of its own, with the norms of the whole parameter wherever its parts are. The factor of u is
    :math:`\gamma` alone where :math:`\phi(\|w\|)` or u is zero: weights that begin at zero would stay there.

    lr: :math:`\gamma`. weight_decay: :math:`\lambda`. bounds: the least and the largest value of :math:`\phi`, which is the
    identity between them; None for the identity everywhere. Raises ValueError for any of them out of its range.

    Source: You et al., Large batch optimization for deep learning: training BERT in 76 minutes (ICLR 2020), algorithm 2.
    """

    slots = ("step", "exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.01,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bounds": bounds})

    def _update(self, trained: Trained) -> None:
        directions = self._directions(trained)
        count = len(directions)
        norms = whole_norms([*trained.weights, *directions], [*trained.parameters, *trained.parameters])
        factors = [
            rate * _trust_ratio(weight, direction, group["bounds"])
            for rate, weight, direction, group in zip(
                trained.of("lr"), norms[:count], norms[count:], trained.groups, strict=True
            )
        ]
        torch._foreach_mul_(directions, factors)
        torch._foreach_sub_(trained.weights, directions)

    @staticmethod
    def _directions(trained: Trained) -> list[torch.Tensor]:
        steps, betas = trained.count(), [group["betas"][1] for group in trained.groups]
        squares = trained.slot("exp_avg_sq")
        take_in_squares(squares, trained.gradients, betas)
        lengths = corrected_squares(squares, betas, steps)
        torch._foreach_sqrt_(lengths)
        torch._foreach_add_(lengths, trained.of("eps"))
        directions = mean_gradient(trained, steps)
        torch._foreach_div_(directions, lengths)
        torch._foreach_add_(directions, torch._foreach_mul(trained.weights, trained.of("weight_decay")))
        return directions


def _trust_ratio(weight: torch.Tensor, direction: torch.Tensor, bounds: tuple[float, float] | None) -> torch.Tensor:
    scale = weight if bounds is None else weight.clamp(*bounds)
    return torch.where((scale > 0) & (direction > 0), scale / direction, 1.0)
