r"""Traces of diagonal Hessian blocks by random probes, all at once, with the Gauss-Newton matrix to take the spread away.

For a probe z of random signs, z_l . (H z)_l is an unbiased estimate of the trace of block l. The spread comes from what is off
the diagonal, outliers most of all, and these are the Gauss-Newton matrix's. Where its trace is known, what is left to sample is
:math:`z_l \cdot ((H - G) z)_l`, whose matrix shrinks as the fit gets better.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hessian.estimators.exact_trace import exact_traces
from hessian.estimators.sampled_trace import sampled_gauss_newton_traces
from hessian.estimators.sampling import standard_error
from hessian.operators.gauss_newton import GaussNewton
from hessian.operators.hessian import Hessian
from hessian.parameters import requiring_grad
from hessian.progress import up_to
from hessian.results import LayerRow

_PROBES_AT_ONCE = 8
_MIN_PROBES = 32  # a standard error of fewer is too noisy to stop by
_PILOT = 8  # probes that decide whether the Gauss-Newton matrix helps
_COST = 1.65  # of a product with H and one with G, in products with H


@dataclass(frozen=True)
class _Known:
    """Traces of Gauss-Newton blocks with their standard errors."""

    traces: dict[str, float]
    stderrs: dict[str, float]


def sampled_rows(
    operator: Hessian,
    reasons: Mapping[str, str],
    *,
    rtol: float,
    max_probes: int,
    with_gauss_newton: bool,
    channels: bool,
    generator: torch.Generator | None,
    progress: bool,
) -> tuple[dict[str, LayerRow], int]:
    """Rows of all the operator's parameters, and the products spent; `reasons` says why each is sampled.

    Stops when every standard error is at most `rtol` times its trace, looked at after 32, 64, 128 ... probes.
    """
    parameters = operator.parameters
    known = _Known({}, {})
    samples = _Samples(operator, channels)
    with up_to(max_probes, "probes", "probe", progress=progress) as bar:

        def draw(count: int) -> None:
            while count > 0:
                taken = min(count, _PROBES_AT_ONCE)
                samples.draw(taken, generator)
                count -= taken
                bar.update(taken)

        if with_gauss_newton and not channels and max_probes >= _MIN_PROBES:
            samples.add_gauss_newton(list(parameters))
            draw(_PILOT)
            if helped := samples.helped():
                known = _gauss_newton_traces(operator, helped, rtol, generator)
            samples.keep_gauss_newton(list(known.traces))
        look = _MIN_PROBES
        while True:
            draw(min(look, max_probes) - samples.count)
            rows = {name: samples.row(name, known, reasons[name], rtol) for name in parameters}
            if samples.count >= max_probes or all(row.converged for row in rows.values()):
                return rows, samples.num_matvecs
            look *= 2


def _gauss_newton_traces(operator: Hessian, names: list[str], rtol: float, generator: torch.Generator | None) -> _Known:
    """Exact traces of Gauss-Newton blocks, or from drawn labels; parameters that have neither are left out."""
    wanted = {name: operator.parameters[name] for name in names}
    with requiring_grad(wanted), operator.objective.undisturbed():
        exact = exact_traces(operator.objective, wanted, gauss_newton=True)
    if not exact.reasons:
        return _Known(exact.traces, dict.fromkeys(exact.traces, 0.0))
    rest = {name: wanted[name] for name in exact.reasons}
    sampled, stderrs = sampled_gauss_newton_traces(operator.objective, rest, rtol / 2, generator)
    return _Known(exact.traces | sampled, dict.fromkeys(exact.traces, 0.0) | stderrs)


class _Samples:
    """z_l . (H z)_l and z_l . (G z)_l for every probe so far, by parameter, by channel if asked for."""

    def __init__(self, operator: Hessian, channels: bool) -> None:
        self._operator, self._channels = operator, channels
        self._gauss_newton: GaussNewton | None = None
        self._hessian_values: dict[str, list[torch.Tensor]] = {name: [] for name in operator.parameters}
        self._gauss_newton_values: dict[str, list[torch.Tensor]] = {}
        self.count = self.num_matvecs = 0

    def add_gauss_newton(self, names: list[str]) -> None:
        """Multiply by the Gauss-Newton matrix of these parameters, too, from now on."""
        self._gauss_newton = GaussNewton(self._operator.objective, params=names)
        self._gauss_newton_values = {name: [] for name in names}

    def keep_gauss_newton(self, names: list[str]) -> None:
        """Forget the Gauss-Newton values of all other parameters."""
        self._gauss_newton_values = {name: self._gauss_newton_values[name] for name in names}
        if not names:
            self._gauss_newton = None

    def draw(self, count: int, generator: torch.Generator | None) -> None:
        """`count` more probes."""
        probes = self._operator.space.random(count, "rademacher", generator)
        self._record(self._hessian_values, probes * self._operator.rows(probes))
        self.num_matvecs += count
        if self._gauss_newton is not None:
            try:
                self._record(self._gauss_newton_values, probes * self._gauss_newton.rows(probes))
                self.num_matvecs += count
            except ValueError:  # the loss has no Gauss-Newton matrix
                self.keep_gauss_newton([])
        self.count += count

    def _record(self, values: dict[str, list[torch.Tensor]], products: torch.Tensor) -> None:
        if not torch.isfinite(products).all():
            raise ValueError("the curvature is not finite: the loss has no second derivative here, or overflows")
        sizes = [parameter.numel() for parameter in self._operator.parameters.values()]
        pieces = products.split(sizes, dim=1)
        for (name, parameter), piece in zip(self._operator.parameters.items(), pieces, strict=True):
            if name in values:
                parts = len(parameter) if self._channels and parameter.dim() else 1
                values[name] += list(piece.double().view(len(piece), parts, -1).sum(2).cpu())

    def helped(self) -> list[str]:
        """Parameters for which H - G spreads less than H, by more than its products cost more, over all of them."""
        if self._gauss_newton is None:
            return []
        plain = {name: self._stack(name).var(0).sum() for name in self._gauss_newton_values}
        rest = {name: (self._stack(name) - self._stack_gauss_newton(name)).var(0).sum() for name in self._gauss_newton_values}
        better = [name for name in plain if _COST * rest[name] < plain[name]]
        return better if 2 * len(better) >= len(plain) else []

    def _stack(self, name: str) -> torch.Tensor:
        return torch.stack(self._hessian_values[name])

    def _stack_gauss_newton(self, name: str) -> torch.Tensor:
        return torch.stack(self._gauss_newton_values[name])

    def row(self, name: str, known: _Known, reason: str, rtol: float) -> LayerRow:
        """What the samples say of one parameter."""
        values = self._stack(name)
        base, base_error = 0.0, 0.0
        if name in known.traces:
            values = values - self._stack_gauss_newton(name)
            base, base_error = known.traces[name], known.stderrs[name]
        sums = values.sum(1)
        trace = base + float(sums.mean())
        stderr = (base_error**2 + standard_error(sums) ** 2) ** 0.5
        row = LayerRow(trace, stderr, False, self._operator.parameters[name].numel(), stderr <= rtol * abs(trace), reason)
        if not self._channels:
            return row
        errors = [standard_error(values[:, channel]) for channel in range(values.shape[1])]
        return LayerRow(**(vars(row) | {"channel_traces": values.mean(0).tolist(), "channel_stderrs": errors}))
