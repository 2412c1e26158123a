"""Allocation: how many bits each layer gets, and how good that is proven to be."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hessian.colours import BLUE, ORANGE
from hessian.drawn import new_axes
from hessian.files import write_atomically
from hessian.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACTIVATION = "activation:"  # what the rows of activations begin with
_FORMAT = "hessianware.allocation"
_VERSION = 1


@dataclass(frozen=True)
class BudgetUse:
    """What a budget allows and what the allocation spends, in the budget's own units."""

    limit: float
    used: float


@dataclass(frozen=True, repr=False)
class Allocation(Table):
    """Bits by row: layers by name, and activations under "activation:NAME" where each has its own width.

    objective: the sum of the table's entries. gap: relative distance to the proven bound (at most 1e-9: optimal; None:
    nothing is proven). activation_bits: the width of all activations without a row, None where they stay in float.
    """

    bits: dict[str, int]
    objective: float = float("nan")
    gap: float | None = None
    budgets: dict[str, BudgetUse] = field(default_factory=dict)
    activation_bits: int | None = None

    def with_activations(self, bits: int | None) -> "Allocation":
        """The same widths, with the width of activations noted."""
        return replace(self, activation_bits=bits)

    @property
    def layers(self) -> dict[str, int]:
        """Bits of the weights, by layer."""
        return {name: bits for name, bits in self.bits.items() if not name.startswith(ACTIVATION)}

    @property
    def activations(self) -> dict[str, int]:
        """Bits of the activations that have their own width, by NAME without the prefix."""
        rows = self.bits.items()
        return {name.removeprefix(ACTIVATION): bits for name, bits in rows if name.startswith(ACTIVATION)}

    def header(self) -> list[str]:
        return ["layer", "bits"]

    def cells(self) -> list[list[str]]:
        return [[name, str(bits)] for name, bits in self.bits.items()]

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the widths of layers and, in another colour, of activations with their own; `ax=None` makes a new figure."""
        ax = new_axes() if ax is None else ax
        first = len(self.layers)
        for rows, colour, start in ((self.layers, BLUE, 0), (self.activations, ORANGE, first)):
            ax.bar_label(ax.bar(range(start, start + len(rows)), list(rows.values()), color=colour), padding=2, fontsize=8)
        ax.set_xticks(range(len(self.bits)), [*self.layers, *self.activations], rotation=60, ha="right", fontsize=7)
        ax.set(ylabel="bits", ylim=(0, max(self.bits.values()) + 1), xlim=(-0.7, len(self.bits) - 0.3))
        return ax

    def average_bits(self, num_params: Mapping[str, int]) -> float:
        """Bits a weight, over all weights of the allocated layers.

        >>> from hawq import Allocation
        >>> Allocation({"first": 8, "second": 2}).average_bits({"first": 100, "second": 300})
        3.5
        """
        layers = self.layers
        return sum(bits * num_params[name] for name, bits in layers.items()) / sum(num_params[name] for name in layers)

    def to_json(self) -> str:
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "bits": self.bits,
            "activation_bits": self.activation_bits,
            "objective": self.objective,
            "gap": self.gap,
            "budgets": {name: {"limit": use.limit, "used": use.used} for name, use in self.budgets.items()},
        }
        return json.dumps(document, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Allocation":
        """What `to_json` wrote; ValueError for any other text."""
        try:
            document = json.loads(text)
            if (document["format"], document["version"]) != (_FORMAT, _VERSION):
                raise ValueError(f"format {document['format']!r}, version {document['version']!r}")
            bits = {name: int(width) for name, width in document["bits"].items()}
            budgets = {name: BudgetUse(**use) for name, use in document["budgets"].items()}
            return cls(bits, document["objective"], document["gap"], budgets, document["activation_bits"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"this is no allocation of version {_VERSION}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        write_atomically(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Allocation":
        return cls.from_json(Path(path).read_text())
