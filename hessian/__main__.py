"""python -m hessian TASK: the curvature of a task's loss, as a page, as JSON and as figures."""

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

import hessian
from hessian import landscape
from hessian.batch import count_examples, split_batch
from hessian.command_line import reserve_stdout, write_result
from hessian.files import write_atomically
from hessian.objective import batches_of
from hessian.processes import Processes, joined, leave
from hessian.report import Findings, render_html, summary
from hessian.report_options import Options, Plan, ProductCost, parse
from hessian.split_data import divided
from hessian.task import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = ("spectrum", "layers", "landscape_line", "landscape_contour", "convergence")
_PLANE_EXAMPLES = 64
_COUNTED_EXAMPLES = 2  # whose gradient's operations are counted

_Result = TypeVar("_Result")
logger = logging.getLogger(__name__)


def analyse(options: Options, processes: Processes) -> Findings:
    """Everything that the report says of one task; under torchrun the examples are divided among the processes."""
    options.check()
    stages = _Stages(options.seed)
    task = hessian.load_task(options.task, options.weights)
    task.model.to(processes.device).eval()  # as it will be used; in Python, a model is taken in the mode that it is in
    processes.broadcast(task.model)
    plan = stages.run("plan", lambda _: choose_plan(options, task))
    logger.info("%s: %s", task.name, plan)
    progress = processes.rank == 0

    data = list(draw(options, task, plan.examples))
    objective = divided(task.model, task.loss, data, processes.world_size)
    operator = hessian.Hessian(objective)
    shapes = {name: tuple(parameter.shape) for name, parameter in operator.parameters.items()}

    verification = stages.run("verification", lambda own: hessian.verify(operator, generator=own))
    loss, gradient = operator.loss_and_gradient()
    top = stages.run(
        "eigenvalues", lambda own: hessian.top_eigenpairs(operator, plan.eigenvalues, generator=own, progress=progress)
    )
    spectrum = stages.run(
        "density", lambda own: hessian.spectrum(operator, plan.probes, plan.steps, generator=own, progress=progress)
    )
    trace = stages.run(
        "trace", lambda own: hessian.trace(operator, max_matvecs=plan.layer_probes, generator=own, progress=progress)
    )
    layers = stages.run(
        "layers",
        lambda own: hessian.layer_report(
            objective, eigenvalues=plan.layer_eigenvalues, max_probes=plan.layer_probes, generator=own, progress=progress
        ),
    )
    line = plane = None
    nearby = [next(iter(split_batch(data[0], _PLANE_EXAMPLES)))]
    if options.landscape:
        line = stages.run("line", lambda _: landscape.line(objective, direction=top.vectors[:, 0], progress=progress))
    if options.landscape and plan.eigenvalues >= 2:
        size = plan.plane_points
        plane = stages.run(
            "plane",
            lambda _: landscape.plane(
                objective.over_whole(nearby), directions=top.vectors[:, :2], num_points=size, progress=progress
            ),
        )
    return Findings(
        task=task.name,
        options=options,
        plan=plan,
        method=operator.method,
        dtype=str(operator.dtype).removeprefix("torch."),
        shapes=shapes,
        loss=loss,
        gradient_norm=float(gradient.double().norm()),
        verification=verification,
        top=top,
        spectrum=spectrum,
        trace=trace,
        layers=layers,
        line=line,
        plane=plane,
        plane_examples=count_examples(nearby[0]),
        seconds=stages.seconds,
    )


def draw(options: Options, task: Task, examples: int) -> Any:
    """Batches of `examples` training examples, chosen by the seed: one, unless a smaller size is asked for."""
    own = torch.Generator().manual_seed(options.seed)
    return batches_of(task.train, min(options.batch_size or examples, examples), size=examples, generator=own)


def choose_plan(options: Options, task: Task) -> Plan:
    """What the options ask for; where they leave a choice, what fits the time that products are expected to take."""
    available = len(task.train)  # type: ignore[arg-type]  # load_task has seen its length
    counted = min(_COUNTED_EXAMPLES, available)
    operator = hessian.Hessian(task.model, task.loss, list(draw(options, task, counted)))
    cost = None
    if options.leaves_a_choice():
        with FlopCounterMode(display=False) as counter:
            operator.loss_and_gradient()
        cost = ProductCost.of(counter.get_total_flops() / counted, options.device)
    return options.plan(available, operator.shape[0], len(operator.parameters), cost)


