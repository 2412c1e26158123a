"""One quantization job: what it works on, and its steps, each a stage that a later run can reuse."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import fx
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hawq import onnx_export, runtime, storage
from hawq.allocate import Budget, allocate
from hawq.allocation import Allocation
from hawq.cost.bops import bit_operations
from hawq.cost.size import file_overhead, packed_bytes, weight_bits
from hawq.evaluation import Evaluation, evaluate
from hawq.fold import folded
from hawq.graph import Layer, example_inputs, find_layers, require_layers, tied_layers, unreached_weights
from hawq.model import QuantizedModel, quantize_model
from hawq.options import Options, UsageError
from hawq.pareto import Point, frontier
from hawq.sensitivity import SensitivityTable, rounding_errors
from hawq.sensitivity.hessian import hessian_trace
from hawq.sensitivity.weight_error import weight_error
from hawq.stages import Stages, model_digest, tensors_digest
from hessian.estimators.layers import layer_report
from hessian.objective import batches_of
from hessian.results import LayerReport
from hessian.task import Task, load_task

logger = logging.getLogger("hawq")

DEFAULT_AVERAGE_BITS = 4.0  # where no budget is given


@dataclass(frozen=True)
class Job:
    """The task, its data in batches, its float network as it is and as a folded graph, and the layers of that.

    `key` holds digests of all that any stage depends on: the network, its weights, the data, the loss, the versions.
    """

    options: Options
    task: Task
    stages: Stages
    calibration: DataLoader[Any]
    evaluation: DataLoader[Any]
    example: torch.Tensor
    float_result: Evaluation
    graph: fx.GraphModule
    layers: dict[str, Layer]
    ties: list[tuple[str, ...]]
    key: dict[str, Any]

    @classmethod
    def start(cls, options: Options) -> "Job":
        """Check what can be checked, load the task, evaluate the float network and fold it."""
        options.check()
        options.check_folder()
        runtime.require()
        task = load_task(options.task, options.weights)
        task.model.eval()  # as it will be used; a network that was just built is in training mode
        stages = _prepare_folder(options, task.model)
        generator = torch.Generator().manual_seed(options.seed)
        calibration = batches_of(task.train, options.batch_size, size=options.calibration_size, generator=generator)
        evaluation = batches_of(task.evaluation, options.batch_size)
        example = example_inputs(evaluation)[:2]
        logger.info("evaluating the float network")
        result = evaluate(task.model, task, evaluation)
        graph = folded(task.model, example)
        key = {
            "network": str(graph.graph),
            "weights": model_digest(graph),
            "calibration": tensors_digest(tensor for batch in calibration for tensor in batch),
            "evaluation": tensors_digest([result.outputs, torch.tensor([result.loss, result.metric])]),
            "versions": [version("hessianware"), torch.__version__],
            "seed": options.seed,
        }
        layers = find_layers(graph)
        require_layers(layers)
        unreached = unreached_weights(task.model, graph)
        if unreached and not options.drop_unreached:
            raise ValueError(
                f"weight {unreached[0]!r} is never reached by the data and would be lost: remove the layer from the "
                "model, or pass --drop-unreached"
            )
        ties = tied_layers(layers)
        return cls(options, task, stages, calibration, evaluation, example, result, graph, layers, ties, key)

    def budgets(self) -> list[Budget]:
        """What the options allow; UsageError, before any work, where no widths can keep it."""
        options, bits = self.options, self.options.bits
        budgets = []
        average = options.avg_bits
        if average is None and options.max_size is None and options.max_bops is None:
            average = DEFAULT_AVERAGE_BITS
        if average is not None:
            budgets.append(Budget("bits of weights", weight_bits(self.layers, bits), average * self.num_params))
        if options.max_size is not None:
            costs = packed_bytes(self.layers, bits)
            overhead = file_overhead(self.graph, self.layers, options.activations)
            smallest = overhead + int(sum(min(row.values()) for row in costs.values()))
            if options.max_size < smallest:
                raise UsageError(
                    f"--max-size {options.max_size:,}: the smallest file has up to {smallest:,} bytes ({overhead:,} of "
                    f"them beside the weights' codes), {smallest - options.max_size:,} more: raise it or add narrower --bits"
                )
            budgets.append(Budget("bytes of weights", costs, options.max_size - overhead))
        if options.max_bops is not None:
            at_8_bits = sum(cost[8] for cost in bit_operations(self.layers, (8,), 8).values())
            costs = bit_operations(self.layers, bits, options.activations)
            least = sum(min(row.values()) for row in costs.values()) / at_8_bits
            if options.max_bops < least:
                note = "; float activations count as 32 bits" if options.activations is None else ""
                raise UsageError(f"--max-bops {options.max_bops:g}: the widths offered need at least {least:.4g}{note}")
            budgets.append(Budget("bit operations", costs, options.max_bops * at_8_bits))
        try:
            allocate({name: dict.fromkeys(bits, 0.0) for name in self.layers}, budgets, self.ties)
        except ValueError as error:
            raise UsageError(str(error)) from error
        return budgets

    @property
    def num_params(self) -> int:
        """Quantizable weights."""
        return sum(layer.num_params for layer in self.layers.values())

    def traces(self) -> LayerReport:
        """The Hessian trace of every layer's weights."""
        weights = [layer.weight for layer in self.layers.values()]
        generator = torch.Generator().manual_seed(self.options.seed)

        def compute() -> bytes:
            report = layer_report(self.graph, self.task.loss, self.calibration, weights, generator=generator, progress=True)
            return report.to_json().encode()

        return LayerReport.from_json(self.stages.run("traces", self.key, compute).decode())

    def sensitivities(self, traces: LayerReport) -> SensitivityTable:
        """What each width of each layer costs."""
        bits = self.options.bits

        def compute() -> Any:
            return rounding_errors(self.graph, self.layers, bits, progress=True)

        stored = self.stages.run_json("rounding-errors", self.key | {"bits": bits}, compute)
        errors = {name: {int(width): error for width, error in row.items()} for name, row in stored.items()}
        if self.options.sensitivity == "weight-error":
            return weight_error(errors)
        return hessian_trace(self.layers, errors, traces)

    def allocate(self, table: SensitivityTable, budgets: list[Budget]) -> Allocation:
        """The best widths within the budgets."""
        return allocate(table, budgets, self.ties).with_activations(self.options.activations)

    def quantize(self, allocation: Allocation) -> bytes:
        """The packed file of the network at these widths."""

        def compute() -> bytes:
            return storage.to_bytes(self._quantized(allocation, progress=True))

        packed = self.stages.run("quantization", self._inputs(allocation), compute)
        if self.options.max_size is not None and len(packed) > self.options.max_size:
            raise RuntimeError(f"model.safetensors has {len(packed)} bytes, more than --max-size {self.options.max_size}")
        return packed

    def export(self, model: QuantizedModel, allocation: Allocation) -> dict[str, bytes]:
        """ONNX files of the float and of the quantized network."""

        def compute(network: fx.GraphModule) -> Callable[[], bytes]:
            return lambda: onnx_export.to_bytes(network, self.example)

        return {
            "float": self.stages.run("float-export", self.key, compute(self.graph)),
            "quantized": self.stages.run("export", self._inputs(allocation), compute(model)),
        }

    def evaluate(self, network: Callable[[torch.Tensor], torch.Tensor], where: str) -> Evaluation:
        """Metric and loss on the evaluation data."""
        return evaluate(network, self.task, self.evaluation, progress=f"evaluation in {where}")

    def frontier(self, table: SensitivityTable) -> list[Point]:
        """The best allocation at each average width, quantized and measured."""

        def measure(allocation: Allocation) -> tuple[int, float, float]:
            model = self._quantized(allocation)
            result = evaluate(model, self.task, self.evaluation)
            return len(storage.to_bytes(model)), result.loss - self.float_result.loss, result.metric

        def compute() -> list[dict[str, Any]]:
            costs = weight_bits(self.layers, self.options.bits)
            predicts = table.method == "hessian-trace"
            points = frontier(table, costs, self.num_params, self.ties, measure, predicts_loss=predicts, progress=True)
            return [asdict(point) for point in points]

        inputs = self.key | self._settings() | {"table": dict(table)}
        return [Point(**point) for point in self.stages.run_json("frontier", inputs, compute)]

    def latencies(self, files: dict[str, bytes], allocation: Allocation) -> dict[str, dict[str, float]]:
        """Milliseconds of the files in onnxruntime."""

        def compute() -> dict[str, dict[str, float]]:
            with tqdm(desc="latency", total=4, unit="setting") as bar:
                return runtime.latencies(files, self.example, advance=bar.update)

        result: dict[str, dict[str, float]] = self.stages.run_json("latency", self._inputs(allocation), compute)
        return result

    def _quantized(self, allocation: Allocation, progress: bool = False) -> QuantizedModel:
        return quantize_model(self.graph, allocation, self.calibration, progress=progress, **self._settings())

    def _settings(self) -> dict[str, Any]:
        """How `quantize_model` is called, whatever the widths."""
        return {
            "rounding": self.options.rounding,
            "activations": self.options.activations,
            "bias_correction": self.options.bias_correction,
            "range_method": self.options.ranges,
        }

    def _inputs(self, allocation: Allocation) -> dict[str, Any]:
        """What a stage after the allocation depends on."""
        return self.key | self._settings() | {"bits": allocation.bits}


def _prepare_folder(options: Options, model: torch.nn.Module) -> Stages:
    """The stages' folder, made now so that a disk that is full or cannot be written to is noticed before the work."""
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {options.out} cannot be made: {error.strerror}") from error
    shutil.rmtree(options.out / ".partial", ignore_errors=True)
    stages = Stages(options.out / ".resume", resume=options.resume)
    needed = 3 * sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) + 2**21
    free = shutil.disk_usage(options.out).free
    if free < needed:
        raise OSError(f"{options.out} has {free:,} bytes free, and this job needs up to {needed:,}: free some or name another")
    return stages
