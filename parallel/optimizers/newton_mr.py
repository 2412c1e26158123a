"""Newton's method by minimal residuals, which needs no convexity."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import hypot, inf, isfinite, sqrt
from typing import Any, Literal

import torch

from hessian.space import VectorSpace
from parallel.optimizers.observed import ByOperator, Curvature, inner

_REASONS = Literal["converged", "least squares", "max_matvecs"]


@dataclass(frozen=True)
class MinresSolution:
    """x, b - A x and its norm, how many products it took, and why it is the last: "converged" below rtol |b|, "least squares"
    where no x has a smaller residual, which is then in A's null space, and x the shortest of all that have this one."""

    solution: torch.Tensor
    residual: torch.Tensor
    residual_norm: float
    num_matvecs: int
    stopped_by: _REASONS


@dataclass(frozen=True)
class MinimalResidualStep:
    """What the last step did. loss and gradient_norm: before it; trial_norm: of the gradient after it. rate: the share of the
    Newton step that was taken, 0 where none was short enough."""

    loss: float
    gradient_norm: float
    trial_norm: float
    rate: float
    num_matvecs: int
    stopped_by: _REASONS | Literal["stationary"]

    @property
    def accepted(self) -> bool:
        """Whether the parameters moved."""
        return self.rate > 0


class NewtonMR(ByOperator):
    r"""Newton steps by MINRES, with a line search on the gradient's norm: for invex and other losses, convex or not.

    .. math:: p \approx -H^\dagger g, \qquad \|g(\theta + a p)\|^2 \le \|g(\theta)\|^2 + 2 \rho\, a\, p^\top H g

    with the gradient g and the Hessian H, singular or indefinite, of the operator given to `observe` before each step. MINRES
    stops at a residual of `rtol` |g|, or at the least-squares solution, which is lifted to the shortest; every one of its
    iterates has :math:`p^\top H g = \|g + H p\|^2 - \|g\|^2 < 0`. a is lr, halved until the inequality holds, at most
    `max_halvings` times; where it never does, the parameters stay as they are, bit by bit.

    It finds where the gradient's norm is least: a minimum of every invex loss, but in general a saddle point as well, and it
    stands still where g is in H's null space although g is not 0 (`last.stopped_by` is then "stationary"): use NewtonCG from
    there. The operator's products must be those of the Hessian: of another matrix, the step need not lessen the norm.

    params: parameters, by name (`model.named_parameters()`) if operators have other tensors than the model, as those of FSDP2
    have. lr: the largest share a of the Newton step, for schedulers: 1 is Newton's own. rtol: of the residual, in units of
    |g|. rho: in (0, 1/2), how much of the promised decrease is asked for. `last` tells what the last step did. Nothing is
    kept between steps.

    ValueError for numbers out of range and for several groups.

    Source: Roosta, Liu, Xu & Mahoney, 2022 (arXiv:1810.00303), algorithm 1.
    """

    last: MinimalResidualStep | None = None

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1.0,
        rtol: float = 1e-2,
        max_matvecs: int = 100,
        rho: float = 1e-4,
        max_halvings: int = 20,
    ) -> None:
        if not 0 <= lr <= 1:
            raise ValueError(f"lr={lr}: it is a share of the Newton step, from 0 to 1")
        if not 0 < rtol < 1:
            raise ValueError(f"rtol={rtol}: give a residual in units of the gradient's norm, between 0 and 1")
        if not 0 < rho < 0.5:
            raise ValueError(f"rho={rho}: give a number between 0 and 1/2")
        for name, count in (("max_matvecs", max_matvecs), ("max_halvings", max_halvings)):
            if count < 1:
                raise ValueError(f"{name}={count}: give a number of at least 1")
        super().__init__(params, {"lr": lr})
        self.rtol, self.max_matvecs, self.rho, self.max_halvings = rtol, max_matvecs, rho, max_halvings

    def _advance(self, operator: Curvature) -> None:
        loss, gradient = operator.loss_and_gradient()
        found = minres(operator, -gradient, self.rtol, self.max_matvecs)
        square, rest = inner(operator.space, [gradient, found.residual], [gradient, found.residual])
        slope, norm, rate = rest - square, sqrt(square), float(self.param_groups[0]["lr"])
        if not slope < 0 or rate == 0:
            self.last = MinimalResidualStep(loss, norm, norm, 0.0, found.num_matvecs, "stationary")
            return
        origin = self._positions()
        for _ in range(self.max_halvings + 1):
            self._move(operator, origin, found.solution, rate)
            trial = _squared_norm(operator)
            if trial <= square + 2 * self.rho * rate * slope:
                self.last = MinimalResidualStep(loss, norm, sqrt(trial), rate, found.num_matvecs, found.stopped_by)
                return
            rate /= 2
        self._move(operator, origin, None)
        self.last = MinimalResidualStep(loss, norm, norm, 0.0, found.num_matvecs, found.stopped_by)


