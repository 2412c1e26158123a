"""Targets out of a network's own outputs, where there are inputs without targets."""

import torch
from torch import nn
from torch.nn import functional as F

from hessian.objective import LossFunction
from hessian.torch_losses import is_classification

_WITH_LOGITS = (nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits)
_WITH_PROBABILITIES = (nn.BCELoss, F.binary_cross_entropy)
_OF_DIFFERENCES = (nn.MSELoss, nn.SmoothL1Loss, nn.HuberLoss, nn.L1Loss, F.mse_loss, F.smooth_l1_loss, F.huber_loss, F.l1_loss)


def pseudo_targets(loss: LossFunction, outputs: torch.Tensor, *, generator: torch.Generator | None = None) -> torch.Tensor:
    r"""Targets y as the model that gave `outputs` f expects them: drawn from p(y | f), of which the loss is -log.

    Classes from the softmax over dimension 1 for a cross-entropy or negative log-likelihood, (N, C, ...) to (N, ...);
    zeros and ones for a binary cross-entropy; for losses of a difference the outputs themselves, the middle of p.

    With :math:`y \sim p` the Hessian, :math:`J^\top A J + \sum_c (p - y)_c \nabla^2 f_c` for a cross-entropy, is on average
    its first part (Fisher's matrix), as on training data of which the model knows the distribution. The most probable
    class instead would leave p - y a bias that grows with the model's doubt. (Where a network is piecewise linear in each
    weight, the second part has no trace and targets do not matter.)

    Raises ValueError for any other loss.
    """
    require_known(loss)
    outputs = outputs.detach()
    if is_classification(loss):
        scores = outputs.movedim(1, -1)
        drawn = torch.multinomial(scores.softmax(-1).flatten(0, -2).cpu(), 1, generator=generator)
        return drawn.view(scores.shape[:-1]).to(outputs.device)
    if _is_one_of(loss, _OF_DIFFERENCES):
        return outputs.clone()
    probabilities = outputs.sigmoid() if _is_one_of(loss, _WITH_LOGITS) else outputs
    return torch.bernoulli(probabilities.cpu(), generator=generator).to(outputs.device)


def require_known(loss: LossFunction) -> None:
    """Raise ValueError unless `pseudo_targets` knows what targets the loss takes."""
    if not is_classification(loss) and not _is_one_of(loss, _WITH_LOGITS + _WITH_PROBABILITIES + _OF_DIFFERENCES):
        name = getattr(loss, "__name__", type(loss).__name__)
        raise ValueError(f"the targets that the loss {name!r} takes are not known: pass targets=callable(outputs)")


def _is_one_of(loss: LossFunction, known: tuple[object, ...]) -> bool:
    return loss in known or type(loss) in known
