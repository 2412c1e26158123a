r"""The gradient noise scale: the batch at which noise and signal of the gradient are of one size.

.. math:: B_{\mathrm{simple}} = \frac{\operatorname{tr} \Sigma}{|G|^2}, \qquad
          B_{\mathrm{noise}} = \frac{\operatorname{tr}(H \Sigma)}{G^\top H G}

with G the gradient, H the Hessian, and Sigma the covariance of one example's gradient (McCandlish, Kaplan & Amodei, 2018,
equations 2.8 and 2.9). Batches much smaller are mostly noise: twice the batch takes half the steps. Much larger ones hardly
help.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hessian.objective import LossFunction
from hessian.operators.curvature import CurvatureOperator
from hessian.tables import Table
from parallel import curvature


@dataclass(frozen=True, repr=False)
class NoiseScale(Table):
    """Both noise scales, in items (examples, or what the loss averages over); standard errors by the jackknife over chunks.

    tr(Sigma), |G|^2, tr(H Sigma) and G'HG are unbiased estimates, of which averages can be taken over measurements; a ratio
    whose denominator is not positive is infinite: the gradient is lost in noise.
    """

    trace: float
    square: float
    weighted_trace: float
    weighted_square: float
    simple_stderr: float
    weighted_stderr: float

    @property
    def simple(self) -> float:
        """tr(Sigma) / |G|^2."""
        return _ratio(self.trace, self.square)

    @property
    def weighted(self) -> float:
        """tr(H Sigma) / G'HG."""
        return _ratio(self.weighted_trace, self.weighted_square)

    def header(self) -> list[str]:
        return ["noise scale", "items", "standard error"]

    def cells(self) -> list[list[str]]:
        rows = (("simple", self.simple, self.simple_stderr), ("curvature-weighted", self.weighted, self.weighted_stderr))
        return [[name, f"{value:.4g}", f"{error:.2g}"] for name, value, error in rows]


def noise_scale(model: nn.Module, loss: LossFunction, chunks: Sequence[Any]) -> NoiseScale:
    """The noise scales of the loss over the data that `chunks`, batches of at least two, hold together.

    It takes the gradient of each chunk and one product with the Hessian for each. Under torch.distributed `model` may be
    anything that `parallel.curvature.hessian` takes, chunk k is the batches k of all ranks, and the call is collective.
    Standard errors need three chunks, and are infinite for two. Raises ValueError for fewer.
    """
    if len(chunks) < 2:
        raise ValueError(f"{len(chunks)} chunk: the noise is what chunks differ by, so give at least 2")
    operator = curvature.hessian(model, loss, list(chunks))
    assert isinstance(operator, CurvatureOperator)
    parts = [operator.anew(operator.objective.over([chunk])) for chunk in chunks]
    gradients = torch.stack([part.gradient() for part in parts])
    counts = torch.tensor([part.objective.total_weight() for part in parts], dtype=torch.float64)
    if operator.objective.is_sum:
        raise ValueError("the loss sums over examples: noise scales are of a mean, so use reduction='mean'")
    space = operator.space
    plain = space.gram(gradients, gradients).double().cpu()
    weighted = space.gram(gradients, operator.rows(gradients)).double().cpu()
    (trace, square), (weighted_trace, weighted_square) = (_moments(gram, counts) for gram in (plain, weighted))
    return NoiseScale(trace, square, weighted_trace, weighted_square, _jackknife(plain, counts), _jackknife(weighted, counts))


def _moments(gram: torch.Tensor, counts: torch.Tensor) -> tuple[float, float]:
    """Unbiased tr(A Sigma) and G'AG from g_j'A g_k of chunks of `counts` items."""
    total = counts.sum()
    mean = counts / total
    square = mean @ gram @ mean
    spread = (counts * gram.diagonal()).sum() - total * square
    trace = spread / (len(counts) - 1)
    return float(trace), float(square - trace / total)


def _jackknife(gram: torch.Tensor, counts: torch.Tensor) -> float:
    """The standard error of the ratio, by leaving out each chunk in turn."""
    number = len(counts)
    if number < 3:
        return math.inf
    others = [[one for one in range(number) if one != left_out] for left_out in range(number)]
    ratios = torch.tensor([_ratio(*_moments(gram[kept][:, kept], counts[kept])) for kept in others])
    if not ratios.isfinite().all():
        return math.inf  # without some chunk the gradient is lost in noise
    return float(ratios.std(correction=0) * math.sqrt(number - 1))


def _ratio(noise: float, signal: float) -> float:
    return noise / signal if signal > 0 else math.inf
