"""python -m benchmarks.quantizer: what the quantizer makes of trained networks, and what other quantizers make of them.

Sections are printed, and written as Markdown to benchmarks/results/quantizer_SECTION.md. Averages are bits a weight; KL is
KL(float || quantized), nats an example of the test data. Peers are optional; those that are missing are rows that say so.
"""

import argparse
import itertools
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hawq
from benchmarks.quantizer_peers import PEERS, Network, Peer, Problem, onnxruntime_static_file
from benchmarks.resnet50 import resnet50, settle
from hawq import onnx_export, runtime, storage
from hawq.cost.size import bits_of_weights
from hawq.distilled_data import distilled_batches
from hawq.evaluation import Evaluation, evaluate
from hawq.finetune import finetune
from hawq.fold import folded
from hawq.graph import EMBEDDING, example_inputs, find_layers, tied_layers
from hessian.files import write_atomically
from hessian.objective import Data, batches_of
from hessian.task import Task, load_task
from hessian.tasks.efficientnet import IMAGE_SIZE, efficientnet_lite1
from hessian.tasks.photographs import random_crops
from hessian.tasks.resnet import ResNet20

BITS = (2, 3, 4, 5, 6, 8)
CALIBRATION_SIZE = 256
BATCH_SIZE = 64
FINETUNE_EPOCHS = 15
RESULTS = Path(__file__).parent / "results"

Lines = list[str]


class Case:
    """A task with its calibration batches, its folded network and what that answers on the test data."""

    def __init__(self, task: Task, size: int = CALIBRATION_SIZE, *, embeddings: bool = True) -> None:
        self.task = task
        task.model.eval()
        self.calibration = batches_of(task.train, BATCH_SIZE, size=size, generator=torch.Generator().manual_seed(0))
        self.test = batches_of(task.evaluation, BATCH_SIZE)
        self.example = example_inputs(self.test)[:2]
        self.graph = folded(task.model, self.example)
        layers = find_layers(self.graph).items()
        self.layers = {name: layer for name, layer in layers if embeddings or layer.node.target is not EMBEDDING}
        self.num_params = sum(layer.num_params for layer in self.layers.values())
        self.float = self.evaluated(task.model)

    def evaluated(self, network: Network) -> Evaluation:
        """On the test data."""
        return evaluate(network, self.task, self.test)

    def kl(self, result: Evaluation) -> float:
        """Mean KL divergence from the float network's classes, in nats."""
        expected, found = (outputs.double().log_softmax(1) for outputs in (self.float.outputs, result.outputs))
        return float((expected.exp() * (expected - found)).sum(1).mean())

    def sensitivity(self, data: Data | None = None, method: str = "auto") -> hawq.SensitivityTable:
        """By default by the method that is chosen where none is given."""
        data = self.calibration if data is None else data
        generator = torch.Generator().manual_seed(0)
        return hawq.sensitivity(self.graph, self.task.loss, data, bits=BITS, method=method, generator=generator)

    def allocation(self, table: hawq.SensitivityTable, average: float) -> hawq.Allocation:
        counts = {name: layer.num_params for name, layer in self.layers.items()}
        budget = hawq.Budget(
            "bits of weights",
            bits_of_weights(counts, BITS),
            average * self.num_params,
        )
        return hawq.allocate({name: table[name] for name in self.layers}, [budget], tied_layers(self.layers))

    def quantized(
        self, allocation: hawq.Allocation, activations: Any = None, data: Data | None = None, group_size: int | None = None
    ) -> hawq.QuantizedModel:
        data = self.calibration if data is None else data
        own = torch.Generator().manual_seed(0)
        return hawq.quantize_model(self.graph, allocation, data, activations=activations, group_size=group_size, generator=own)

    def scores(self, network: Network) -> Lines:
        """Accuracy and KL as table cells."""
        result = self.evaluated(network)
        return [f"{result.metric:.2%}", f"{self.kl(result):.5f}"]

    def title(self) -> Lines:
        metric = f"float: {self.float.metric:.2%}"
        return [f"{self.task.name}: {len(self.layers)} layers, {self.num_params:,} weights; {metric}.", ""]


