"""python -m hawq.quantize TASK: from a trained network to a small file that runs on integers, and a report that shows why.

The pipeline, each step a stage that --resume can reuse: the float network is evaluated; batch norm is folded; per-layer
Hessian traces are computed; sensitivities, and from them the widths; the network is quantized and calibrated, exported,
evaluated in torch and in onnxruntime, and timed; the frontier is drawn.
"""

import json
import logging
import os
import shutil
import signal
import sys
import traceback
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import safetensors.torch
import torch
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
from hawq.options import OUTPUTS, Options, UsageError, parse
from hawq.pareto import Point, frontier
from hawq.report import build_report, render_html, summary
from hawq.sensitivity import SensitivityTable, rounding_errors
from hawq.sensitivity.hessian import hessian_trace
from hawq.sensitivity.weight_error import weight_error
from hawq.stages import Stages, model_digest, tensors_digest
from hessian.estimators.layers import layer_report
from hessian.files import write_atomically
from hessian.objective import batches_of
from hessian.results import LayerReport
from hessian.task import UnknownTaskError, load_task

logger = logging.getLogger("hawq")

DEFAULT_AVERAGE_BITS = 4.0
"""The budget where none is given."""


def quantize(options: Options) -> dict[str, Any]:
    """Run the whole job and write its results; the contents of report.json."""
    options.check()
    options.check_folder()
    runtime.require()
    task = load_task(options.task, options.weights)
    task.model.eval()  # as it will be used; a network that was just built is in training mode
    stages = _prepare_folder(options, task.model)

    calibration = batches_of(task.train, options.batch_size, size=options.calibration_size, generator=_generator(options.seed))
    evaluation = batches_of(task.evaluation, options.batch_size)
    example = example_inputs(evaluation)[:2]

    logger.info("evaluating the float network")
    float_result = evaluate(task.model, task, evaluation)
    graph = folded(task.model, example)
    key = {
        "network": str(graph.graph),
        "weights": model_digest(graph),
        "calibration": tensors_digest(tensor for batch in calibration for tensor in batch),
        "evaluation": tensors_digest([float_result.outputs, torch.tensor([float_result.loss, float_result.metric])]),
        "versions": [version("hessianware"), torch.__version__],
    }
    layers = find_layers(graph)
    _check_layers(layers, unreached_weights(task.model, graph), options)
    ties = tied_layers(layers)
    budgets = _budgets(options, graph, layers)
    _check_feasible(budgets, layers, ties, options.bits)

    traces = _traces(stages, key | {"seed": options.seed}, graph, task.loss, calibration, layers, options)
    table = _sensitivities(stages, key | {"bits": options.bits}, graph, layers, traces, options)
    allocation = allocate(table, budgets, ties).with_activations(options.activations)

    settings: dict[str, Any] = {
        "rounding": options.rounding,
        "activations": options.activations,
        "bias_correction": options.bias_correction,
        "range_method": options.ranges,
    }

    def quantized_at(widths: Allocation, progress: bool = False) -> QuantizedModel:
        return quantize_model(graph, widths, calibration, progress=progress, **settings)

    inputs = key | settings | {"bits": allocation.bits, "seed": options.seed}
    packed = stages.run("quantization", inputs, lambda: storage.to_bytes(quantized_at(allocation, progress=True)))
    model = storage.from_bytes(packed, graph)
    float_onnx = stages.run("float-export", key, lambda: onnx_export.to_bytes(graph, example))
    onnx_file = stages.run("export", inputs, lambda: onnx_export.to_bytes(model, example))
    if options.max_size is not None and len(packed) > options.max_size:
        raise RuntimeError(f"model.safetensors has {len(packed)} bytes, more than --max-size {options.max_size}")

    quantized_result = evaluate(model, task, evaluation, progress="evaluation in torch")
    onnx_result = evaluate(runtime.network(onnx_file), task, evaluation, progress="evaluation in onnxruntime")
    points = _frontier(
        stages,
        key | settings | {"bits": options.bits},
        table,
        layers,
        ties,
        options,
        quantized_at,
        lambda widths: evaluate(widths, task, evaluation),
        float_result,
    )
    latency = _latency(stages, inputs, {"float": float_onnx, "quantized": onnx_file}, example)

    report = build_report(
        task_name=task.name,
        options=options,
        graph=graph,
        layers=layers,
        ties=ties,
        traces=traces,
        table=table,
        allocation=allocation,
        results={"float": float_result, "quantized": quantized_result, "onnx": onnx_result},
        files={
            "float.safetensors": len(_state_file(task.model)),
            "float.onnx": len(float_onnx),
            "model.safetensors": len(packed),
            "model.onnx": len(onnx_file),
        },
        kernels=runtime.kernels(onnx_file),
        latency=latency,
        points=points,
        seconds=stages.seconds,
        reused=stages.reused,
    )
    _write_outputs(
        options.out,
        {
            "model.safetensors": packed,
            "model.onnx": onnx_file,
            "allocation.json": allocation.to_json().encode(),
            "layers.json": traces.to_json().encode(),
            "report.html": render_html(report, graph, model).encode(),
            "report.json": (json.dumps(report, indent=1) + "\n").encode(),
        },
    )
    return report


