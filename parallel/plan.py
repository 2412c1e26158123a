"""python -m parallel.plan TASK|alexnet|resnet50|gpt: how should so many ranks share this network's training?"""

import argparse
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

from torch import distributed

import hessian
from hessian.command_line import Parser, add_completion, number, reserve_stdout, whole_number, write_result
from hessian.drawn import STYLE
from hessian.files import write_atomically
from hessian.objective import batches_of
from hessian.spelling import did_you_mean
from hessian.task import UnknownTaskError
from parallel.architectures import ARCHITECTURES
from parallel.communication import AlphaBeta
from parallel.layer_shape import LayerShape, describe
from parallel.measure import measure
from parallel.planner import Plans, best_plans, plot_by_ranks

ALPHA, BETA = 2e-6, 1 / 6e9  # Gholami et al., SPAA 2018: 2 microseconds, 6 GB/s
_MOST_RANKS = 10**6  # every number up to it is tried as a grid's side


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
    result = Parser(
        prog="python -m parallel.plan",
        description="The grid of ranks and the layout of every layer that communicate least, by the alpha-beta model.",
        epilog="""examples:
  python -m parallel.plan alexnet --world-size 512 --batch-size 2048 --out out/plan
  python -m parallel.plan my_package.tasks:cifar --world-size 16 --batch-size 1024 --memory 8e9
  torchrun --nproc-per-node 4 -m parallel.plan resnet50 --world-size 4 --batch-size 256 --measure
exit codes: 0 done, 1 failed or interrupted, 2 wrong usage, or a network that cannot be planned""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("task", metavar="TASK", help=f"{', '.join(ARCHITECTURES)}, a built-in task, or package.module:function")
    add("--world-size", type=whole_number(1, _MOST_RANKS), required=True, metavar="P", help="ranks to plan for")
    add("--batch-size", type=whole_number(1), required=True, metavar="B", help="examples a step, over all ranks")
    add("--alpha", type=number(least=0), default=ALPHA, metavar="S", help=f"seconds a message (default: {ALPHA:g})")
    add("--beta", type=number(least=0), default=BETA, metavar="S_PER_BYTE", help=f"seconds a byte (default: {BETA:.3g})")
    add("--measure", action="store_true", help="measure alpha and beta among the ranks of this torchrun")
    add("--memory", type=number(above=0), metavar="BYTES", help="that a rank may keep (default: no limit)")
    add("--out", type=Path, metavar="DIR", help="write plan.json and the figures cost and layouts there, as PNG and SVG")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--debug", action="store_true", help="show the traceback of an error")
    add_completion(result, "parallel-plan")
    return result


def layers_of(task: str) -> list[LayerShape]:
    """The layers of a well-known network, or of a task's."""
    if task in ARCHITECTURES:
        return ARCHITECTURES[task]()
    try:
        loaded = hessian.load_task(task)
    except UnknownTaskError as error:
        hint = did_you_mean(task, ARCHITECTURES)
        raise UnknownTaskError(f"{error}; networks that need no task: {', '.join(ARCHITECTURES)}{hint}") from error
    inputs = next(iter(batches_of(loaded.train, 1)))[0]
    return describe(loaded.model, inputs)


def network_of(options: Options) -> AlphaBeta:
    """Alpha and beta, given or measured."""
    if not options.measure:
        return AlphaBeta(options.alpha, options.beta)
    if "WORLD_SIZE" not in os.environ:
        raise ValueError("--measure times the ranks of a torchrun: torchrun --nproc-per-node N -m parallel.plan ... --measure")
    distributed.init_process_group("gloo")
    return measure(progress=True)


def to_dict(options: Options, network: AlphaBeta, plans: Plans) -> dict[str, Any]:
    """What --json prints."""
    return {
        "task": options.task,
        "world_size": options.world_size,
        "batch_size": options.batch_size,
        "alpha": network.alpha,
        "beta": network.beta,
        **{name: getattr(plans, name).to_dict() for name in asdict(plans)},
    }


def summary(network: AlphaBeta, plans: Plans) -> str:
    """A table for the terminal."""
    lines = [
        repr(plans.best),
        "",
        f"alpha {network.alpha:.3g} s a message, beta {network.beta:.3g} s a byte; a step communicates",
    ]
    for label, one in (("best", plans.best), ("pure batch", plans.pure_batch), ("pure model", plans.pure_model)):
        grid = f"{one.grid.model} x {one.grid.batch}"
        gigabytes = f"{one.memory / 1e9:.3g} GB a rank kept"
        why = f"; cannot run: {one.obstacles[0]}" if one.obstacles else ""
        lines.append(
            f"{label:>10}  grid {grid:>9}  {1e3 * one.seconds:10.4g} ms  {one.bytes / 1e6:10.4g} MB sent  {gigabytes}{why}"
        )
    return "\n".join(lines)


def write_outputs(folder: Path, text: str, layers: list[LayerShape], network: AlphaBeta, options: Options, best: Plans) -> None:
    """plan.json and the figures."""
    from matplotlib import style  # slow to import, and needed here alone
    from matplotlib.figure import Figure

    from hessian.drawing import to_png, to_svg

    write_atomically(folder / "plan.json", text)
    plans = {}
    for ranks in sorted({2**power for power in range(options.world_size.bit_length())} | {options.world_size}):
        if 2 <= ranks < options.world_size:
            try:
                plans[ranks] = best_plans(layers, ranks, options.batch_size, network, most_memory=options.memory)
            except ValueError:  # this many ranks cannot keep it
                continue
    plans[options.world_size] = best
    for name, draw in (("cost", partial(plot_by_ranks, plans)), ("layouts", best.best.plot)):
        with style.context(STYLE):
            figure = Figure(figsize=(7.2, 3.8 if name == "cost" else 1.2 + 0.2 * len(layers)))
            draw(figure.add_subplot())
        write_atomically(folder / f"{name}.png", to_png(figure))
        write_atomically(folder / f"{name}.svg", to_svg(figure))


def run(options: Options, stdout: TextIO) -> int:
    """Plan and print; the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        network = network_of(options)
        if distributed.is_initialized() and distributed.get_rank() > 0:
            return 0
        layers = layers_of(options.task)
        plans = best_plans(layers, options.world_size, options.batch_size, network, most_memory=options.memory)
        text = json.dumps(to_dict(options, network, plans), indent=1, allow_nan=False) + "\n"
        if options.out is not None:
            write_outputs(options.out, text, layers, network, options, plans)
    except Exception as error:  # whatever a user's network can raise: one line
        if options.debug:
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | TypeError | OSError | ImportError) else 1
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    write_result(stdout, text if options.json else summary(network, plans) + "\n")
    return 0


def command() -> NoReturn:
    """The program, started by its name or by `python -m`."""
    parsed = parse()
    sys.exit(run(parsed, reserve_stdout()))


if __name__ == "__main__":
    command()
