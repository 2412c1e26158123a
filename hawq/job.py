"""One quantization job: what it works on, and its steps, each a stage that a later run can reuse."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import fx
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hawq import onnx_export, runtime, storage
from hawq.allocate import Budget, allocate
from hawq.allocation import Allocation, BudgetUse
from hawq.budgets import budgets
from hawq.calibration_batches import Batches, calibration_batches
from hawq.evaluation import Evaluation, evaluate
from hawq.finetune import finetune, hawq_v1_order
from hawq.graph import Layer, example_inputs, find_layers, require_layers, tied_layers, unreached_weights
from hawq.model import QuantizedModel, quantize_model
from hawq.options import Options, UsageError
from hawq.preparation import prepared
from hawq.sensitivity import SensitivityTable
from hawq.sensitivity.hessian import layer_traces
from hawq.sensitivity.top_eigenvalue import top_eigenvalues
from hawq.stages import Stages, bytes_digest, digest, model_digest, tensors_digest
from hessian.objective import Objective, batches_of
from hessian.processes import Processes
from hessian.results import LayerReport
from hessian.split_data import divided
from hessian.task import Task, load_task

logger = logging.getLogger("hawq")


@dataclass(frozen=True)
class Job:
    """The task, its data in batches, its float network as it is and as a folded graph, and the layers of that.

    `key` holds digests of all that any stage depends on: the network, its weights, the data, the loss, the versions.
    """

    options: Options
    task: Task
    stages: Stages
    calibration: Batches
    evaluation: DataLoader[Any]
    example: torch.Tensor
    float_result: Evaluation
    graph: fx.GraphModule
    layers: dict[str, Layer]
    ties: list[tuple[str, ...]]
    key: dict[str, Any]

    @classmethod
    def start(cls, options: Options, processes: Processes) -> "Job":
        """Check what can be checked, load the task, evaluate the float network and fold it. Collective."""
        options.check()
        processes.first(options.check_folder)
        runtime.require()
        task = load_task(options.task, options.weights)
        task.model.eval()  # as it will be used; a network that was just built is in training mode
        processes.broadcast(task.model)
        stages = _prepare_folder(options, task.model, processes)
        evaluation = batches_of(task.evaluation, options.batch_size)
        example = example_inputs(evaluation)[:2]
        calibration = calibration_batches(options, task, stages, example)
        logger.info("evaluating the float network")
        result = evaluate(task.model, task, evaluation)
        graph = prepared(
            task.model,
            [batch[0] for batch in calibration],
            reestimate_batch_norm=options.reestimate_batch_norm,
            equalize=options.equalize,
            smooth=options.smooth,
        )
        key = {
            "network": str(graph.graph),
            "weights": model_digest(graph),
            "calibration": tensors_digest(tensor for batch in calibration for tensor in batch),
            "evaluation": tensors_digest([result.outputs, torch.tensor([result.loss, result.metric])]),
            "versions": [version("hessianware"), torch.__version__],
            "seed": options.seed,
        }
        processes.agree({name: key[name] for name in ("network", "calibration", "versions", "seed")})
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

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that reports."""
        return self.stages.processes.rank == 0

    def alone(self) -> "Job":
        """The same job for this process alone."""
        return replace(self, stages=self.stages.alone())

    def objective(self) -> Objective:
        """The task's loss over the calibration data, of which every process takes its part."""
        return divided(self.graph, self.task.loss, self.calibration, self.stages.processes.world_size)

    def budgets(self) -> list[Budget]:
        """What the options allow; UsageError, before any work, where no widths can keep it."""
        return self.stages.processes.first(lambda: budgets(self.options, self.graph, self.layers, self.ties, self.example))

    @property
    def num_params(self) -> int:
        """Quantizable weights."""
        return sum(layer.num_params for layer in self.layers.values())

    @property
    def generator(self) -> torch.Generator:
        """A new generator for one stage, so that none depends on which others have run."""
        return torch.Generator().manual_seed(self.options.seed)

    def traces(self) -> LayerReport:
        """The Hessian trace of every layer's weights."""

        def compute() -> bytes:
            traces = layer_traces(
                self.objective(),
                self.layers,
                augment=self.options.augment,
                generator=self.generator,
                progress=self.is_first,
            )
            return traces.to_json().encode()

        return LayerReport.from_json(self.stages.run("traces", self.key | {"augment": self.options.augment}, compute).decode())

    def allocate(self, table: SensitivityTable, budgets: list[Budget]) -> Allocation:
        """The best widths within the budgets."""
        return allocate(table, budgets, self.ties).with_activations(self.options.activation_bits)

    def quantize(self, allocation: Allocation) -> bytes:
        """The packed file of the network at these widths."""

        def compute() -> bytes:
            return storage.to_bytes(self.quantized(allocation, progress=True))

        return self.check_size(self.stages.run("quantization", self.inputs(allocation), compute))

    def finetune(self, packed: bytes, allocation: Allocation) -> bytes:
        """The packed file after training at its widths, on the training data or, where there are none, the distilled ones."""
        options = self.options
        settings = {"epochs": options.finetune, "order": options.finetune_order, "packed": bytes_digest(packed)}
        inputs = self.inputs(allocation) | settings | {"batch_size": options.batch_size}

        def eigenvalues() -> dict[str, float]:
            found = top_eigenvalues(self.objective(), self.layers, generator=self.generator, progress=True)
            return {name: eigenvalue.value for name, eigenvalue in found.items()}

        def compute() -> bytes:
            model, order, shuffling = storage.from_bytes(packed, self.graph), None, self.generator
            if options.finetune_order == "hawq-v1":
                order = hawq_v1_order(model, self.graph, self.stages.run_json("eigenvalues", self.key, eigenvalues))
            data = self.calibration
            if not options.data_free:
                data = DataLoader(self.task.train, options.batch_size, shuffle=True, generator=shuffling)
            trained = finetune(
                model,
                self.graph,
                data,
                self.task.loss,
                epochs=options.finetune,
                order=order,
                checkpoint=self.stages.folder / f"fine-tuning-checkpoint-{digest(inputs)[:16]}",
                generator=shuffling,
                progress=True,
            )
            return storage.to_bytes(trained)

        return self.check_size(self.stages.run("fine-tuning", inputs, compute))

    def check_size(self, packed: bytes) -> bytes:
        """The file; RuntimeError where it is larger than allowed."""
        if self.options.max_size is not None and len(packed) > self.options.max_size:
            raise RuntimeError(f"model.safetensors has {len(packed)} bytes, more than --max-size {self.options.max_size}")
        return packed

    def export(self, model: QuantizedModel, packed: bytes) -> dict[str, bytes]:
        """ONNX files of the float and of the quantized network."""

        def compute(network: fx.GraphModule) -> Callable[[], bytes]:
            return lambda: onnx_export.to_bytes(network, self.example)

        inputs = self.key | {"packed": bytes_digest(packed)}
        return {
            "float": self.stages.run("float-export", self.key, compute(self.graph)),
            "quantized": self.stages.run("export", inputs, compute(model)),
        }

    def evaluate(self, network: Callable[[torch.Tensor], torch.Tensor], where: str) -> Evaluation:
        """Metric and loss on the evaluation data."""
        return evaluate(network, self.task, self.evaluation, progress=f"evaluation in {where}")

    def latencies(self, files: dict[str, bytes], packed: bytes) -> dict[str, dict[str, float]]:
        """Milliseconds of the files in onnxruntime."""

        def compute() -> dict[str, dict[str, float]]:
            with tqdm(desc="latency", total=4, unit="setting") as bar:
                return runtime.latencies(files, self.example, advance=bar.update)

        inputs = self.key | {"packed": bytes_digest(packed)}
        result: dict[str, dict[str, float]] = self.stages.run_json("latency", inputs, compute)
        return result

    def quantized(self, allocation: Allocation, progress: bool = False) -> QuantizedModel:
        """The network at these widths."""
        settings = self.settings()
        return quantize_model(self.graph, allocation, self.calibration, generator=self.generator, progress=progress, **settings)

    def settings(self) -> dict[str, Any]:
        """How `quantize_model` is called, whatever the widths."""
        options = self.options
        return {
            "rounding": options.rounding,
            "activations": options.activation_bits,
            "bias_correction": options.bias_correction,
            "range_method": options.ranges,
            "group_size": options.group_size,
            "symmetric": options.symmetric,
            "augment": options.augment,
        }

    def inputs(self, allocation: Allocation) -> dict[str, Any]:
        """What a stage after the allocation depends on."""
        return self.key | self.settings() | {"bits": allocation.bits}


