"""python -m hawq.quantize TASK: from a trained network to a small file that runs on integers, and a report that shows why."""

import json
import logging
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO

import safetensors.torch
import torch

from hawq import runtime, storage
from hawq.job import Job
from hawq.options import OUTPUTS, Options, UsageError, parse
from hawq.report import build_report, render_html, summary
from hessian.command_line import reserve_stdout, write_result
from hessian.files import write_atomically
from hessian.task import UnknownTaskError


def quantize(options: Options) -> dict[str, Any]:
    """Run the whole job and write its results; the contents of report.json."""
    job = Job.start(options)  # the float network, evaluated, its batch norm folded
    budgets = job.budgets()

    traces = job.traces()
    table = job.sensitivities(traces)
    allocation = job.allocate(table, budgets)

    packed = job.quantize(allocation)
    model = storage.from_bytes(packed, job.graph)
    onnx_files = job.export(model, allocation)

    results = {
        "float": job.float_result,
        "quantized": job.evaluate(model, "torch"),
        "onnx": job.evaluate(runtime.network(onnx_files["quantized"]), "onnxruntime"),
    }
    points = job.frontier(table)
    latency = job.latencies(onnx_files, allocation)

    report = build_report(
        job,
        traces=traces,
        table=table,
        allocation=allocation,
        results=results,
        files={
            "float.safetensors": len(_state_file(job.task.model)),
            "float.onnx": len(onnx_files["float"]),
            "model.safetensors": len(packed),
            "model.onnx": len(onnx_files["quantized"]),
        },
        kernels=runtime.kernels(onnx_files["quantized"]),
        latency=latency,
        points=points,
    )
    _write_outputs(
        options.out,
        {
            "model.safetensors": packed,
            "model.onnx": onnx_files["quantized"],
            "allocation.json": allocation.to_json().encode(),
            "layers.json": traces.to_json().encode(),
            "report.html": render_html(report, job.graph, model).encode(),
            "report.json": (json.dumps(report, indent=1) + "\n").encode(),
        },
    )
    return report


def _state_file(model: torch.nn.Module) -> bytes:
    """The float network as a safetensors file, for comparison."""
    return safetensors.torch.save({name: tensor.clone() for name, tensor in model.state_dict().items()})


def _write_outputs(folder: Path, files: dict[str, bytes]) -> None:
    """Write all files aside, then rename them into place, report.json last."""
    assert tuple(files) == OUTPUTS
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
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("hawq").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        report = quantize(options)
    except (UsageError, UnknownTaskError) as error:
        return _fail(options, error, 2)
    except KeyboardInterrupt as error:
        note = f"interrupted; finished stages are kept: add --resume to go on in {options.out}"
        return _fail(options, error, 1, note)
    except Exception as error:  # whatever a user's network, data or disk can raise: one line, and the folder cleaned up
        return _fail(options, error, 1)
    text = json.dumps(report, indent=1) if options.json else summary(report, options.out)
    write_result(stdout, text + "\n")
    return 0


def _fail(options: Options, error: BaseException, code: int, message: str | None = None) -> int:
    """Say in one line what went wrong and leave nothing half-written behind."""
    shutil.rmtree(options.out / ".partial", ignore_errors=True)
    if options.debug:
        traceback.print_exception(error)
    ours = isinstance(error, ValueError | TypeError | OSError | RuntimeError | ModuleNotFoundError)
    text = message or (str(error) if ours else f"{type(error).__name__}: {error} (--debug shows where)")
    print(f"error: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    parsed = parse()
    sys.exit(run(parsed, reserve_stdout()))