def weight_bytes(model: hawq.QuantizedModel) -> int:
    """Bytes of all codes and scales, without biases, as the packed file has them."""
    tensors = safetensors.torch.load(storage.to_bytes(model))
    parts = [name.rpartition(":") for name in tensors]
    return sum(
        tensor.numel() * tensor.element_size()
        for (layer, _, part), tensor in zip(parts, tensors.values(), strict=True)
        if layer in model.bits and part != "bias"
    )


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Record the seconds that a stage takes."""
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def table(columns: Lines, rows: list[Lines], numbers: int) -> Lines:
    """Markdown; the last `numbers` columns are aligned to the right."""
    rule = ["---"] * (len(columns) - numbers) + ["---:"] * numbers
    return [f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)] + [""]


def described(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{stage} {took:.1f} s" for stage, took in seconds.items())


def network(size: int) -> Lines:
    """A pretrained ImageNet network: two averages, weights only and with 8-bit activations in onnxruntime; on other crops of
    the photograph that it is calibrated on, and on crops of another."""
    seconds: dict[str, float] = {}
    with timed(seconds, "loading and float"):
        case = Case(efficientnet_lite1(), size)
    own = (random_crops("flower.jpg", len(case.float.outputs), IMAGE_SIZE, seed=1) - 127) / 128
    with torch.no_grad():
        targets = torch.cat([case.task.model(batch).argmax(1) for batch in own.split(BATCH_SIZE)])
    same = Case(replace(case.task, evaluation=TensorDataset(own, targets)), size)
    with timed(seconds, "sensitivity"):
        sensitivities = case.sensitivity()
    float_bytes = 4 * case.num_params
    rows = []
    for average, activations in ((4, None), (3, None), (8, 8)):
        stages: dict[str, float] = {}
        with timed(stages, "allocation"):
            allocation = case.allocation(sensitivities, average)
        with timed(stages, "quantization"):
            model = case.quantized(allocation, activations)
        with timed(stages, "export"):
            content = onnx_export.to_bytes(model, case.example)
        with timed(stages, "evaluation"):
            session = runtime.network(content)
            cells = same.scores(session) + case.scores(session)
        size_cells = [f"{weight_bytes(model):,}", f"{weight_bytes(model) / float_bytes:.3f}", f"{len(content):,}"]
        rows.append([f"{average}", _width(activations), described(stages), *cells, *size_cells])
    columns = ["average", "activations", "seconds", "agreement, same photograph", "KL", "agreement, another", "KL"]
    columns += ["bytes of weights", "of float", "model.onnx"]
    return [*case.title(), f"{size} calibration crops; {described(seconds)}.", "", *table(columns, rows, 7)]


def digits(size: int) -> Lines:
    """Small trained networks: low averages, fine-tuning, and calibration without data."""
    lines, free = [], []
    for name, average, activations in (("digits-resnet20", 2.5, None), ("digits-mobilenet", 4, 8)):
        case = Case(load_task(name), size)
        sensitivities = case.sensitivity()
        model = case.quantized(case.allocation(sensitivities, average), activations)
        rows = [[f"average {average:g}", _width(activations), *case.scores(model)]]
        if name == "digits-resnet20":
            model = case.quantized(case.allocation(sensitivities, 2))
            rows.append(["average 2", "float", *case.scores(model)])
            for seed in range(2):
                generator = torch.Generator().manual_seed(seed)
                batches = DataLoader(case.task.train, BATCH_SIZE, shuffle=True, generator=generator)
                tuned = finetune(model, case.graph, batches, case.task.loss, epochs=FINETUNE_EPOCHS, generator=generator)
                label = f"average 2, fine-tuned for {FINETUNE_EPOCHS} epochs, seed {seed}"
                rows.append([label, "float", *case.scores(tuned)])
        lines += [*case.title(), *table(["", "activations", "accuracy", "KL"], rows, 2)]
        generator = torch.Generator().manual_seed(0)
        distilled = distilled_batches(case.task.model, case.task.loss, case.example, size=size, generator=generator)
        for label, data in (("training data", case.calibration), ("distilled data", distilled)):
            model = case.quantized(case.allocation(case.sensitivity(data), 4), data=data)
            free.append([name, label, *case.scores(model)])
    lines += [f"Average 4, weights only, widths and roundings from {size} examples:", ""]
    return lines + table(["network", "examples", "accuracy", "KL"], free, 2)


def transformers(size: int) -> Lines:
    """Q-BERT's table (Shen et al. 2020, table 1): groups of weights, and who chooses the widths, on transformers."""
    lines = []
    for name, methods in (("text-transformer", ("q-bert", "auto")), ("minilm", ("auto",))):
        case = Case(load_task(name), size)
        seconds: dict[str, float] = {}
        rows = []
        for method in methods:
            with timed(seconds, method):
                sensitivities = case.sensitivity(method=method)
            for average, group_size in itertools.product((8, 4, 3, 2), (None, 128)):
                model = case.quantized(case.allocation(sensitivities, average), group_size=group_size)
                scales = "a channel" if group_size is None else f"{group_size} weights"
                rows.append([sensitivities.method, f"{average}", scales, *case.scores(model), f"{weight_bytes(model):,}"])
        columns = ["widths by", "average", "a scale for", "metric", "KL", "bytes of weights"]
        lines += [*case.title(), f"Sensitivities: {described(seconds)}.", "", *table(columns, rows, 3)]
    return lines