def _prepare_folder(options: Options, model: torch.nn.Module) -> Stages:
    """The stages' folder, made now so that a disk that is full or cannot be written to is noticed before the work."""
    options.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(options.out / ".partial", ignore_errors=True)
    stages = Stages(options.out / ".resume", resume=options.resume)
    needed = 3 * sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) + 2**21
    free = shutil.disk_usage(options.out).free
    if free < needed:
        raise OSError(f"{options.out} has {free:,} bytes free, and this job needs up to {needed:,}: free some or name another")
    return stages


def _check_layers(layers: dict[str, Layer], unreached: list[str], options: Options) -> None:
    require_layers(layers)
    if unreached and not options.drop_unreached:
        raise ValueError(
            f"weight {unreached[0]!r} is never reached by the data and would be lost: remove the layer from the model, "
            "or pass --drop-unreached"
        )


def _budgets(options: Options, graph: torch.fx.GraphModule, layers: dict[str, Layer]) -> list[Budget]:
    budgets = []
    average = options.avg_bits
    if average is None and options.max_size is None and options.max_bops is None:
        average = DEFAULT_AVERAGE_BITS
    if average is not None:
        limit = average * sum(layer.num_params for layer in layers.values())
        budgets.append(Budget("bits of weights", weight_bits(layers, options.bits), limit))
    if options.max_size is not None:
        costs = packed_bytes(layers, options.bits)
        overhead = file_overhead(graph, layers, options.activations)
        smallest = overhead + int(sum(min(row.values()) for row in costs.values()))
        if options.max_size < smallest:
            raise UsageError(
                f"--max-size {options.max_size:,}: the smallest file has up to {smallest:,} bytes ({overhead:,} of them "
                f"beside the weights' codes), {smallest - options.max_size:,} more: raise it or add narrower --bits"
            )
        limit = options.max_size - overhead
        budgets.append(Budget("bytes of weights", costs, limit))
    if options.max_bops is not None:
        at_8_bits = sum(cost[8] for cost in bit_operations(layers, (8,), 8).values())
        costs = bit_operations(layers, options.bits, options.activations)
        budgets.append(Budget("bit operations", costs, options.max_bops * at_8_bits))
    return budgets


def _check_feasible(
    budgets: list[Budget], layers: dict[str, Layer], ties: list[tuple[str, ...]], bits: tuple[int, ...]
) -> None:
    """Find budgets that no widths can keep before the work starts."""
    try:
        allocate({name: dict.fromkeys(bits, 0.0) for name in layers}, budgets, ties)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _traces(
    stages: Stages,
    key: dict[str, Any],
    graph: torch.fx.GraphModule,
    loss: Any,
    data: Any,
    layers: dict[str, Layer],
    options: Options,
) -> LayerReport:
    weights = [layer.weight for layer in layers.values()]

    def compute() -> bytes:
        report = layer_report(graph, loss, data, weights, generator=_generator(options.seed), progress=True)
        return report.to_json().encode()

    return LayerReport.from_json(stages.run("traces", key, compute).decode())


def _sensitivities(
    stages: Stages,
    key: dict[str, Any],
    graph: torch.fx.GraphModule,
    layers: dict[str, Layer],
    traces: LayerReport,
    options: Options,
) -> SensitivityTable:
    stored = stages.run_json("rounding-errors", key, lambda: rounding_errors(graph, layers, options.bits, progress=True))
    errors = {name: {int(bits): error for bits, error in row.items()} for name, row in stored.items()}
    return weight_error(errors) if options.sensitivity == "weight-error" else hessian_trace(layers, errors, traces)


def _frontier(
    stages: Stages,
    key: dict[str, Any],
    table: SensitivityTable,
    layers: dict[str, Layer],
    ties: list[tuple[str, ...]],
    options: Options,
    quantized_at: Any,
    evaluate_model: Any,
    float_result: Evaluation,
) -> list[Point]:
    def measure(allocation: Allocation) -> tuple[int, float, float]:
        model = quantized_at(allocation)
        result = evaluate_model(model)
        return len(storage.to_bytes(model)), result.loss - float_result.loss, result.metric

    def compute() -> list[dict[str, Any]]:
        total = sum(layer.num_params for layer in layers.values())
        costs = weight_bits(layers, options.bits)
        predicts = table.method == "hessian-trace"
        points = frontier(table, costs, total, ties, measure, predicts_loss=predicts, progress=True)
        return [asdict(point) for point in points]

    inputs = key | {"table": {name: table[name] for name in table}}
    return [Point(**point) for point in stages.run_json("frontier", inputs, compute)]


def _latency(stages: Stages, key: dict[str, Any], files: dict[str, bytes], example: torch.Tensor) -> Any:
    def compute() -> Any:
        with tqdm(desc="latency", total=4, unit="setting") as bar:
            return runtime.latencies(files, example, advance=bar.update)

    return stages.run_json("latency", key, compute)


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


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _interrupt(signum: int, frame: object) -> None:
    del signum, frame
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, report on standard output; the exit code."""
    return run(parse(arguments), sys.stdout)


def run(options: Options, stdout: TextIO) -> int:
    """Do what `options` say and print the result to `stdout`; the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
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
    if options.json:
        json.dump(report, stdout, indent=1)
        stdout.write("\n")
    else:
        stdout.write(summary(report, options.out) + "\n")
    stdout.flush()
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


def _reserve_stdout() -> TextIO:
    """Standard output for results alone; whatever else prints, native libraries too, is sent to standard error."""
    sys.stdout.flush()
    reserved = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return reserved


if __name__ == "__main__":
    parsed = parse()
    sys.exit(run(parsed, _reserve_stdout()))
