"""What the analysis found: report.json, report.html, and a table for the terminal."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from hessian.estimators.eigenpairs import Eigenpairs
from hessian.estimators.spectrum import Spectrum
from hessian.estimators.trace import Trace
from hessian.landscape import Line, Plane
from hessian.page import render_page
from hessian.report_options import Options, Plan
from hessian.results import LayerReport
from hessian.verification import Verification

FORMAT = "hessianware.curvature-report"
VERSION = 1

_BULK = 0.99  # of all eigenvalues
_APART = 3.0  # an eigenvalue so many widths of the smoothing beyond the bulk shows as a peak of its own


@dataclass(frozen=True)
class Findings:
    """All results of one run. shapes: of the parameter tensors, by name. plane_examples: that the plane's loss is of."""

    task: str
    options: Options
    plan: Plan
    method: str
    dtype: str
    shapes: Mapping[str, tuple[int, ...]]
    loss: float
    gradient_norm: float
    verification: Verification
    top: Eigenpairs
    spectrum: Spectrum
    trace: Trace
    layers: LayerReport
    line: Line | None
    plane: Plane | None
    plane_examples: int
    seconds: Mapping[str, float]

    @property
    def num_params(self) -> int:
        return self.spectrum.density.size

    @property
    def largest(self) -> float:
        return float(self.top.values[0])

    @cached_property
    def bulk(self) -> tuple[float, float]:
        """The interval that holds the middle 99% of the eigenvalues, by the quadrature."""
        order = self.spectrum.density.nodes.flatten().argsort()
        nodes = self.spectrum.density.nodes.flatten()[order]
        shares = self.spectrum.density.weights.flatten()[order].cumsum(0) / len(self.spectrum.density.weights)
        ends = torch.searchsorted(shares, torch.tensor([(1 - _BULK) / 2, (1 + _BULK) / 2], dtype=torch.float64))
        low, high = nodes[ends.clamp(max=len(nodes) - 1)].tolist()
        return low, high

    @property
    def sigma(self) -> float:
        """The width of the figure's smoothing: 1% of the range of the nodes."""
        nodes = self.spectrum.density.nodes
        return 0.01 * float(nodes.max() - nodes.min()) or 0.01

    @property
    def outliers(self) -> list[float]:
        """Of the largest eigenvalues those that stand apart from the bulk."""
        edge = self.bulk[1] + _APART * self.sigma
        pairs = zip(self.top.values.tolist(), self.top.residuals.tolist(), strict=True)
        return [value for value, residual in pairs if value - residual > edge]

    @property
    def probe_traces(self) -> list[float]:
        """P z . H z of each unit probe z of the density, every one an unbiased estimate of the trace."""
        density = self.spectrum.density
        return (density.size * (density.nodes * density.weights).sum(1)).tolist()

    def to_dict(self) -> dict[str, Any]:
        """The contents of report.json; docs/hessian_report.md describes every field."""
        smallest, density = self.spectrum.smallest, self.spectrum.density
        share = density.cdf([0.0])
        landscape = {
            "line": None if self.line is None else self.line.to_dict(),
            "plane": None if self.plane is None else self.plane.to_dict() | {"examples": self.plane_examples},
        }
        content = {
            "format": FORMAT,
            "version": VERSION,
            "task": self.task,
            "options": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self.options).items()},
            "plan": asdict(self.plan),
            "num_params": self.num_params,
            "num_tensors": len(self.shapes),
            "dtype": self.dtype,
            "method": self.method,
            "examples": self.plan.examples,
            "loss": self.loss,
            "gradient_norm": self.gradient_norm,
            "largest_eigenvalue": {"value": self.largest, "residual": float(self.top.residuals[0])},
            "smallest_eigenvalue": {"value": smallest.value, "residual": smallest.residual},
            "largest_stable_step": 2 / self.largest if self.largest > 0 else None,
            "trace": self.trace.to_dict(),
            "eigenvalues": self.top.to_dict(),
            "verification": self.verification.to_dict(),
            "spectrum": {
                "nodes": density.nodes.tolist(),
                "weights": density.weights.tolist(),
                "num_matvecs": density.num_matvecs,
                "bulk": list(self.bulk),
                "outliers": self.outliers,
                "share_not_positive": {name: float(getattr(share, name)[0]) for name in ("value", "lower", "upper")},
                "probe_traces": self.probe_traces,
            },
            "layers": [{"name": name, "shape": list(self.shapes[name])} | asdict(row) for name, row in self.layers.items()],
            "layer_num_matvecs": self.layers.num_matvecs,
            "landscape": landscape,
            "seconds": dict(self.seconds),
        }
        return _without_nan(content)


