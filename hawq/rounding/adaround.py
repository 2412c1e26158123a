r"""AdaRound (Nagel et al. 2020) on second moments: each weight goes up or down, whichever serves the row's outputs.

With :math:`\hat w = s (\lfloor w / s \rfloor + h(V))` and
:math:`h(V) = \mathrm{clip}(1.2\,\sigma(V) - 0.1, 0, 1)`, every row minimises

.. math:: \frac{(\hat w - w) H (\hat w - w)^T}{E_0} + \frac{\lambda}{n} \sum_i 1 - |2 h(V_i) - 1|^\beta

over V by Adam (equations 21 to 25). :math:`E_0` is the error of rounding to nearest, so that one :math:`\lambda` fits all rows;
:math:`\beta` falls from 20 to 2, which drives h to 0 or 1. H is all the data there is: no batches, nothing is drawn.
"""

import math

import torch

from hawq.rounding.grid import Grid

_STRETCH = 1.2  # of the sigmoid: h reaches 0 and 1 at finite V
_WARM_UP = 0.2  # of the steps, without the regulariser
_FIRST_BETA, _LAST_BETA = 20.0, 2.0
_WEIGHT = 5.0  # lambda
_RATE = 0.1


def adaround(wanted: torch.Tensor, hessian: torch.Tensor, grid: Grid, *, steps: int = 1000) -> torch.Tensor:
    """Codes (groups, rows, columns), in float64, no row's error larger than that of rounding to nearest.

    wanted: (groups, rows, columns), hessian: positive definite, (groups, columns, columns), both float64. Codes are the
    two next to each weight, or the grid's last two where it ends. Steps run in float32.

    Source: Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, ICML 2020.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps: AdaRound needs at least one")
    scale, low, high = (tensor.expand_as(wanted) for tensor in grid.expanded(wanted.shape[2]))
    nearest = grid.codes(wanted)
    nearest_error = _error(nearest * scale - wanted, hessian)
    base = torch.floor(wanted / scale).clamp(low, high - 1)
    # In units of the scale, with the row's error by rounding to nearest as the unit of its error.
    rest = (wanted / scale - base).float()
    gain = (scale / nearest_error.clamp(min=torch.finfo(torch.float64).tiny).sqrt()[:, :, None]).float()
    moments = hessian.float()
    columns = wanted.shape[2]

    start = rest.clamp(0.01, 0.99)
    latent = torch.logit((start + (_STRETCH - 1) / 2) / _STRETCH).requires_grad_()
    optimizer = torch.optim.Adam([latent], lr=_RATE)
    with torch.no_grad():
        for step in range(steps):
            sigmoid = torch.sigmoid(latent)
            h = (_STRETCH * sigmoid - (_STRETCH - 1) / 2).clamp(0, 1)
            slope = 2 * gain * ((gain * (h - rest)) @ moments)
            done = (step / steps - _WARM_UP) / (1 - _WARM_UP)
            if done > 0:
                beta = _LAST_BETA + (_FIRST_BETA - _LAST_BETA) * (1 + math.cos(math.pi * done)) / 2
                distance = 2 * h - 1
                slope -= (_WEIGHT / columns * 2 * beta) * distance.abs().pow(beta - 1) * distance.sign()
            latent.grad = slope * _STRETCH * sigmoid * (1 - sigmoid) * ((h > 0) & (h < 1))
            optimizer.step()
    codes = base + (latent.detach() > 0)
    worse = _error(codes * scale - wanted, hessian) > nearest_error
    return torch.where(worse[:, :, None], nearest, codes)


def _error(difference: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    return ((difference @ hessian) * difference).sum(2)
