"""Which widths each layer may have: a table restricted by globs, and how a command line writes them."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from hawq.allocate import Table
from hawq.allocation import ACTIVATION
from hawq.sensitivity.table import SensitivityTable


def allowed_widths(table: Table, widths: Mapping[str, Sequence[int]]) -> Table:
    """The table with only these widths, {glob over row names: bits}; of several globs that match a row the last decides.

    Only globs that begin with "activation:" reach the rows of activations. A `SensitivityTable` stays one.
    Raises ValueError for a glob that matches no row and for widths that a matched row does not have.

    >>> import hawq
    >>> hawq.allowed_widths({"stem": {2: 5.0, 8: 0.0}, "head": {2: 3.0, 8: 0.0}}, {"head": (8,)})
    {'stem': {2: 5.0, 8: 0.0}, 'head': {8: 0.0}}
    """
    allowed = {name: tuple(row) for name, row in table.items()}
    for glob, bits in widths.items():
        rows = [name for name in table if _matches(name, glob)]
        if not rows:
            raise ValueError(f"{glob!r} matches none of the {len(table)} rows, such as {', '.join(list(table)[:3])}")
        if not bits:
            raise ValueError(f"{glob!r} is allowed no width: give at least one")
        for name in rows:
            missing = [width for width in bits if width not in table[name]]
            if missing:
                offered = ", ".join(map(str, table[name]))
                raise ValueError(
                    f"{name!r} has no sensitivity at {missing[0]} bits, only at {offered}: add it to the table's bits"
                )
            allowed[name] = tuple(width for width in table[name] if width in bits)
    restricted = {name: {bits: table[name][bits] for bits in row} for name, row in allowed.items()}
    if not isinstance(table, SensitivityTable):
        return restricted
    stderr = {name: {bits: table.stderr[name][bits] for bits in row} for name, row in allowed.items()}
    return SensitivityTable(restricted, stderr, table.method, table.predicts, table.note)


def parse_widths(entries: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The globs and widths of `GLOB=BITS[,BITS...]` entries, such as "features.0.*=8" and "head=4,8"; ValueError for others.

    >>> parse_widths(["features.0.*=8", "head=4,8"])
    {'features.0.*': (8,), 'head': (4, 8)}
    """
    widths: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        glob, equals, listed = entry.rpartition("=")
        numbers = [number.strip() for number in listed.split(",")]
        if not equals or not glob or not all(number.isdecimal() for number in numbers):
            raise ValueError(f"{entry!r} is not of the form GLOB=BITS, such as 'features.0.*=8' or 'head=4,8'")
        if glob in widths:
            raise ValueError(f"{glob!r} is given twice: list its widths in one entry, {glob}=4,8")
        widths[glob] = tuple(sorted({int(number) for number in numbers}))
    return widths


def _matches(name: str, glob: str) -> bool:
    if name.startswith(ACTIVATION) and not glob.startswith(ACTIVATION):
        return False
    return name == glob or fnmatchcase(name, glob)
