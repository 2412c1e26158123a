"""onnxruntime: outputs, the kernels it chose, and how long it takes."""

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

INSTALL = "pip install 'hessianware[onnx]'"
_REPEATS = 30
_WARM_UP = 5


def require() -> None:
    """Raise ModuleNotFoundError, with the pip line, if the `onnx` extra is not installed."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{name} is needed to write and run ONNX files: {INSTALL}") from error


def open_session(content: bytes, *, threads: int = 0, optimized: Path | None = None) -> Any:
    """An inference session on the CPU; `threads` 0 lets the runtime choose; `optimized`: where to write its graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads that spin after a run would take the cores from the session that is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def network(content: bytes) -> Callable[[torch.Tensor], torch.Tensor]:
    """The file as a function of tensors."""
    session = open_session(content)
    return lambda inputs: torch.from_numpy(session.run(None, {"input": inputs.numpy()})[0])


def kernels(content: bytes) -> dict[str, int]:
    """How often each operator occurs in the graph that the runtime executes, after its own fusions."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        open_session(content, optimized=path)
        graph = onnx.load(path).graph
    return dict(Counter(node.op_type for node in graph.node).most_common())


def latencies(
    files: Mapping[str, bytes],
    example: torch.Tensor,
    *,
    threads: Sequence[int] = (1, 2),
    batches: Sequence[int] = (1, 32),
    advance: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Median milliseconds of a run, {file: {"threads_batch": ms}}; the files take turns, so that noise hits all alike."""
    result: dict[str, dict[str, float]] = {name: {} for name in files}
    for count in threads:
        sessions = {name: open_session(content, threads=count) for name, content in files.items()}
        for batch in batches:
            inputs = {"input": example[:1].expand(batch, *example.shape[1:]).contiguous().numpy()}
            times: dict[str, list[float]] = {name: [] for name in files}
            for repeat in range(_WARM_UP + _REPEATS):
                for name, session in sessions.items():
                    started = time.perf_counter()
                    session.run(None, inputs)
                    if repeat >= _WARM_UP:
                        times[name].append(1e3 * (time.perf_counter() - started))
            for name in files:
                result[name][f"{count}_{batch}"] = statistics.median(times[name])
            advance()
    return result
