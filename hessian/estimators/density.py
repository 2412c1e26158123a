"""How the eigenvalues of a matrix are distributed: the stochastic Lanczos quadrature."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, pi, sqrt
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from scipy.special import stdtrit

from hessian.colours import BLUE, ORANGE
from hessian.drawn import Drawn, new_axes
from hessian.estimators.quadrature import lanczos_quadrature
from hessian.operators.base import LinearOperator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Grid = torch.Tensor | np.ndarray | Sequence[float]
Scale = Literal["linear", "log"]

_SHARE_OF_RANGE = 0.01  # default sigma on a linear scale, in ranges of the nodes
_DECADES = 0.1  # default sigma on a logarithmic scale
_TAILS = 5  # sigmas that a default grid goes beyond the outermost nodes
_POINTS_PER_SIGMA = 4  # of a default grid
_MAX_POINTS = 20_000
_POINTS_AT_ONCE = 1024  # of a grid, to bound memory


class Estimate(NamedTuple):
    """A number with its standard error; value +- 1.96 stderr is a 95% interval."""

    value: float
    stderr: float


@dataclass(frozen=True, eq=False)
class Curve:
    """Values on a grid, with bounds; float64. All (G,), but a density on a logarithmic scale: value and bounds (2, G)."""

    grid: torch.Tensor
    value: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor


@dataclass(frozen=True, eq=False, repr=False)
class SpectralDensity(Drawn):
    """Gauss rules of the spectral measures of K random probes, which on average are the matrix's density of eigenvalues.

    nodes: (K, m) float64, ascending for each probe, in units of eigenvalues; a probe whose Krylov space was exhausted
    repeats its last node. weights: (K, m) float64, shares of all eigenvalues, each row sums to 1; 0 where a node is repeated.
    rounding: (K,) float64, how far off rounding may have moved nodes. size: P, the number of eigenvalues.
    num_matvecs: products spent.
    """

    nodes: torch.Tensor
    weights: torch.Tensor
    rounding: torch.Tensor
    size: int
    num_matvecs: int

    def density(self, grid: Grid | None = None, sigma: float | None = None, scale: Scale = "linear") -> Curve:
        r"""The density of eigenvalues, smoothed by a Gaussian, with a pointwise 95% band.

        .. math:: p(x) = \frac1K \sum_k \sum_j w_{kj} \, \mathcal N(x;\, \theta_{kj}, \sigma^2)

        `scale="linear"`: shares per unit of eigenvalue, (G,); p integrates to 1. `sigma`, in units of eigenvalues, is by
        default 1% of the range of the nodes (of their magnitude, where all are equal; 0.01, where all are 0).

        `scale="log"`: shares per decade over a grid of magnitudes |lambda| > 0, (2, G): of the positive, then of the negative
        eigenvalues. `sigma` is in decades, by default 0.1. Over log10 of the grid the two integrate to the weights of the
        positive and of the negative nodes; nodes that rounding cannot tell from 0 are in neither. A node next to 0 stands for
        all eigenvalues around it, of either sign: `cdf([0])` bounds the share of those that are not positive.

        Default grids go 5 sigma beyond the outermost nodes, with 4 points a sigma but at most 20,000 in all. The band is for
        the mean over probes, by Student's t, and clipped at 0; with a single probe it is NaN. It does not cover the error of
        a quadrature whose nodes are farther apart than sigma. Raises ValueError for a sigma, or on a logarithmic scale a
        grid, that is not positive.
        """
        if scale not in ("linear", "log"):
            raise ValueError(f"scale {scale!r} is neither 'linear' nor 'log'")
        width = self._width(sigma, scale)
        if scale == "linear":
            points = _default_grid(self.nodes, width) if grid is None else _as_grid(grid)
            return _with_band(points, _smoothed(points, self.nodes, self.weights, width))
        apart = self.nodes.abs() > self.rounding[:, None]
        logarithms = torch.where(apart, self.nodes.abs(), 1.0).log10()
        if grid is None:
            shown = logarithms[apart] if apart.any() else logarithms
            points = 10.0 ** _default_grid(shown, width)
        else:
            points = _as_grid(grid)
            if not (points > 0).all():
                raise ValueError(f"a grid from {float(points.min()):g} on: a logarithmic scale needs magnitudes above 0")
        signs = (self.nodes > 0, self.nodes < 0)
        parts = [_smoothed(points.log10(), logarithms, self.weights * (apart & sign), width) for sign in signs]
        return _with_band(points, torch.stack(parts, dim=1))

    def cdf(self, grid: Grid) -> Curve:
        r"""The share of eigenvalues that are at most x, for each x of the grid, with bounds.

        `value` is that of the quadrature, the mean over probes of the weights of nodes <= x. The bounds rest on the
        Chebyshev-Markov-Stieltjes inequalities: a Gauss rule with nodes theta_1 < ... < theta_m of a measure mu has

        .. math:: \sum_{j<i} w_j \le \mu((-\infty, \theta_i)) \le \mu((-\infty, \theta_i]) \le \sum_{j \le i} w_j .

        As mu((-inf, x]) grows with x, this puts it, for theta_i < x < theta_(i+1), between the sum of w_j over j < i and the
        sum over j <= i + 1: from both sides the two nodes around x are in doubt. In terms of any x, mu((-inf, x]) is at least
        the weight of all nodes <= x but the last of them, and at most that of the nodes < x and the one that follows.
        Nodes nearer to x than 2 `rounding` are counted on its worse side; rounding of the weights is left out.

        With one probe, `lower` and `upper` bound the measure of that probe, not of the matrix. With more, they are the means
        of these bounds, widened by Student's t for the variation over probes, 95% for each x. Source: G. Szego, Orthogonal
        Polynomials, theorem 3.41.1; Golub and Meurant 2010; for this use Chen, Trogdon and Ubaru 2021, Analysis of stochastic
        Lanczos quadrature for spectrum approximation.
        """
        points = _as_grid(grid)
        cumulative = torch.cat([torch.zeros(len(self.weights), 1, dtype=torch.float64), self.weights.cumsum(1)], dim=1)
        cumulative = cumulative.clamp(max=1)
        cumulative[:, -1] = 1
        every, around = points.expand(len(self.nodes), -1), 2 * self.rounding[:, None]
        last = self.nodes.shape[1]

        def below(values: torch.Tensor, inclusive: bool) -> torch.Tensor:
            return torch.searchsorted(self.nodes, values.contiguous(), right=inclusive)

        value = cumulative.gather(1, below(every, True))
        lower = cumulative.gather(1, (below(every - around, True) - 1).clamp(min=0))
        upper = cumulative.gather(1, (below(every + around, False) + 1).clamp(max=last))
        if len(self.nodes) == 1:
            return Curve(points, value[0], lower[0], upper[0])
        down, up = lower.mean(0) - _half_width(lower), upper.mean(0) + _half_width(upper)
        return Curve(points, value.mean(0), down.clamp(min=0), up.clamp(max=1))

    def trace_of(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Estimate:
        r"""The trace of f(A), such as the log-determinant for f = log.

        .. math:: \operatorname{tr} f(A) \approx \frac PK \sum_k \sum_j w_{kj} \, f(\theta_{kj})

        `function` maps a float64 tensor of any shape elementwise. The standard error comes from the probes and is widened by
        Student's t, so that value +- 1.96 stderr is a 95% interval; with one probe it is NaN. It does not cover the error of
        the quadrature, which is 0 for polynomials of degree below 2 m and vanishes geometrically for analytic functions.
        Source: S. Ubaru, J. Chen and Y. Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, 2017.
        """
        values = function(self.nodes).to(torch.float64)
        terms = torch.where(self.weights > 0, self.weights * values, 0.0)  # no inf * 0 at repeated nodes
        samples = self.size * terms.sum(1)
        return Estimate(float(samples.mean()), float(_half_width(samples)) / 1.96)

    def plot(self, ax: "Axes | None" = None, sigma: float | None = None, scale: Scale = "linear") -> "Axes":
        """Draw the density over a logarithmic axis, with its band; `ax=None` makes a new figure."""
        ax = new_axes() if ax is None else ax
        curve = self.density(None, sigma, scale)
        values, lower, upper = (part.reshape(-1, len(curve.grid)) for part in (curve.value, curve.lower, curve.upper))
        if scale == "linear":
            labels = ["all"]
            ax.set(xlabel="eigenvalue", ylabel="share of eigenvalues per unit")
        else:
            labels = ["positive", "negative"]
            ax.set(xlabel="|eigenvalue|", ylabel="share of eigenvalues per decade")
            ax.set_xscale("log")
        single = 1 / (self.size * self._width(sigma, scale) * sqrt(2 * pi))  # the peak of one eigenvalue alone
        ax.set_yscale("log")
        ax.set_ylim(single / 10, 2 * max(single, float(values.max()), float(upper.nan_to_num(0).max())))
        grid = curve.grid.numpy()
        for row, label in enumerate(labels):
            colour = (BLUE, ORANGE)[row]
            ax.plot(grid, values[row].numpy(), color=colour, label=label)
            if len(self.nodes) > 1:
                ax.fill_between(grid, lower[row].numpy(), upper[row].numpy(), color=colour, alpha=0.25, linewidth=0)
        if scale == "log":
            ax.legend()
        return ax

    def __repr__(self) -> str:
        probes, steps = self.nodes.shape
        ends = f"{float(self.nodes.min()):.4g} to {float(self.nodes.max()):.4g}"
        return f"SpectralDensity({probes} x {steps} nodes, {ends}, {self.size:,} eigenvalues, {self.num_matvecs:,} products)"

    def _width(self, sigma: float | None, scale: Scale) -> float:
        """The smoothing's sigma: what was asked for, or the default."""
        if sigma is not None:
            if not (sigma > 0 and isfinite(sigma)):
                raise ValueError(f"sigma={sigma}: give a positive width, or None for the default")
            return sigma
        if scale == "log":
            return _DECADES
        extent = float(self.nodes.max() - self.nodes.min())
        if extent <= 2 * float(self.rounding.max()):  # one eigenvalue, many times
            extent = float(self.nodes.abs().max()) or 1.0
        return _SHARE_OF_RANGE * extent