def peers(name: str, size: int) -> Lines:
    """Other quantizers and this one at the same widths of weights, on the same calibration examples."""
    case = Case(load_task(name), size, embeddings=False)  # no peer quantizes them
    problem = Problem(case.task.model, onnx_export.to_bytes(case.graph, case.example), [x for x, _ in case.calibration])
    start = time.perf_counter()
    sensitivities = case.sensitivity()
    note = f"{size} calibration examples for all; hessianware's sensitivities took {time.perf_counter() - start:.1f} s once."
    rows = []
    for activations in (8, None):
        for bits in (8, 4, 3, 2):
            rows.append(_measured("hessianware", bits, activations, partial(_ours, case, sensitivities, bits, activations)))
            able = [peer for peer in PEERS if peer.activations == activations and bits in peer.bits]
            rows += [_measured(peer.name, bits, activations, partial(_theirs, case, problem, peer, bits)) for peer in able]
    columns = ["quantizer", "weights", "activations", "note", "accuracy", "KL", "bytes of weights", "seconds"]
    installs = {peer.distribution: (peer.version(), peer.install) for peer in PEERS}
    versions = [
        f"- {distribution} {found or 'is not installed'}: `pip install --no-deps {install}`"
        for distribution, (found, install) in installs.items()
    ]
    return [*case.title(), note, "", *table(columns, rows, 4), *versions, ""]


def _ours(case: Case, sensitivities: hawq.SensitivityTable, bits: int, activations: int | None) -> tuple[Lines, int, str]:
    model = case.quantized(case.allocation(sensitivities, bits), activations)
    return case.scores(model), weight_bytes(model), "average"


def _theirs(case: Case, problem: Problem, peer: Peer, bits: int) -> tuple[Lines, int, str]:
    if peer.version() is None:
        raise ModuleNotFoundError(f"pip install --no-deps {peer.install}")
    made = peer.run(problem, bits)
    return case.scores(made.network), made.weight_bytes, made.note


def _measured(name: str, bits: int, activations: int | None, run: Callable[[], tuple[Lines, int, str]]) -> Lines:
    start = time.perf_counter()
    cells = [name, str(bits), _width(activations)]
    try:
        scores, size, note = run()
        cells += [note, *scores, f"{size:,}", f"{time.perf_counter() - start:.1f}"]
    except Exception as error:  # whatever a peer raises becomes its row
        reason = " ".join(str(error).split()).replace("|", "/")[:120]
        cells += [f"fails: {type(error).__name__}: {reason}", "", "", "", f"{time.perf_counter() - start:.1f}"]
    print(" | ".join(cells), flush=True)
    return cells


