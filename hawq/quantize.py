"""python -m hawq.quantize TASK: from a trained network to a small file that runs on integers, and a report that shows why.

torchrun ... -m hawq.quantize TASK divides the data of traces and sensitivities among processes.
"""

import json
import logging
import math
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO

import safetensors.torch
import torch

from hawq import runtime, storage
from hawq.allocate import Budget
from hawq.allocation import Allocation
from hawq.command_line import parse
from hawq.evaluation import Evaluation
from hawq.extra_formats import fake_quantized, torchao_config
from hawq.integer_inference import integer_only
from hawq.job import Job, logger, widened
from hawq.kernels import explain_kernels
from hawq.measurement import guilty_layer, measure
from hawq.model import QuantizedModel
from hawq.options import EXTRA_OUTPUTS, Options, UsageError
from hawq.page import render_html, summary
from hawq.prediction import sensitivities, smallest, stable
from hawq.report import build_report
from hawq.sensitivity import SensitivityTable
from hessian.command_line import reserve_stdout, write_result
from hessian.files import write_atomically
from hessian.processes import Processes, joined, leave, one_process
from hessian.task import UnknownTaskError

_MOST_RAISED = 3  # layers, after which a loss that stays infinite is an error


def quantize(options: Options, processes: Processes) -> dict[str, Any] | None:
    """Run the whole job and write its results; the contents of report.json.

    Several processes divide the data of traces and sensitivities; what follows is the first one's, and the others return None.
    """
    job = Job.start(options, processes)  # the float network, evaluated, its batch norm folded
    budgets = job.budgets()

    traces = job.traces()
    table = sensitivities(job, traces)
    if not job.is_first:
        return None
    job = job.alone()
    threads = torch.get_num_threads() * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads)  # those of the processes that have left, too
    allocation, trials = job.allocate(table, budgets), None
    if options.max_drop is not None:
        allocation, trials = smallest(job, table, budgets)
    held = stable(job, table, budgets, allocation)

    rounded = _quantize(job, table, budgets, allocation)
    allocation, packed, model, result = rounded.allocation, rounded.packed, rounded.model, rounded.result
    if options.finetune:
        packed = job.finetune(packed, allocation)
        model = storage.from_bytes(packed, job.graph)
        result = job.evaluate(model, "torch")
    onnx_files = job.export(model, packed)

    results = {
        "float": job.float_result,
        "quantized": result,
        "onnx": job.evaluate(runtime.network(onnx_files["quantized"]), "onnxruntime"),
    }
    measured = measure(job, table, allocation, rounded.model, rounded.seconds)
    integers = integer_only(job, model, packed, onnx_files["quantized"])
    latency = job.latencies(onnx_files, packed)

    report = build_report(
        job,
        traces=traces,
        table=table,
        allocation=allocation,
        stability=held,
        trials=trials,
        raised=rounded.raised,
        results=results,
        files={
            "float.safetensors": len(_state_file(job.task.model)),
            "float.onnx": len(onnx_files["float"]),
            "model.safetensors": len(packed),
            "model.onnx": len(onnx_files["quantized"]),
        },
        kernels=explain_kernels(onnx_files["quantized"]),
        may_saturate=[name for name, layer in model.layers().items() if options.activations and layer.may_saturate],
        integers=integers,
        latency=latency,
        measured=measured,
    )
    outputs = {
        "model.safetensors": packed,
        "model.onnx": onnx_files["quantized"],
        "allocation.json": allocation.to_json().encode(),
        "layers.json": traces.to_json().encode(),
        "report.html": render_html(report, job.graph, model).encode(),
        "report.json": (json.dumps(report, indent=1) + "\n").encode(),
    }
    if options.extra_formats:
        extra = (torchao_config(model, options.group_size).encode(), fake_quantized(model, job.graph))
        outputs = dict(zip(EXTRA_OUTPUTS, extra, strict=True)) | outputs
    assert tuple(outputs) == options.outputs
    _write_outputs(options.out, outputs)
    return report


@dataclass(frozen=True)
class _Rounded:
    """The network at its widths before any training; what was `raised` to make its loss finite; `seconds` that it took."""

    allocation: Allocation
    packed: bytes
    model: QuantizedModel
    result: Evaluation
    raised: list[dict[str, Any]]
    seconds: float


