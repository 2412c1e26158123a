"""Answers: frozen, with their uncertainty, as tables and as JSON."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hessian.colours import BLUE, GREEN, ORANGE
from hessian.drawn import new_axes
from hessian.files import write_atomically
from hessian.spelling import did_you_mean
from hessian.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Quantity = Literal["trace", "average trace", "top eigenvalue"]

_FORMAT = "hessianware.layer-report"
_VERSION = 1


@dataclass(frozen=True)
class LayerRow:
    """Curvature of one parameter tensor.

    trace: of its diagonal Hessian block. trace_stderr: its standard error, 0.0 where exact. exact: whether the trace
    is free of sampling error. num_params: the tensor's size. converged: whether the standard error is within what was
    asked for. reason: why the trace is not exact, else empty. top_eigenvalue: the block's largest, with residual |H v -
    lambda v|; None if they were not asked for. channel_traces: the trace's parts by the tensor's first dimension (output
    channels), with their standard errors; None likewise.
    """

    trace: float
    trace_stderr: float
    exact: bool
    num_params: int
    converged: bool = True
    reason: str = ""
    top_eigenvalue: float | None = None
    residual: float | None = None
    channel_traces: list[float] | None = None
    channel_stderrs: list[float] | None = None


_DRAWN: dict[Quantity, tuple[str, str, Callable[[LayerRow], tuple[float, float]]]] = {
    "trace": ("trace", BLUE, lambda row: (row.trace, 1.96 * row.trace_stderr)),
    "average trace": (
        "trace / parameters",
        ORANGE,
        lambda row: (row.trace / row.num_params, 1.96 * row.trace_stderr / row.num_params),
    ),
    "top eigenvalue": ("largest eigenvalue", GREEN, lambda row: (row.top_eigenvalue or 0.0, row.residual or 0.0)),
}


class LayerReport(Table, Mapping[str, LayerRow]):
    """Curvature by parameter name; `num_matvecs` Hessian-vector products were spent on it."""

    def __init__(self, rows: Mapping[str, LayerRow], num_matvecs: int = 0) -> None:
        self._rows = dict(rows)
        self.num_matvecs = num_matvecs

    def __getitem__(self, name: str) -> LayerRow:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def to_json(self) -> str:
        rows = {name: asdict(row) for name, row in self.items()}
        document = {"format": _FORMAT, "version": _VERSION, "num_matvecs": self.num_matvecs, "rows": rows}
        return json.dumps(document, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "LayerReport":
        """What `to_json` wrote; ValueError for any other text."""
        try:
            document = json.loads(text)
            if (document["format"], document["version"]) != (_FORMAT, _VERSION):
                raise ValueError(f"format {document['format']!r}, version {document['version']!r}")
            rows = {name: LayerRow(**row) for name, row in document["rows"].items()}
            return cls(rows, document["num_matvecs"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"this is no layer report of version {_VERSION}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON, atomically."""
        write_atomically(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LayerReport":
        """Read what `save` wrote; ValueError for any other file."""
        return cls.from_json(Path(path).read_text(errors="replace"))

    def header(self) -> list[str]:
        shown = ["name", "parameters", "trace", "standard error"]
        return [*shown, "top eigenvalue", "residual"] if self._has_eigenvalues else shown

    def cells(self) -> list[list[str]]:
        return [self._cells(name, row) for name, row in self.items()]

    def _cells(self, name: str, row: LayerRow) -> list[str]:
        shown = [name, f"{row.num_params:,}", f"{row.trace:.4g}", "exact" if row.exact else f"{row.trace_stderr:.2g}"]
        if self._has_eigenvalues:
            shown += ["" if value is None else f"{value:.4g}" for value in (row.top_eigenvalue, row.residual)]
        return shown

    def plot(self, ax: "Axes | None" = None, quantity: Quantity = "trace") -> "Axes":
        """Draw a bar for each tensor, the first on top, on a logarithmic axis; `ax=None` makes a new figure.

        quantity: the trace or its average over the tensor's parameters, with 95% intervals, or the largest eigenvalue with its
        residual. Bars of negative values are hatched. ValueError where the report does not have the quantity.
        """
        from hessian.bars import signed_bars

        if quantity not in _DRAWN:
            raise ValueError(
                f"quantity={quantity!r}: choose one of {', '.join(_DRAWN)}{did_you_mean(str(quantity), _DRAWN, str)}"
            )
        if quantity == "top eigenvalue" and not all(row.top_eigenvalue is not None for row in self.values()):
            raise ValueError("this report has no eigenvalues: make it with layer_report(..., eigenvalues=True)")
        label, colour, bar = _DRAWN[quantity]
        ax = new_axes(len(self)) if ax is None else ax
        bars = [bar(row) for row in self.values()]
        signed_bars(ax, list(self), [value for value, _ in bars], [error for _, error in bars], colour)
        ax.set_xlabel(label)
        return ax

    @property
    def _has_eigenvalues(self) -> bool:
        return any(row.top_eigenvalue is not None for row in self.values())
