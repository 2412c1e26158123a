"""python -m benchmarks.saturation: byte products on x64 without VNNI, by default kernels and exactly.

onnxruntime's default kernels add pairs of products in 16 bits, which saturate where a weight's code lies beyond -64 to 63.
Printed, and written to benchmarks/results/saturation.md. With VNNI the two are the same, and there is nothing to measure.
"""

import argparse
import os
import platform
import statistics
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

import hawq
from benchmarks.quantizer import Case, table
from benchmarks.quantizer_peers import onnxruntime_static_file
from hawq import onnx_export, runtime
from hawq.cost.latency import cpu_name
from hessian.doctor import products_are_exact
from hessian.files import write_atomically
from hessian.task import load_task

RESULT = Path(__file__).parent / "results" / "saturation.md"
BATCH = 32
SECONDS = 1.0  # for each session


def session(content: bytes, exact: bool) -> Any:
    """One thread; the runtime's default kernels, or exact ones."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if exact:
        options.add_session_config_entry(*runtime.EXACT_PRODUCTS)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def files(case: Case) -> dict[str, bytes]:
    """Quantized files by what they are called."""
    sensitivity = case.sensitivity()
    widths = {
        "average 4 of 2 to 8 bits": case.allocation(sensitivity, 4),
        "average 4 of 2 to 6 bits": case.allocation(hawq.allowed_widths(sensitivity, {"*": (2, 3, 4, 5, 6)}), 4),
        "8 bits everywhere": hawq.Allocation(dict.fromkeys(case.layers, 8)),
    }
    ours = {name: onnx_export.to_bytes(case.quantized(chosen, 8), case.example) for name, chosen in widths.items()}
    content = onnx_export.to_bytes(case.graph, case.example)
    return ours | {"onnxruntime's own W8A8": onnxruntime_static_file(content, [inputs for inputs, _ in case.calibration])}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None).parse_args()
    if products_are_exact():
        sys.exit("error: byte products are exact on this processor: measure on x64 without VNNI")
    case = Case(load_task("digits-resnet20"))
    images, targets = case.task.evaluation[:]
    batch = {"input": images[:BATCH].numpy()}
    contents, rows = files(case), []
    sessions = {(name, exact): session(content, exact) for name, content in contents.items() for exact in (False, True)}
    turns = runtime.time_in_turns([partial(one.run, None, batch) for one in sessions.values()], seconds=SECONDS)
    milliseconds = {key: 1e3 * statistics.median(times) for key, times in zip(sessions, turns, strict=True)}
    for name, content in contents.items():
        outputs = [sessions[name, exact].run(None, {"input": images.numpy()})[0] for exact in (False, True)]
        off = np.linalg.norm(outputs[0] - outputs[1]) / np.linalg.norm(outputs[1])
        accuracies = [float(case.task.metric(torch.from_numpy(found), targets)) for found in outputs]
        times = [milliseconds[name, exact] for exact in (False, True)]
        rows.append(
            [
                *(name, f"{len(content):,}"),
                *(f"{accuracy:.2%}" for accuracy in accuracies),
                f"{off:.2%}",
                *(f"{time:.2f}" for time in times),
                f"{times[1] / times[0]:.2f}",
            ]
        )
    columns = ["file", "bytes", "accuracy by default", "exact accuracy", "outputs off by", "ms by default", "exact ms", "ratio"]
    versions = f"torch {torch.__version__.split('+')[0]}, onnxruntime {version('onnxruntime')}"
    machine = f"Python {platform.python_version()}, {versions}, {cpu_name()}, {os.cpu_count()} cores, one thread, batch {BATCH}"
    command = f"`python -m benchmarks.saturation`, {machine}"
    text = "\n".join(["## Byte products without VNNI", "", *table(columns, rows, 7), command, ""])
    print(text)
    write_atomically(RESULT, text)


if __name__ == "__main__":
    main()