class _Stages:
    """Runs stages in a fixed order, each with random numbers of its own; `seconds` by stage."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.seconds: dict[str, float] = {}

    def run(self, name: str, compute: Callable[[torch.Generator], _Result]) -> _Result:
        logger.info("%s ...", name)
        own = torch.Generator().manual_seed(self.seed + len(self.seconds) + 1)
        started = time.perf_counter()
        result = compute(own)
        self.seconds[name] = time.perf_counter() - started
        return result


def draw_figures(findings: Findings) -> "dict[str, Figure]":
    """The figures that these findings have, by name, in the order of the page."""
    from hessian import figures  # matplotlib is slow to import, and needed at the end alone

    drawn: dict[str, Figure | None] = {
        "spectrum": figures.spectrum(findings.spectrum, findings.top, findings.outliers, findings.sigma),
        "layers": figures.layers(findings.layers, findings.shapes),
        "landscape_line": None if findings.line is None else figures.landscape_line(findings.line),
        "landscape_contour": None if findings.plane is None else figures.landscape_contour(findings.plane),
        "convergence": figures.convergence(findings.top, findings.probe_traces, findings.trace),
    }
    assert tuple(drawn) == PICTURES
    return {name: figure for name, figure in drawn.items() if figure is not None}


def write_outputs(folder: Path, findings: Findings, text: str) -> None:
    """Figures and the page, then report.json (`text`); figures of an earlier run that this one has not are removed."""
    from hessian.drawing import to_inline_svg, to_png

    pictures = draw_figures(findings)
    page = render_html(findings, {name: to_inline_svg(figure) for name, figure in pictures.items()})
    images = {name: to_png(figure) for name, figure in pictures.items()}
    (folder / "report.json").unlink(missing_ok=True)
    for name in PICTURES:
        if name in images:
            write_atomically(folder / f"{name}.png", images[name])
        else:
            (folder / f"{name}.png").unlink(missing_ok=True)
    write_atomically(folder / "report.html", page)
    write_atomically(folder / "report.json", text)


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, report on standard output; the exit code."""
    return run(parse(arguments), sys.stdout)


def run(options: Options, stdout: TextIO) -> int:
    """Do what `options` say and print the result to `stdout`; the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    is_first = os.environ.get("RANK", "0") == "0"
    logging.getLogger("hessian").setLevel(logging.INFO if is_first else logging.ERROR)
    logger.setLevel(logging.INFO if is_first else logging.ERROR)
    try:
        with joined(options.device, always=False) as processes:
            findings = analyse(options, processes)
        text = json.dumps(findings.to_dict(), indent=1, allow_nan=False) + "\n"
        if is_first:
            write_outputs(options.out, findings, text)
    except KeyboardInterrupt as error:
        return _fail(options, error, 1, "interrupted: nothing was written")
    except (ValueError, TypeError, MemoryError, OSError, RuntimeError, ModuleNotFoundError) as error:
        return _fail(options, error, 2, str(error))
    except Exception as error:  # whatever else a user's network or data can raise: one line
        return _fail(options, error, 1, f"{type(error).__name__}: {error} (--debug shows where)")
    if is_first:
        write_result(stdout, text if options.json else summary(findings, options.out) + "\n")
    return 0


def _fail(options: Options, error: BaseException, code: int, message: str) -> int:
    """Say in one line what went wrong."""
    if options.debug:
        traceback.print_exception(error)
    rank = os.environ.get("RANK", "0")
    who = "" if rank == "0" else f"rank {rank}: "
    print(f"{who}error: {' '.join(message.split()) or type(error).__name__}", file=sys.stderr)
    return code


def command() -> NoReturn:
    """The program, started by its name or by `python -m`."""
    parsed = parse()
    leave(run(parsed, reserve_stdout()))


if __name__ == "__main__":
    command()
