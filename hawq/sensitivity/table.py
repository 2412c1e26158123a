"""The sensitivity table: what each width of each layer or activation is expected to cost, with standard errors."""

import html
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

from hessian.colours import BLUE, GREEN, GREY, ORANGE, PINK, SKY, YELLOW
from hessian.drawn import new_axes
from hessian.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Errors = Mapping[str, Mapping[int, float]]

_MARKS = {2: (PINK, "v"), 3: (ORANGE, "^"), 4: (YELLOW, "<"), 5: (GREEN, "s"), 6: (SKY, "D"), 7: (GREY, ">"), 8: (BLUE, "o")}
_FORMAT = "hessianware.sensitivity"
_VERSION = 1


class SensitivityTable(Table, Mapping[str, Mapping[int, float]]):
    """omega by row (a layer, or "activation:NAME") and bits.

    stderr: its standard error under the same keys, 0.0 where nothing was sampled. method: the sensitivity that made it.
    predicts: the factor that turns a sum of omegas into the predicted increase of the loss, None where they are no loss.
    note: what the reader must know of this table, else empty.
    """

    def __init__(self, omega: Errors, stderr: Errors, method: str, predicts: float | None = None, note: str = "") -> None:
        self._omega = {name: dict(row) for name, row in omega.items()}
        self.stderr = {name: dict(row) for name, row in stderr.items()}
        self.method = method
        self.predicts = predicts
        self.note = note

    def __getitem__(self, row: str) -> dict[int, float]:
        return self._omega[row]

    def __iter__(self) -> Iterator[str]:
        return iter(self._omega)

    def __len__(self) -> int:
        return len(self._omega)

    def __or__(self, other: "SensitivityTable") -> "SensitivityTable":
        """Both tables' rows, in the units of the left one; ValueError where units cannot be compared or a row is in both."""
        if not isinstance(other, SensitivityTable):
            return NotImplemented
        if self.predicts is None or other.predicts is None:
            unknown = self if self.predicts is None else other
            raise ValueError(
                f"{self.method!r} and {other.method!r} have no common unit: {unknown.method!r} predicts no increase of the loss"
            )
        twice = [row for row in other if row in self]
        if twice:
            raise ValueError(f"row {twice[0]!r} is in both tables")
        factor = other.predicts / self.predicts
        omega, stderr = (
            {name: {bits: factor * value for bits, value in row.items()} for name, row in rows.items()}
            for rows in (other, other.stderr)
        )
        note = "; ".join(filter(None, dict.fromkeys((self.note, other.note))))
        return SensitivityTable(
            {**self._omega, **omega}, {**self.stderr, **stderr}, f"{self.method} | {other.method}", self.predicts, note
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "method": self.method,
            "predicts": self.predicts,
            "note": self.note,
            "omega": self._omega,
            "stderr": self.stderr,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """What `to_dict` gave, also after JSON, whose keys are text; ValueError for anything else."""
        try:
            if (document["format"], document["version"]) != (_FORMAT, _VERSION):
                raise ValueError(f"format {document['format']!r}, version {document['version']!r}")
            omega, stderr = (
                {name: {int(bits): float(value) for bits, value in row.items()} for name, row in document[part].items()}
                for part in ("omega", "stderr")
            )
            if {name: list(row) for name, row in omega.items()} != {name: list(row) for name, row in stderr.items()}:
                raise ValueError("omega and stderr have different keys")
            return cls(omega, stderr, document["method"], document["predicts"], document["note"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"this is no sensitivity table of version {_VERSION}: {error}") from error

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @property
    def _widths(self) -> list[int]:
        return sorted({bits for row in self._omega.values() for bits in row})

    def header(self) -> list[str]:
        return [self.method, *(f"{bits} bits" for bits in self._widths)]

    def cells(self) -> list[list[str]]:
        return [[name, *(self._cell(name, bits) for bits in self._widths)] for name in self]

    def _cell(self, name: str, bits: int) -> str:
        if bits not in self._omega[name]:
            return ""
        error = self.stderr[name][bits]
        return f"{self._omega[name][bits]:.4g}" + (f" ± {error:.1g}" if error else "")

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw every row at every width, on a logarithmic axis, bars of one standard error; `ax=None` makes a new figure.

        What is not positive has no place on such an axis and is counted in the legend.
        """
        ax = new_axes() if ax is None else ax
        for bits in self._widths:
            having = [(place, name) for place, name in enumerate(self) if bits in self[name]]
            rows = [(place, self[name][bits], self.stderr[name][bits]) for place, name in having]
            shown = [row for row in rows if row[1] > 0]
            hidden = f", {len(rows) - len(shown)} not positive" if len(shown) < len(rows) else ""
            places, values, errors = zip(*shown, strict=True) if shown else ((), (), ())
            colour, marker = _MARKS.get(bits, (GREY, "x"))
            ax.errorbar(
                places,
                values,
                yerr=errors,
                fmt=f"{marker}-",
                color=colour,
                linewidth=0.8,
                markersize=4,
                capsize=2,
                label=f"{bits} bits{hidden}",
            )
        ax.set_yscale("log")
        ax.set_xticks(range(len(self)), list(self), rotation=60, ha="right", fontsize=7)
        ax.set_ylabel(f"sensitivity, {self.method}")
        ax.legend(fontsize=8, ncols=2)
        return ax

    def _repr_html_(self) -> str:
        return super()._repr_html_() + (f"<p>{html.escape(self.note)}</p>" if self.note else "")
