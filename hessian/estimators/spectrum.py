"""Both ends of a spectrum, its trace and its density from one Krylov run."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from hessian.estimators.density import Estimate, SpectralDensity
from hessian.estimators.quadrature import lanczos_quadrature
from hessian.operators.base import LinearOperator

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class RitzValue(NamedTuple):
    """An approximate eigenvalue theta and a bound on |A y - theta y| for its unit Ritz vector y."""

    value: float
    residual: float

    @property
    def interval(self) -> tuple[float, float]:
        """[theta - residual, theta + residual], which contains an eigenvalue (Parlett, theorem 4.5.1)."""
        return self.value - self.residual, self.value + self.residual


@dataclass(frozen=True, eq=False, repr=False)
class Spectrum:
    """What one Krylov run tells about a symmetric matrix.

    density: the density of its eigenvalues. largest, smallest: the outermost Ritz values over all probes, algebraically. The
    true ends lie no further inside, up to rounding; each interval contains an eigenvalue. That this is the extreme one is
    likely, not proven, and how often it occurs is unknown: `top_eigenpairs` certifies both.
    """

    density: SpectralDensity
    largest: RitzValue
    smallest: RitzValue

    @property
    def trace(self) -> Estimate:
        """P times the mean of z . A z over the unit probes z, and its standard error; NaN with a single probe."""
        return self.density.trace_of(lambda nodes: nodes)

    @property
    def num_matvecs(self) -> int:
        """Products spent on all of it."""
        return self.density.num_matvecs

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the density and mark both ends; `ax=None` makes a new figure."""
        ax = self.density.plot(ax)
        for end in (self.smallest, self.largest):
            ax.axvline(end.value, color="black", linewidth=0.8, linestyle=":")
        return ax

    def _rows(self) -> list[tuple[str, str, str]]:
        """Names, numbers and uncertainties."""
        trace = self.trace
        return [
            ("largest eigenvalue", f"{self.largest.value:.6g}", f"{self.largest.residual:.2g}"),
            ("smallest eigenvalue", f"{self.smallest.value:.6g}", f"{self.smallest.residual:.2g}"),
            ("trace", f"{trace.value:.6g}", f"{1.96 * trace.stderr:.2g}"),
        ]

    def __repr__(self) -> str:
        lines = [f"{name:19}  {value:>12}  +- {error}" for name, value, error in self._rows()]
        return "\n".join([*lines, f"{self.density.size:,} eigenvalues, {self.num_matvecs:,} products"])

    def _repr_html_(self) -> str:
        cells = "".join(f"<tr><td>{name}</td><td>{value}</td><td>{error}</td></tr>" for name, value, error in self._rows())
        head = "<tr><th></th><th>value</th><th>&plusmn;</th></tr>"
        caption = f"<caption>{self.density.size:,} eigenvalues, {self.num_matvecs:,} products</caption>"
        return f"<table>{caption}<thead>{head}</thead><tbody>{cells}</tbody></table>"


def spectrum(
    A: LinearOperator,
    num_probes: int = 4,
    num_steps: int = 100,
    *,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Spectrum:
    r"""Both ends of a symmetric matrix's spectrum, its trace and its density, from the same `num_probes * num_steps` products.

    With T the (m, m) Lanczos matrix of a probe, (theta, s) its outermost eigenpair, beta_m the norm of the next residual,

    .. math:: \|A y - \theta y\| = \beta_m |s_m|, \qquad y = Q s,

    to which the residual adds what rounding may contribute. `generator=None` advances the global generator. Raises ValueError
    as `spectral_density` does. Source: B. Parlett, The Symmetric Eigenvalue Problem, chapter 13; that random starts find
    the ends: J. Kuczynski and H. Wozniakowski, Estimating the largest eigenvalue by the power and Lanczos algorithms with a
    random start, 1992.
    """
    rules = lanczos_quadrature(A, num_probes, num_steps, generator=generator, progress=progress)
    density = SpectralDensity(rules.nodes, rules.weights, rules.rounding, rules.size, rules.num_matvecs)
    ends = [int(rules.nodes.argmax()), int(rules.nodes.argmin())]
    largest, smallest = (RitzValue(float(rules.nodes.view(-1)[end]), float(rules.residuals.view(-1)[end])) for end in ends)
    return Spectrum(density, largest, smallest)