def spectral_density(
    A: LinearOperator,
    num_probes: int = 1,
    num_steps: int = 100,
    *,
    generator: torch.Generator | None = None,
    reorthogonalize: bool = True,
    progress: bool = False,
) -> SpectralDensity:
    r"""The density of a symmetric matrix's eigenvalues, by stochastic Lanczos quadrature.

    .. math:: \frac1P \operatorname{tr} f(A) = \mathbb E_z [z^\top f(A) z] \approx \frac1K \sum_{kj} w_{kj} \, f(\theta_{kj})

    for unit probes z of random signs; the inner sums are exact for polynomials of degree below 2 `num_steps`. Costs
    `num_probes` times `num_steps` products, fewer where Krylov spaces are exhausted, at most P a probe; eight probes share
    a product with a block, and memory holds their bases: `num_steps` vectors each, 2 with `reorthogonalize=False`.
    `generator=None` advances the global generator.

    Raises ValueError for fewer than one probe or step, for products that are not finite, and where A shows not to be
    symmetric. Source: L. Lin, Y. Saad and C. Yang, Approximating spectral densities of large matrices, 2016; S. Ubaru,
    J. Chen and Y. Saad 2017; for neural networks B. Ghorbani, S. Krishnan and Y. Xiao, An investigation into neural net
    optimization via Hessian eigenvalue density, 2019.

    >>> import torch, hessian
    >>> density = hessian.spectral_density(hessian.Dense(torch.diag(torch.tensor([1.0, 3.0]).double())), num_steps=2)
    >>> density.nodes, density.weights  # of two eigenvalues, each is a half
    (tensor([[1., 3.]], dtype=torch.float64), tensor([[0.5000, 0.5000]], dtype=torch.float64))
    """
    rules = lanczos_quadrature(
        A, num_probes, num_steps, generator=generator, reorthogonalize=reorthogonalize, progress=progress
    )
    return SpectralDensity(rules.nodes, rules.weights, rules.rounding, rules.size, rules.num_matvecs)


