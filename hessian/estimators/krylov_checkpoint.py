"""A Krylov basis on disk, so that a long search goes on where it was stopped."""

import os
import time
from pathlib import Path

import safetensors.torch
import torch

from hessian.estimators.lanczos import KrylovBasis

_SECONDS = 30.0  # between two writings
_SAME = 1e-3  # how well the stored projection must agree with the operator, relative to its scale


class KrylovCheckpoint:
    """Writes a basis and a few counters to one safetensors file, atomically, and reads them back."""

    def __init__(self, path: Path, basis: KrylovBasis, generator: torch.Generator | None) -> None:
        self.path, self._basis, self._generator = path, basis, generator
        self._written = time.monotonic()

    def exists(self) -> bool:
        return self.path.is_file()

    def save_now_and_then(self, counters: dict[str, int]) -> None:
        """`save`, if the last time is long enough ago."""
        if time.monotonic() - self._written >= _SECONDS:
            self.save(counters)

    def save(self, counters: dict[str, int]) -> None:
        basis = self._basis
        counts = {**counters, "num_applied": basis.num_applied, "num_matvecs": basis.num_matvecs}
        state = {
            "rows": basis.rows[: basis.num_rows].contiguous().cpu(),
            "projection": basis.projection,
            "scale": torch.tensor(basis.scale, dtype=torch.float64),
            **{f"count.{name}": torch.tensor(value) for name, value in counts.items()},
        }
        if self._generator is not None:
            state["generator"] = self._generator.get_state()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        safetensors.torch.save_file(state, temporary)
        os.replace(temporary, self.path)
        self._written = time.monotonic()

    def load(self) -> dict[str, int]:
        """Put the stored state into the basis and the generator; the counters. One product checks that it fits the operator.

        ValueError for a file of another size, precision or operator.
        """
        basis = self._basis
        state = safetensors.torch.load_file(self.path)
        rows, projection = state["rows"], state["projection"]
        same_size = rows.shape[1] == basis.rows.shape[1] and projection.shape == basis.projection.shape
        if not same_size or rows.dtype != basis.rows.dtype:
            raise ValueError(
                f"the checkpoint {self.path} holds {len(rows)} vectors of size {rows.shape[1]} in {rows.dtype}, made with "
                "other options or for another model: name another file, or delete it"
            )
        counts = {name.removeprefix("count."): int(value) for name, value in state.items() if name.startswith("count.")}
        basis.rows[: len(rows)] = rows.to(basis.rows.device)
        basis.projection = projection
        basis.scale = float(state["scale"])
        basis.num_rows, basis.num_applied = len(rows), counts.pop("num_applied")
        basis.num_matvecs = counts.pop("num_matvecs")
        image = basis.operator.rows(basis.working(slice(0, 1)))
        found = basis.space.gram(image, basis.rows[: basis.num_rows])[0]
        tolerance = max(_SAME, 10 * basis.rounding) * basis.scale
        if float((found - projection[: basis.num_rows, 0]).norm()) > tolerance:
            raise ValueError(
                f"the checkpoint {self.path} belongs to another operator (other weights or data?): delete it to start anew"
            )
        if self._generator is not None and "generator" in state:
            self._generator.set_state(state["generator"])
        return counts
