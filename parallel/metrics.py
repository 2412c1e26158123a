"""What happens in a run, a line a step: metrics.jsonl, and TensorBoard's files where it is installed."""

import json
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any, TextIO

from hessian.files import write_atomically


class Metrics:
    """Appends to `folder`/metrics.jsonl. Lines of steps behind `step` are dropped first: the run goes on from there.

    A line is written at once, so that a killed run leaves all lines of the steps that it took.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        self._path, self._board_folder = folder / "metrics.jsonl", folder / "tensorboard"
        self._file: TextIO | None = None
        self._board: Any = None
        self.rows = read(self._path)
        self.go_back(step)

    def add(self, row: Mapping[str, Any]) -> None:
        """One step's numbers; `step` is among them."""
        assert self._file is not None
        row = without_nan(row)
        self.rows.append(row)
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name.replace("evaluation_", "evaluation/"), value, row["step"])

    def go_back(self, step: int) -> None:
        """Drop the lines behind `step`."""
        self.close()
        self.rows = self.rows[:step]
        write_atomically(self._path, "".join(f"{json.dumps(row)}\n" for row in self.rows))
        self._file = self._path.open("a")
        self._board = _tensorboard(self._board_folder, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def without_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN or infinity: None instead."""
    return {name: None if isinstance(value, float) and not isfinite(value) else value for name, value in row.items()}


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl up to the first line that is cut short; none where there is no file."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
