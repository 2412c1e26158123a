"""The command line of `python -m parallel.plan`."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from parallel.architectures import ARCHITECTURES

ALPHA, BETA = 2e-6, 1 / 6e9  # Gholami et al., SPAA 2018: 2 microseconds, 6 GB/s


@dataclass(frozen=True)
class Options:
    """The command line."""

    task: str
    world_size: int
    batch_size: int
    alpha: float
    beta: float
    measure: bool
    memory: float | None
    out: Path | None
    json: bool
    debug: bool


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The options, or a usage error."""
    return Options(**vars(parser().parse_args(arguments)))


def parser() -> argparse.ArgumentParser:
    """Every option with its unit."""
    result = argparse.ArgumentParser(
        prog="python -m parallel.plan",
        description="The cheapest layout of every layer, and of the ranks, for a step of training, by the alpha-beta model.",
    )
    add = result.add_argument
    add("task", metavar="TASK", help=f"{', '.join(ARCHITECTURES)}, a built-in task, or package.module:function")
    add("--world-size", type=int, required=True, metavar="P", help="ranks to plan for")
    add("--batch-size", type=int, required=True, metavar="B", help="examples a step, over all ranks")
    add("--alpha", type=float, default=ALPHA, metavar="S", help=f"seconds a message (default: {ALPHA:g})")
    add("--beta", type=float, default=BETA, metavar="S_PER_BYTE", help=f"seconds a byte (default: {BETA:.3g})")
    add("--measure", action="store_true", help="measure alpha and beta among the ranks of this torchrun")
    add("--memory", type=float, metavar="BYTES", help="that a rank may keep (default: no limit)")
    add("--out", type=Path, metavar="DIR", help="write plan.json and the figures cost and layouts there, as PNG and SVG")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--debug", action="store_true", help="show the traceback of an error")
    return result
