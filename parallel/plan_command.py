"""What `python -m parallel.plan` does: plan, print, draw."""

import json
import logging
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from torch import distributed

import hessian
from hessian.command_line import write_result
from hessian.drawing import to_png, to_svg
from hessian.files import write_atomically
from hessian.objective import batches_of
from hessian.task import UnknownTaskError
from parallel import plan_figures
from parallel.architectures import ARCHITECTURES
from parallel.communication import AlphaBeta
from parallel.layer_shape import LayerShape, describe
from parallel.measure import measure
from parallel.plan_options import Options
from parallel.planner import Plans, plan


def layers_of(task: str) -> list[LayerShape]:
    """The layers of a well-known network, or of a task's."""
    if task in ARCHITECTURES:
        return ARCHITECTURES[task]()
    try:
        loaded = hessian.load_task(task)
    except UnknownTaskError as error:
        raise UnknownTaskError(f"{error}; networks that need no task: {', '.join(ARCHITECTURES)}") from error
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
    write_atomically(folder / "plan.json", text)
    plans = {}
    for ranks in sorted({2**power for power in range(options.world_size.bit_length())} | {options.world_size}):
        if 2 <= ranks < options.world_size:
            try:
                plans[ranks] = plan(layers, ranks, options.batch_size, network, most_memory=options.memory)
            except ValueError:  # this many ranks cannot keep it
                continue
    plans[options.world_size] = best
    for name, figure in (("cost", plan_figures.cost_by_ranks(plans)), ("layouts", plan_figures.layouts(best.best))):
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
        plans = plan(layers, options.world_size, options.batch_size, network, most_memory=options.memory)
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
