"""LARS: one learning rate a layer, in proportion to its weights and inversely to its gradient."""

import torch
from torch.optim.optimizer import ParamsT

from parallel.optimizers.layer_norms import whole_norms
from parallel.optimizers.partwise import PartwiseOptimizer, Trained


class LARS(PartwiseOptimizer):
    r"""Layer-wise adaptive rate scaling, with momentum.

    .. math::
        \lambda &= \eta \, \frac{\|w\|}{\|g\| + \beta \|w\|} \\
        v &\leftarrow m v + \gamma \lambda \, (g + \beta w) \\
        w &\leftarrow w - v

    for every parameter w of its own, with the norms of the whole parameter wherever its parts are. :math:`\lambda = 1` where w
    or g is zero, and, unless `adapt_vectors`, for parameters of one dimension (biases, scales of norms), which are not decayed
    then either: their norms tell nothing of a layer's scale.

    lr: :math:`\gamma`. eta: the trust coefficient :math:`\eta`. momentum: m. weight_decay: :math:`\beta`. Raises ValueError for
    any of them out of its range.

    Source: You, Gitman & Ginsburg, Large batch training of convolutional networks (2017), equation 6 and algorithm 1.
    """

    slots = ("momentum_buffer",)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.2,
        *,
        eta: float = 0.02,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        adapt_vectors: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "eta": eta,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "adapt_vectors": adapt_vectors,
        }
        super().__init__(params, defaults)

    def _update(self, trained: Trained) -> None:
        adapted = [
            index
            for index, (parameter, group) in enumerate(zip(trained.parameters, trained.groups, strict=True))
            if group["adapt_vectors"] or parameter.dim() > 1
        ]
        layers = trained.only(adapted)
        directions = torch._foreach_mul(trained.gradients, trained.of("lr"))
        steps = [directions[index] for index in adapted]
        if adapted:
            decays = [rate * decay for rate, decay in zip(layers.of("lr"), layers.of("weight_decay"), strict=True)]
            torch._foreach_add_(steps, torch._foreach_mul(layers.weights, decays))
            torch._foreach_mul_(steps, _local_rates(layers))
        velocities = trained.slot("momentum_buffer")
        torch._foreach_mul_(velocities, trained.of("momentum"))
        torch._foreach_add_(velocities, directions)
        torch._foreach_sub_(trained.weights, velocities)


def _local_rates(layers: Trained) -> list[torch.Tensor]:
    count = len(layers.weights)
    norms = whole_norms([*layers.weights, *layers.gradients], [*layers.parameters, *layers.parameters])
    of_weights, of_gradients = norms[:count], norms[count:]
    scales = torch._foreach_mul(of_weights, layers.of("eta"))
    lengths = torch._foreach_add(of_gradients, torch._foreach_mul(of_weights, layers.of("weight_decay")))
    return [
        torch.where((weight > 0) & (gradient > 0), scale / length, 1.0)
        for weight, gradient, scale, length in zip(of_weights, of_gradients, scales, lengths, strict=True)
    ]