def _without_nan(value: Any) -> Any:
    """JSON knows no NaN or infinity: None instead."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    return [_without_nan(part) for part in value] if isinstance(value, list | tuple) else value


def headline(findings: Findings) -> list[tuple[str, str, str, str]]:
    """Rows (quantity, value, uncertainty, what it means)."""
    trace, smallest = findings.trace, findings.spectrum.smallest
    return [
        ("loss", f"{findings.loss:.5g}", "", f"The mean over {findings.plan.examples:,} training examples."),
        ("gradient norm", f"{findings.gradient_norm:.3g}", "", _meaning_of_gradient(findings)),
        ("largest eigenvalue", f"{findings.largest:.5g}", f"{findings.top.residuals[0]:.1e}", _meaning_of_largest(findings)),
        ("smallest eigenvalue", f"{smallest.value:.4g}", f"{smallest.residual:.1e}", _meaning_of_smallest(findings)),
        (
            "trace",
            f"{trace.value:.5g}",
            "exact" if trace.stderr == 0 else f"{1.96 * trace.stderr:.2g}",
            f"The mean eigenvalue is {trace.value / findings.num_params:.3g}. Small Gaussian noise of variance v in every "
            "parameter raises the loss by half the trace times v on average.",
        ),
    ]


def _meaning_of_gradient(findings: Findings) -> str:
    decrease = findings.gradient_norm**2
    return f"0 at a minimum; a small gradient step of size h lowers the loss by h times its square, {decrease:.2g}."


def _meaning_of_largest(findings: Findings) -> str:
    if findings.largest <= 0:
        return "Not positive: the loss curves upward along no direction."
    return (
        f"Gradient descent on these examples is stable along this direction up to a step size of 2 / {findings.largest:.4g} = "
        f"{2 / findings.largest:.3g}."
    )


def _meaning_of_smallest(findings: Findings) -> str:
    smallest = findings.spectrum.smallest
    if smallest.value + smallest.residual >= 0:
        return "Not negative within its uncertainty: the Lanczos runs met no direction of downward curvature."
    ratio = f", {-smallest.value / findings.largest:.1%} of the largest" if findings.largest > 0 else ""
    return f"Negative{ratio}: the loss curves downward along some direction, so this is no strict local minimum."


def render_html(findings: Findings, pictures: Mapping[str, str]) -> str:
    """The report as one self-contained page; `pictures` are <svg> elements by the names of figures."""
    values = {"report": findings.to_dict(), "findings": findings, "pictures": pictures, "rows": headline(findings)}
    return render_page("hessian", "report.html.jinja", **values)


def summary(findings: Findings, folder: Path) -> str:
    """The headline as a table of text, the checks that failed, and where the report is."""
    cells = [(name, value, error) for name, value, error, _ in headline(findings)]
    width, digits = max(len(row[0]) for row in cells), max(len(row[1]) for row in cells)
    lines = [f"{findings.task}: {findings.num_params:,} parameters, {findings.plan.examples:,} examples"]
    for name, value, error in cells:
        note = error if error in ("", "exact") else f"+- {error}"
        lines.append(f"{name:{width}}  {value:>{digits}}  {note}".rstrip())
    failed = [check for check in findings.verification.checks if not check.passed]
    lines += [f"check failed: {check.name}: {check.detail}" for check in failed]
    if not failed:
        lines.append(f"all {len(findings.verification.checks)} checks passed")
    lines.append(f"report: {folder / 'report.html'}")
    return "\n".join(lines)
