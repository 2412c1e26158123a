"""onnxruntime: outputs, the graph that it executes, and how long it takes."""

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

INSTALL = "pip install 'hessianware[onnx]'"
# Without it, sums of two products of bytes saturate at 16 bits on x64 processors that have no VNNI instructions, where a
# weight's code is beyond -64 to 63. Elsewhere it changes nothing.
EXACT_PRODUCTS = ("session.x64quantprecision", "1")
_SECONDS = 0.3  # for each file at each setting
_TURNS = 10
_FEWEST_TURNS = 5

Optimization = Literal["none", "extended", "all"]
_LEVELS = {"none": "ORT_DISABLE_ALL", "extended": "ORT_ENABLE_EXTENDED", "all": "ORT_ENABLE_ALL"}


def require() -> None:
    """Raise ModuleNotFoundError, with the pip line, if the `onnx` extra is not installed."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{name} is needed to write and run ONNX files: {INSTALL}") from error


def open_session(content: bytes, *, threads: int = 0, level: Optimization = "all", optimized: Path | None = None) -> Any:
    """An inference session on the CPU.

    threads: 0 lets the runtime choose. level: which of its own rewrites the runtime applies; `all` adds changes of memory
    layout to the fusions of `extended`. optimized: where to write the graph that these leave.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, _LEVELS[level])
    # Threads that spin after a run would take the cores from the session that is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry(*EXACT_PRODUCTS)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def network(content: bytes) -> Callable[[torch.Tensor], torch.Tensor]:
    """The file as a function of tensors."""
    session = open_session(content)
    return lambda inputs: torch.from_numpy(session.run(None, {"input": inputs.numpy()})[0])


def optimized(content: bytes, level: Optimization = "extended") -> Any:
    """The onnx.ModelProto that the runtime executes, after its own rewrites."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        open_session(content, level=level, optimized=path)
        return onnx.load(path)


def kernels(content: bytes) -> dict[str, int]:
    """How often each operator occurs in the graph that the runtime executes, after its own fusions."""
    return dict(Counter(node.op_type for node in optimized(content).graph.node).most_common())


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
        sessions = [open_session(content, threads=count) for content in files.values()]
        for batch in batches:
            inputs = {"input": example[:1].expand(batch, *example.shape[1:]).contiguous().numpy()}
            times = time_in_turns([partial(session.run, None, inputs) for session in sessions], seconds=_SECONDS)
            for name, turns in zip(files, times, strict=True):
                result[name][f"{count}_{batch}"] = 1e3 * statistics.median(turns)
            advance()
    return result


def time_in_turns(runs: Sequence[Callable[[], object]], *, seconds: float) -> list[list[float]]:
    """Seconds that each of `runs` takes, (runs, turns): in each turn the median of its repetitions.

    Turns alternate between the runs, so that a change of the machine's load hits all alike; each begins with one
    repetition that is not counted and fetches into the caches what the others have displaced. About `seconds` for each run.
    """
    for run in runs:
        run()
    estimates = [_timed(run) for run in runs]
    turns = max(_FEWEST_TURNS, min(_TURNS, int(seconds / (2 * max(estimates)))))
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(turns):
        for run, estimate, medians in zip(runs, estimates, times, strict=True):
            run()
            repeats = max(1, round(seconds / (turns * estimate)) - 1)
            medians.append(statistics.median(_timed(run) for _ in range(repeats)))
    return times


def _timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
