"""Results as text: tables, aligned in a terminal and HTML in a notebook, and metrics."""

import html
from abc import abstractmethod


def metric_text(value: float) -> str:
    """A share in per cent; a metric that is no share as it is."""
    return f"{value:.2%}" if 0 <= value <= 1 else f"{value:.4g}"


class Table:
    """A result that shows itself as a table of `header()` and `cells()`."""

    @abstractmethod
    def header(self) -> list[str]:
        """The columns' names."""

    @abstractmethod
    def cells(self) -> list[list[str]]:
        """The rows, as text."""

    def __repr__(self) -> str:
        rows = [self.header(), *self.cells()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.header())
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in self.cells())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