def _quantize(job: Job, table: SensitivityTable, budgets: list[Budget], allocation: Allocation) -> _Rounded:
    """Round; where the loss is infinite or NaN the layer at fault gets 8 bits, then float, and all is rounded again."""
    raised: list[dict[str, Any]] = []
    while True:
        packed = job.quantize(allocation)
        model = storage.from_bytes(packed, job.graph)
        started = time.perf_counter()
        result = job.evaluate(model, "torch")
        spent = job.stages.seconds["quantization"] + time.perf_counter() - started
        if math.isfinite(result.loss):
            # Kept, since a run that resumes does not quantize again and could not tell.
            seconds = job.stages.run_json("seconds", job.inputs(allocation), lambda: spent)  # noqa: B023
            return _Rounded(allocation, packed, model, result, raised, seconds)
        if len(raised) == _MOST_RAISED:
            names = ", ".join(row["layer"] for row in raised)
            raise ValueError(
                f"the loss of the quantized network is {result.loss}, even after more bits for {names}: raise the budget, or "
                "give the layers that must stay exact more bits with --layer-bits"
            )
        name = guilty_layer(job, table, allocation, model)
        before, allocation = allocation.bits[name], widened(allocation, name, table, budgets)
        after = allocation.bits.get(name)
        raised.append({"layer": name, "bits_before": before, "bits": after})
        logger.warning("the loss is %s: layer %r goes from %d bits to %s", result.loss, name, before, after or "float")


def _state_file(model: torch.nn.Module) -> bytes:
    """The float network as a safetensors file, for comparison."""
    return safetensors.torch.save({name: tensor.clone() for name, tensor in model.state_dict().items()})


def _write_outputs(folder: Path, files: dict[str, bytes]) -> None:
    """Write all files aside, then rename them into place, report.json last."""
    partial = folder / ".partial"
    partial.mkdir(parents=True)
    for name, content in files.items():
        write_atomically(partial / name, content)
    (folder / "report.json").unlink(missing_ok=True)
    for name in files:
        os.replace(partial / name, folder / name)
    partial.rmdir()


def _interrupt(signum: int, frame: object) -> None:
    del signum, frame
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, report on standard output; the exit code."""
    return run(parse(arguments), sys.stdout)


def run(options: Options, stdout: TextIO) -> int:
    """Do what `options` say and print the result to `stdout`; the exit code."""
    is_first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.WARNING if is_first else logging.ERROR, format="%(message)s", stream=sys.stderr)
    logging.getLogger("hawq").setLevel(logging.INFO if is_first else logging.ERROR)
    if not is_first:
        warnings.simplefilter("ignore")  # the first process has the same
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with joined(always=False) as processes:
            return _run(options, processes, stdout)
    except Exception as error:  # the processes did not meet
        return _fail(options, one_process(), error, 2)


def _run(options: Options, processes: Processes, stdout: TextIO) -> int:
    try:
        report = quantize(options, processes)
    except (UsageError, UnknownTaskError) as error:
        return _fail(options, processes, error, 2)
    except KeyboardInterrupt as error:
        note = f"interrupted; finished stages are kept: add --resume to go on in {options.out}"
        return _fail(options, processes, error, 1, note)
    except Exception as error:  # whatever a user's network, data or disk can raise: one line, and the folder cleaned up
        return _fail(options, processes, error, 1)
    if report is not None:
        text = json.dumps(report, indent=1) if options.json else summary(report, options.out)
        write_result(stdout, text + "\n")
    return 0


def _fail(options: Options, processes: Processes, error: BaseException, code: int, message: str | None = None) -> int:
    """Say in one line what went wrong, once for all processes, and leave nothing half-written behind."""
    if processes.world_size > 1:  # torchrun ends all as soon as one has failed
        signal.signal(signal.SIGTERM, signal.SIG_IGN if processes.rank == 0 else signal.SIG_DFL)
    if options.debug:
        traceback.print_exception(error)
    ours = isinstance(error, ValueError | TypeError | OSError | RuntimeError | ModuleNotFoundError)
    text = message or (str(error) if ours else f"{type(error).__name__}: {error} (--debug shows where)")
    if processes.rank == 0:
        shutil.rmtree(options.out / ".partial", ignore_errors=True)
        print(f"error: {text}", file=sys.stderr)
        processes.tell_failure(text)
    elif not processes.is_told(text):
        print(f"rank {processes.rank}: error: {text}", file=sys.stderr)
    return code


def command() -> NoReturn:
    """The program, started by its name or by `python -m`."""
    parsed = parse()
    leave(run(parsed, reserve_stdout()))


if __name__ == "__main__":
    command()
