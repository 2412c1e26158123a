"""Answers: frozen, with their uncertainty, as tables and as JSON."""

import html
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from hessian.files import write_atomically

_FORMAT = "hessianware.layer-report"
_VERSION = 1


@dataclass(frozen=True)
class LayerRow:
    """Curvature of one parameter tensor.

    trace: of its diagonal Hessian block. trace_stderr: its standard error, 0.0 where exact. exact: whether the trace
    is free of sampling error. num_params: the tensor's size. converged: whether the standard error is within what was
    asked for. reason: why the trace is not exact, else empty.
    """

    trace: float
    trace_stderr: float
    exact: bool
    num_params: int
    converged: bool = True
    reason: str = ""


class LayerReport(Mapping[str, LayerRow]):
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

    def __repr__(self) -> str:
        width = max([len(name) for name in self], default=4)
        lines = [f"{'name':{width}}  {'params':>9}  {'trace':>11}  {'std. error':>10}"]
        for name, row in self.items():
            error = "exact" if row.exact else f"{row.trace_stderr:.2g}"
            lines.append(f"{name:{width}}  {row.num_params:>9,}  {row.trace:>11.4g}  {error:>10}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        cells = [
            f"<tr><td>{html.escape(name)}</td><td>{row.num_params:,}</td><td>{row.trace:.4g}</td>"
            f"<td>{'exact' if row.exact else f'{row.trace_stderr:.2g}'}</td></tr>"
            for name, row in self.items()
        ]
        head = "<tr><th>name</th><th>parameters</th><th>trace</th><th>standard error</th></tr>"
        return f"<table><thead>{head}</thead><tbody>{''.join(cells)}</tbody></table>"
