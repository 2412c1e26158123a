"""Seconds: what each layer takes in onnxruntime on this machine, measured by shape and width and kept in the user's cache."""

import hashlib
import json
import logging
import math
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm.auto import tqdm

from hawq import runtime
from hawq.affine import check_width
from hawq.cost.single_layer import LayerShape, no_layer, single_layers
from hawq.graph import EMBEDDING, Layer
from hessian.files import write_atomically
from hessian.tables import Table
from hessian.tasks.cache import cache_folder

logger = logging.getLogger(__name__)

_WIDTHS = (2, 3, 4, 5, 6, 7, 8)
_SECONDS = 0.01  # of measuring for each shape and width
_FORMAT = 1
# (seconds, standard error) by width
Timings = dict[int, tuple[float, float]]


@dataclass(frozen=True)
class Comparison:
    """Seconds of a whole network beside the sum of its layers; `stderr` is the sum's.

    `other` is what the sum leaves out: rounding the input, pooling, additions, activation functions that are no part of a
    layer's kernel, and what the runtime does between kernels. It is negative where layers take less time together than
    by themselves.
    """

    layers: float
    stderr: float
    measured: float

    @property
    def other(self) -> float:
        return self.measured - self.layers

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.layers / self.measured


class LatencyTable(Table, Mapping[str, Mapping[int, float]]):
    """Seconds of one run by layer and bits, for `batch` examples on `threads` threads; `stderr` likewise.

    cpu, runtime: the processor and the onnxruntime version that they hold for. activations: 8, or None for float.
    """

    def __init__(
        self,
        timings: Mapping[str, Mapping[int, tuple[float, float]]],
        *,
        cpu: str,
        runtime: str,
        threads: int,
        batch: int,
        activations: Literal[8] | None,
    ) -> None:
        self._seconds = {name: {bits: seconds for bits, (seconds, _) in row.items()} for name, row in timings.items()}
        self.stderr = {name: {bits: error for bits, (_, error) in row.items()} for name, row in timings.items()}
        self.cpu = cpu
        self.runtime = runtime
        self.threads = threads
        self.batch = batch
        self.activations = activations

    def __getitem__(self, layer: str) -> dict[int, float]:
        return self._seconds[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._seconds)

    def __len__(self) -> int:
        return len(self._seconds)

    def header(self) -> list[str]:
        widths = next(iter(self._seconds.values()), {})
        return [f"microseconds, {self.threads} threads, batch {self.batch}", *(f"{bits} bits" for bits in widths)]

    def cells(self) -> list[list[str]]:
        return [
            [name, *(f"{1e6 * seconds:.4g} ± {1e6 * self.stderr[name][bits]:.1g}" for bits, seconds in row.items())]
            for name, row in self.items()
        ]

    def total(self, bits: Mapping[str, int]) -> float:
        """Seconds of all layers at these widths."""
        return sum(self._seconds[name][bits[name]] for name in self)

    def compare(self, bits: Mapping[str, int], latencies: Mapping[str, float]) -> Comparison:
        """The sum of the layers at these widths beside the network's row {"threads_batch": ms} of `runtime.latencies`."""
        setting = f"{self.threads}_{self.batch}"
        if setting not in latencies:
            raise ValueError(f"the network was not measured at {setting!r} (threads_batch), only at {', '.join(latencies)}")
        # Layers of one shape share their measurement, so that errors add up rather than cancel.
        stderr = sum(self.stderr[name][bits[name]] for name in self)
        return Comparison(self.total(bits), stderr, latencies[setting] / 1e3)