def minres(operator: Curvature, right: torch.Tensor, rtol: float, max_matvecs: int) -> MinresSolution:
    r"""The x in the Krylov space of A and b with the least |b - A x|, (P,) or this rank's part of it.

    A must be symmetric; it may be singular or indefinite. At a least-squares solution x with a residual r that is not 0, the
    shortest one is :math:`x - (r^\top x / r^\top r)\, r`.

    Source: Paige & Saunders, 1975 (SIAM J. Numer. Anal. 12, 617-629), in the notation of Choi, Paige & Saunders, 2011
    (arXiv:1003.4042); the lifting: Liu, Milzarek & Roosta, 2023 (arXiv:2309.17096).
    """
    space = operator.space
    # rounding, which costs the Lanczos vectors their orthogonality, brings |A r| hardly below this share of |A| |r|
    vanishing = sqrt(torch.finfo(right.dtype).eps)
    solution, residual = torch.zeros_like(right), right.clone()
    phi = start = sqrt(inner(space, [right], [right])[0])
    if start == 0:
        return MinresSolution(solution, residual, 0.0, 0, "converged")
    vector, before = right / start, torch.zeros_like(right)
    search, search_before = torch.zeros_like(right), torch.zeros_like(right)
    beta, cosine, sine, delta, epsilon_now, size = 0.0, -1.0, 0.0, 0.0, 0.0, 0.0
    for number in range(1, max_matvecs + 1):
        product = operator @ vector
        alpha = inner(space, [vector], [product])[0]
        product.sub_(vector, alpha=alpha).sub_(before, alpha=beta)
        beta_next = sqrt(inner(space, [product], [product])[0])
        size = max(size, sqrt(alpha**2 + beta**2 + beta_next**2))  # of A, from below
        # the new column of the tridiagonal matrix, turned by the rotation before
        delta_now, gamma = cosine * delta + sine * alpha, sine * delta - cosine * alpha
        epsilon_next, delta = sine * beta_next, -cosine * beta_next
        # |A r| of the residual so far is phi * hypot(gamma, delta)
        if hypot(gamma, delta) <= vanishing * size:
            return _lifted(space, solution, residual, number)
        length = hypot(gamma, beta_next)
        cosine, sine = gamma / length, beta_next / length
        following = (vector - delta_now * search - epsilon_now * search_before).div_(length)
        search_before, search, epsilon_now = search, following, epsilon_next
        solution.add_(search, alpha=cosine * phi)
        phi *= sine
        before, beta = vector, beta_next
        vector = product.div_(beta_next) if beta_next > 0 else product
        residual.mul_(sine**2).sub_(vector, alpha=phi * cosine)
        if phi <= rtol * start:
            return MinresSolution(solution, residual, phi, number, "converged")
    return MinresSolution(solution, residual, phi, max_matvecs, "max_matvecs")


def _lifted(space: VectorSpace, solution: torch.Tensor, residual: torch.Tensor, num_matvecs: int) -> MinresSolution:
    """The shortest of the least-squares solutions."""
    along, square = inner(space, [residual, residual], [solution, residual])
    return MinresSolution(solution - along / square * residual, residual, sqrt(square), num_matvecs, "least squares")


def _squared_norm(operator: Curvature) -> float:
    """Of the gradient where the parameters now are."""
    if not isfinite(operator.loss_value()):
        return inf
    gradient = operator.loss_and_gradient()[1]
    return inner(operator.space, [gradient], [gradient])[0]