def _as_grid(grid: Grid) -> torch.Tensor:
    points = torch.as_tensor(grid, dtype=torch.float64).detach().cpu()
    if points.dim() != 1:
        raise ValueError(f"a grid of shape {tuple(points.shape)}: pass a one-dimensional one")
    return points


def _default_grid(nodes: torch.Tensor, width: float) -> torch.Tensor:
    """(G,): evenly from the least to the greatest node, and tails."""
    low, high = float(nodes.min()) - _TAILS * width, float(nodes.max()) + _TAILS * width
    count = round(min(_MAX_POINTS, _POINTS_PER_SIGMA * (high - low) / width))
    return torch.linspace(low, high, count + 1, dtype=torch.float64)


def _smoothed(points: torch.Tensor, nodes: torch.Tensor, weights: torch.Tensor, width: float) -> torch.Tensor:
    """Each probe's sum of Gaussians, (K, G), from points (G,), nodes (K, m) and weights (K, m)."""
    pieces = []
    for piece in points.split(_POINTS_AT_ONCE):
        rows = [
            share @ torch.exp(-0.5 * ((piece - node[:, None]) / width) ** 2) for node, share in zip(nodes, weights, strict=True)
        ]
        pieces.append(torch.stack(rows))
    return torch.cat(pieces, dim=1) / (width * sqrt(2 * pi))


def _with_band(points: torch.Tensor, samples: torch.Tensor) -> Curve:
    """The mean over probes, the first dimension, and its band."""
    mean, half = samples.mean(0), _half_width(samples)
    return Curve(points, mean, (mean - half).clamp(min=0), mean + half)


def _half_width(samples: torch.Tensor) -> torch.Tensor:
    """Half of the mean's 95% interval over the first dimension, by Student's t; NaN for a single sample."""
    count = len(samples)
    if count == 1:
        return torch.full_like(samples[0], torch.nan)
    return samples.std(0) * (float(stdtrit(count - 1, 0.975)) / sqrt(count))