def latency_table(
    layers: Mapping[str, Layer],
    bits: Sequence[int],
    *,
    activations: Literal[8] | None = 8,
    threads: int = 1,
    batch: int = 1,
    progress: bool = False,
) -> LatencyTable:
    """Seconds that onnxruntime takes for each layer of a folded graph at each width, {layer: {bits: seconds}}.

    A layer of each shape (operation, settings, weight, input, bias) is quantized at every width, exported as the network
    is, and its kernels, as the runtime fused them, are run by themselves; of each run's time that of a run without
    kernels is subtracted. Widths whose files leave the runtime with the same kernels on tensors of the same types and
    sizes share the median of all their runs, so that no allocation is chosen for noise. Results are kept in the cache of
    `hessian.tasks.cache`, by processor, onnxruntime version, threads and batch.

    Raises ValueError for a width outside 2 to 8, and for threads or a batch below 1; ModuleNotFoundError, naming the pip
    line, if the `onnx` extra is not installed.
    """
    for width in bits:
        check_width(width)
    if threads < 1 or batch < 1:
        raise ValueError(f"{threads} threads and a batch of {batch}: both must be at least 1")
    runtime.require()
    import onnxruntime

    machine = {"cpu": cpu_name(), "onnxruntime": onnxruntime.__version__, "threads": threads, "batch": batch}
    cache = _Cache(machine)
    shapes = {name: LayerShape.of(layer, batch) for name, layer in layers.items() if layer.node.target is not EMBEDDING}
    keys = {shape_name(shape, activations): shape for shape in shapes.values()}
    missing = {key: shape for key, shape in keys.items() if key not in cache.timings}
    for key, shape in tqdm(missing.items(), desc="latency of layers", unit="shape", disable=not progress):
        cache.store(key, _measure(shape, activations, threads))
    rows = {name: dict.fromkeys(_WIDTHS, (0.0, 0.0)) for name in layers}  # looking a row up takes next to nothing
    rows |= {name: cache.timings[shape_name(shape, activations)] for name, shape in shapes.items()}
    return LatencyTable(
        {name: {width: row[width] for width in bits} for name, row in rows.items()},
        cpu=machine["cpu"],
        runtime=onnxruntime.__version__,
        threads=threads,
        batch=batch,
        activations=activations,
    )


def shape_name(shape: LayerShape, activations: Literal[8] | None) -> str:
    """What a measurement is kept under."""
    return f"{shape}, {'float' if activations is None else f'{activations}-bit'} activations"


def _measure(shape: LayerShape, activations: Literal[8] | None, threads: int) -> Timings:
    """All widths in turns: medians of the turns' medians, with their standard errors."""
    files = single_layers(shape, _WIDTHS, activations)
    empty, *times = runtime.time_in_turns([file.run(threads) for file in (no_layer(), *files)], seconds=_SECONDS)
    overhead = statistics.median(empty)
    samples: dict[str, list[float]] = {}
    for file, turns in zip(files, times, strict=True):
        samples.setdefault(file.kernels, []).extend(turn - overhead for turn in turns)
    found = {kernels: _median(values) for kernels, values in samples.items()}
    return {width: found[file.kernels] for width, file in zip(_WIDTHS, files, strict=True)}


def _median(values: list[float]) -> tuple[float, float]:
    """The median, not below 0, and its standard error: 1.2533 sigma / sqrt(n), sigma from the median absolute deviation."""
    median = statistics.median(values)
    sigma = 1.4826 * statistics.median(abs(value - median) for value in values)
    return max(0.0, median), 1.2533 * sigma / math.sqrt(len(values))


class _Cache:
    """The measurements of one machine and setting, in a JSON file of the user's cache."""

    def __init__(self, machine: Mapping[str, str | int]) -> None:
        self.machine = {"format": _FORMAT, **machine}
        digest = hashlib.sha256(json.dumps(self.machine, sort_keys=True).encode()).hexdigest()[:8]
        self.path = cache_folder() / f"latency-{digest}.json"
        self.timings = self._read()

    def store(self, key: str, timings: Timings) -> None:
        """Keep a measurement, with those that others have stored meanwhile."""
        self.timings = self._read() | self.timings | {key: timings}
        content = {"machine": self.machine, "timings": self.timings}
        try:
            write_atomically(self.path, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            logger.warning("cannot keep latencies in %s (%s): next time they are measured anew", self.path.parent, error)

    def _read(self) -> dict[str, Timings]:
        """What the file holds; nothing if it is not there, not whole, or not of this machine."""
        if not self.path.is_file():
            return {}
        try:
            content = json.loads(self.path.read_text())
            if content["machine"] != self.machine:
                raise ValueError("another machine's")
            return {str(key): _parse(row) for key, row in content["timings"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.warning("%s cannot be used (%s) and is made anew", self.path, error)
            return {}


def _parse(row: Mapping[str, Sequence[float]]) -> Timings:
    timings = {int(width): (float(pair[0]), float(pair[1])) for width, pair in row.items() if len(pair) == 2}
    whole = tuple(timings) == _WIDTHS and all(0 <= number < math.inf for pair in timings.values() for number in pair)
    if not whole:
        raise ValueError("a measurement is not whole")
    return timings


def cpu_name() -> str:
    """The processor's name, with the numbers that tell its generations apart where the system gives them."""
    information = Path("/proc/cpuinfo")
    if not information.is_file():
        return platform.processor() or platform.machine()
    first = information.read_text().split("\n\n")[0]
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    numbers = [f"{name} {fields[key]}" for name, key in (("family", "cpu family"), ("model", "model")) if key in fields]
    return ", ".join([fields.get("model name") or platform.machine(), *numbers])