def widened(allocation: Allocation, name: str, table: SensitivityTable, budgets: list[Budget]) -> Allocation:
    """The allocation with one layer at 8 bits, or, where it has them, in float; its budgets may be exceeded."""
    bits = {row: width for row, width in allocation.bits.items() if row != name or width < 8}
    bits |= {name: 8} if name in bits else {}
    return replace(
        allocation,
        bits=bits,
        objective=float(sum(table[row].get(width, 0.0) for row, width in bits.items())),
        gap=None,
        budgets={budget.name: BudgetUse(float(budget.limit), budget.used(bits)) for budget in budgets if _knows(budget, bits)},
    )


def _knows(budget: Budget, bits: dict[str, int]) -> bool:
    """Whether the budget has a cost for each of the widths."""
    return not budget.products and all(width in budget.costs.get(row, {width: 0.0}) for row, width in bits.items())


def _prepare_folder(options: Options, model: torch.nn.Module, processes: Processes) -> Stages:
    """The stages' folder, made now so that a disk that is full or cannot be written to is noticed before the work."""
    processes.first(lambda: _make_folder(options, model))
    return Stages(options.out / ".resume", processes, resume=options.resume)


def _make_folder(options: Options, model: torch.nn.Module) -> None:
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {options.out} cannot be made: {error.strerror}") from error
    shutil.rmtree(options.out / ".partial", ignore_errors=True)
    needed = 3 * sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) + 2**21
    free = shutil.disk_usage(options.out).free
    if free < needed:
        raise OSError(f"{options.out} has {free:,} bytes free, and this job needs up to {needed:,}: free some or name another")
