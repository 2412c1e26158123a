"""Would the allocation be another if the sensitivities had come out otherwise within their standard errors?"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from hawq.allocate import Budget, allocate
from hawq.sensitivity.table import SensitivityTable
from hessian.tables import Table

_LEAST_SHARE = 1e-3  # of a sensitivity: a trace known to be positive is not drawn as negative


@dataclass(frozen=True)
class RowStability:
    """The chosen width, the share of draws that choose it again, and the narrowest and the widest that any draw chooses."""

    bits: int
    share: float
    narrowest: int
    widest: int


@dataclass(frozen=True, repr=False)
class Stability(Table):
    """How an allocation holds within the standard errors of its sensitivities.

    exact: no sensitivity has an error, so that nothing was drawn and `rows` is empty. expected_regret: how much more, on
    average, the chosen widths cost in a drawn table than that table's best; relative_regret: over the mean of the latter.
    """

    rows: dict[str, RowStability]
    samples: int
    exact: bool
    expected_regret: float
    regret_stderr: float
    relative_regret: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def header(self) -> list[str]:
        return ["row", "bits", "chosen again", "narrowest", "widest"]

    def cells(self) -> list[list[str]]:
        return [
            [name, str(row.bits), f"{row.share:.0%}", str(row.narrowest), str(row.widest)] for name, row in self.rows.items()
        ]


def stability(
    table: SensitivityTable,
    budgets: Sequence[Budget] = (),
    ties: Iterable[Sequence[str]] = (),
    *,
    samples: int = 64,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Stability:
    r"""Allocate anew from `samples` tables drawn within the standard errors, and count how often each width is chosen again.

    .. math:: \Omega_i'(b) = \max(\Omega_i(b) + z_i \sigma_i(b), \epsilon \Omega_i(b)), \quad z_i \sim N(0, 1)

    with one draw for each row: its widths share the error of the row's trace. Raises ValueError as `allocate` does.
    """
    if samples < 1:
        raise ValueError(f"samples={samples}: draw at least one table")
    if not any(error for row in table.stderr.values() for error in row.values()):
        return Stability({}, 0, exact=True, expected_regret=0.0, regret_stderr=0.0, relative_regret=0.0)
    ties = list(ties)
    chosen = allocate(table, budgets, ties).bits
    draws = torch.randn(samples, len(table), generator=generator, dtype=torch.float64)
    seen: dict[str, list[int]] = {name: [] for name in table}
    regrets, best = [], []
    for draw in tqdm(draws.tolist(), desc="stability", unit="allocation", disable=not progress):
        drawn = _drawn(table, draw)
        other = allocate(drawn, budgets, ties)
        for name, bits in other.bits.items():
            seen[name].append(bits)
        best.append(other.objective)
        regrets.append(sum(drawn[name][bits] for name, bits in chosen.items()) - other.objective)
    regret = torch.tensor(regrets, dtype=torch.float64)
    expected, mean_best = float(regret.mean()), sum(best) / samples
    return Stability(
        {
            name: RowStability(bits, seen[name].count(bits) / samples, min(seen[name]), max(seen[name]))
            for name, bits in chosen.items()
        },
        samples,
        exact=False,
        expected_regret=expected,
        regret_stderr=float(regret.std() / samples**0.5) if samples > 1 else float("nan"),
        relative_regret=expected / abs(mean_best) if mean_best else float("nan"),
    )


def _drawn(table: SensitivityTable, draw: Sequence[float]) -> Mapping[str, Mapping[int, float]]:
    drawn = {}
    for (name, row), z in zip(table.items(), draw, strict=True):
        drawn[name] = {bits: max(omega + z * table.stderr[name][bits], _LEAST_SHARE * omega) for bits, omega in row.items()}
    return drawn