def latency(size: int) -> Lines:
    """Milliseconds in onnxruntime of files of this quantizer and of onnxruntime's own, taking turns."""
    rows = []
    for name, task in (
        ("digits-resnet20", load_task("digits-resnet20")),
        ("ResNet-20 at 32x32, random weights", _random_resnet20()),
    ):
        case = Case(task, size)
        model = case.quantized(case.allocation(case.sensitivity(), 3), 8)
        content = onnx_export.to_bytes(case.graph, case.example)
        files = {
            "float": content,
            "hessianware": onnx_export.to_bytes(model, case.example),
            "onnxruntime": onnxruntime_static_file(content, [x for x, _ in case.calibration]),
        }
        for setting, times in _by_setting(runtime.latencies(files, case.example)).items():
            threads, batch = setting.split("_")
            ratio = times["hessianware"] / times["onnxruntime"]
            size_ratio = len(files["hessianware"]) / len(files["onnxruntime"])
            milliseconds = [f"{times[file]:.3f}" for file in files]
            rows.append([name, threads, batch, *milliseconds, f"{ratio:.2f}", f"{size_ratio:.2f}"])
    columns = [
        "network",
        "threads",
        "batch",
        "float ms",
        "average 3, A8 ms",
        "onnxruntime W8A8 ms",
        "ratio",
        "ratio of file bytes",
    ]
    return table(columns, rows, 7)


def _by_setting(times: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    settings = next(iter(times.values()))
    return {setting: {name: row[setting] for name, row in times.items()} for setting in settings}


def _random_resnet20() -> Task:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ResNet20(3, 10)
    return _random_task(model, "resnet20-32x32", torch.randn(CALIBRATION_SIZE, 3, 32, 32, generator=generator))


def _random_task(model: nn.Module, name: str, images: torch.Tensor) -> Task:
    """Images of noise with the classes that the network sees in them."""
    settle(model, images[:64])
    with torch.no_grad():
        data = TensorDataset(images, torch.cat([model(batch).argmax(1) for batch in images.split(BATCH_SIZE)]))
    return Task(
        model, data, data, nn.CrossEntropyLoss(), lambda outputs, targets: (outputs.argmax(1) == targets).float().mean(), name
    )


def large(size: int, width: int = 64) -> Lines:
    """ResNet-50 with random weights at 224x224: seconds and peak memory of each stage."""
    seconds: dict[str, float] = {}
    peaks: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        with timed(seconds, name):
            yield
        peaks[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB to GiB

    with stage("building and float"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = resnet50(width)
        images = torch.randn(size, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        case = Case(_random_task(model, f"resnet50 of width {width}", images), size)
    with stage("sensitivity"):
        sensitivities = case.sensitivity()
    with stage("allocation"):
        allocation = case.allocation(sensitivities, 4)
    with stage("quantization"):
        quantized = case.quantized(allocation, 8)
    with stage("export"):
        content = onnx_export.to_bytes(quantized, case.example)
    rows = [[name, f"{took:.1f}", f"{peaks[name]:.2f}"] for name, took in seconds.items()]
    sizes = f"{weight_bytes(quantized):,} bytes of weights, {len(content):,} of model.onnx"
    lines = [f"{size} images, average 4 with 8-bit activations: gap {allocation.gap:.1e}, {sizes}.", ""]
    return [*case.title(), *lines, *table(["stage", "seconds", "peak memory so far, GiB"], rows, 2)]


def _width(activations: int | None) -> str:
    return "float" if activations is None else str(activations)


SECTIONS: dict[str, tuple[str, int, Callable[[int], Lines]]] = {
    "network": ("EfficientNet-Lite1", 256, network),
    "digits": ("Networks trained on digits", CALIBRATION_SIZE, digits),
    "peers": ("Peers on digits-mobilenet", CALIBRATION_SIZE, partial(peers, "digits-mobilenet")),
    "peers-minilm": ("Peers on minilm", 64, partial(peers, "minilm")),
    "transformers": ("Transformers, as in Q-BERT's table", 64, transformers),
    "latency": ("Latency in onnxruntime", CALIBRATION_SIZE, latency),
    "large": ("A network of 25 million parameters", 32, large),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all")
    parser.add_argument("--examples", type=int, help="calibration examples; nothing is written then")
    options = parser.parse_args()
    for name in options.only:
        title, size, run = SECTIONS[name]
        lines = run(options.examples or size)
        versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "onnxruntime"))
        machine = f"Python {platform.python_version()}, {versions}, {platform.machine()}, {os.cpu_count()} cores, "
        threads = f"{torch.get_num_threads()} threads"
        text = "\n".join([f"## {title}", "", *lines, f"`python -m benchmarks.quantizer --only {name}`, {machine}{threads}", ""])
        print(text, flush=True)
        if options.examples is None:
            write_atomically(RESULTS / f"quantizer_{name}.md", text)


if __name__ == "__main__":
    main()
