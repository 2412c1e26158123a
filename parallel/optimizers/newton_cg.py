"""Newton's method by conjugate gradients within a trust region."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from typing import Any, Literal

import torch

from hessian.space import VectorSpace
from parallel.optimizers.observed import ByOperator, Curvature, inner

_LEAST_RATIO = 1e-4  # of a step that is taken
_REASONS = Literal["converged", "boundary", "negative curvature", "max_matvecs", "stationary"]


@dataclass(frozen=True)
class TrustRegionStep:
    """What the last step did. loss: before it; trial_loss: at its end, whether accepted or not. gradient_norm: before it.

    ratio: of the decrease to the model's, NaN where the gradient was 0. radius: of the step. length: |p|.
    """

    loss: float
    trial_loss: float
    gradient_norm: float
    ratio: float
    accepted: bool
    radius: float
    length: float
    num_matvecs: int
    stopped_by: _REASONS


@dataclass(frozen=True)
class _Solution:
    """The model's minimiser p, its image H p, and p's length."""

    step: torch.Tensor
    image: torch.Tensor
    length: float
    num_matvecs: int
    stopped_by: _REASONS


class NewtonCG(ByOperator):
    r"""Sub-sampled Newton steps by Steihaug's conjugate gradients within a trust region.

    .. math:: p \approx \mathrm{arg}\min_{\|p\| \le \Delta} m(p), \qquad m(p) = g^\top p + \tfrac12 p^\top H p, \qquad
              r = \frac{L(\theta) - L(\theta + \eta p)}{-m(\eta p)}

    with the loss L, gradient g and curvature H of the operator given to `observe` before each step: of a batch, of several,
    or of all data. Conjugate gradients stop at a residual of :math:`\min(\tfrac12, \sqrt{\|g\|})\, \|g\|`, on the boundary,
    along a direction of negative curvature, which they follow to the boundary, or after `max_matvecs` products. The step is
    taken where :math:`r \ge 10^{-4}`; otherwise the parameters stay as they are, bit by bit. The radius becomes a quarter of
    the step's length where :math:`r < 1/4`, and twice as large, up to `max_radius`, where :math:`r > 3/4` and p is on the
    boundary.

    Vectors in parts on several ranks remain so: every decision is by the operator's `space`. With a Gauss-Newton operator these
    are Gauss-Newton steps.

    params: parameters, by name (`model.named_parameters()`) if operators have other tensors than the model, as those of FSDP2
    have. radius: :math:`\Delta` at the beginning, in units of the parameters; `state` of the first parameter keeps it. lr:
    :math:`\eta`, at most 1 of the step, for schedulers: 1 is Newton's own. `last` tells what the last step did.

    ValueError for numbers out of range and for several groups.

    Source: Steihaug, 1983 (SIAM J. Numer. Anal. 20, 626-637); Nocedal & Wright, 2006, algorithms 4.1 and 7.2, whose radius
    shrinks from the step's length here, so that no rejected step is tried again; Xu, Roosta & Mahoney, 2020 (arXiv:1708.07827).
    """

    last: TrustRegionStep | None = None

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1.0,
        radius: float = 1.0,
        max_radius: float = 100.0,
        max_matvecs: int = 100,
    ) -> None:
        if not 0 <= lr <= 1:
            raise ValueError(f"lr={lr}: it is a share of the Newton step, from 0 to 1; give the trust region's size as radius=")
        if not 0 < radius <= max_radius:
            raise ValueError(f"radius={radius}: give a positive number of at most max_radius={max_radius}")
        if max_matvecs < 1:
            raise ValueError(f"max_matvecs={max_matvecs}: give a number of products, at least 1")
        super().__init__(params, {"lr": lr})
        self._initial_radius, self.max_radius, self.max_matvecs = radius, max_radius, max_matvecs

    @property
    def radius(self) -> float:
        """Of the coming step."""
        return float(self._shared_state.get("radius", self._initial_radius))

    def _advance(self, operator: Curvature) -> None:
        loss, gradient = operator.loss_and_gradient()
        radius, lr = self.radius, float(self.param_groups[0]["lr"])
        norm = sqrt(inner(operator.space, [gradient], [gradient])[0])
        if norm == 0 or lr == 0:
            self.last = TrustRegionStep(loss, loss, norm, float("nan"), False, radius, 0.0, 0, "stationary")
            return
        found = steihaug(operator, gradient, radius, min(0.5, sqrt(norm)) * norm, self.max_matvecs)
        slope, curvature = inner(operator.space, [gradient, found.step], [found.step, found.image])
        predicted = -(lr * slope + lr**2 * curvature / 2)
        origin = self._positions()
        self._move(operator, origin, found.step, lr)
        trial = operator.loss_value()
        ratio = (loss - trial) / predicted if isfinite(trial) and predicted > 0 else -inf
        accepted = ratio >= _LEAST_RATIO
        if not accepted:
            self._move(operator, origin, None)
        if ratio < 0.25:
            after = found.length / 4
        elif ratio > 0.75 and found.stopped_by in ("boundary", "negative curvature"):
            after = min(2 * radius, self.max_radius)
        else:
            after = radius
        self._shared_state["radius"] = torch.tensor(after, dtype=torch.float64)
        self.last = TrustRegionStep(
            loss, trial, norm, ratio, accepted, radius, found.length, found.num_matvecs, found.stopped_by
        )


def steihaug(operator: Curvature, gradient: torch.Tensor, radius: float, tol: float, max_matvecs: int) -> _Solution:
    """Conjugate gradients on the model of `gradient` and `operator` from p = 0, until |g + H p| <= tol or |p| is `radius`."""
    space: VectorSpace = operator.space
    step, image = torch.zeros_like(gradient), torch.zeros_like(gradient)
    residual, direction = gradient.clone(), -gradient
    square, length = inner(space, [residual, step], [residual, step])
    for number in range(1, max_matvecs + 1):
        product = operator @ direction
        curvature, along, size = inner(space, [direction, step, direction], [product, direction, direction])
        rate = square / curvature if curvature > 0 else inf
        # |step + rate * direction| without another reduction
        beyond = length + 2 * rate * along + rate**2 * size if isfinite(rate) else inf
        if beyond >= radius**2:
            rate = _to_boundary(length, along, size, radius)
            step.add_(direction, alpha=rate)
            image.add_(product, alpha=rate)
            return _Solution(step, image, radius, number, "boundary" if curvature > 0 else "negative curvature")
        step.add_(direction, alpha=rate)
        image.add_(product, alpha=rate)
        residual.add_(product, alpha=rate)
        before = square
        square, length = inner(space, [residual, step], [residual, step])
        if sqrt(square) <= tol:
            return _Solution(step, image, sqrt(length), number, "converged")
        direction = direction.mul_(square / before).sub_(residual)
    return _Solution(step, image, sqrt(length), max_matvecs, "max_matvecs")


def _to_boundary(length: float, along: float, size: float, radius: float) -> float:
    """The t >= 0 with |p + t d|^2 = radius^2, of |p|^2, p d and |d|^2; without cancellation."""
    room = max(radius**2 - length, 0.0)
    root = sqrt(along**2 + size * room)
    return room / (along + root) if along > 0 else (root - along) / size
