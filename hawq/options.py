"""The command line of `python -m hawq.quantize`."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from hawq.rounding import ROUNDINGS
from hawq.sensitivity import METHODS

OUTPUTS = ("model.safetensors", "model.onnx", "allocation.json", "layers.json", "report.html", "report.json")


class UsageError(ValueError):
    """The command line asks for something that cannot be."""


@dataclass(frozen=True)
class Options:
    """What to quantize, how, and where to write it; see `parser` for units."""

    task: str
    out: Path
    weights: Path | None = None
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    activations: int | None = 8
    avg_bits: float | None = None
    max_size: int | None = None
    max_bops: float | None = None
    sensitivity: str = "hessian-trace"
    rounding: str = "nearest"
    bias_correction: bool = True
    ranges: str = "mse"
    calibration_size: int = 512
    batch_size: int = 128
    seed: int = 0
    drop_unreached: bool = False
    force: bool = False
    resume: bool = False
    json: bool = False
    debug: bool = False

    def check(self) -> None:
        """Raise UsageError for values that contradict each other or their range."""
        narrowest = min(self.bits)
        if self.avg_bits is not None and not math.isfinite(self.avg_bits):
            raise UsageError(f"--avg-bits {self.avg_bits}: give a number of bits a weight")
        if self.avg_bits is not None and self.avg_bits < narrowest:
            remedy = f"add {math.floor(self.avg_bits)} to --bits" if self.avg_bits >= 2 else "raise --avg-bits"
            raise UsageError(
                f"average of {self.avg_bits:g} bits asked for, but the narrowest width offered is {narrowest}: {remedy}"
            )
        if self.max_size is not None and self.max_size <= 0:
            raise UsageError(f"--max-size {self.max_size}: give a positive number of bytes")
        if self.max_bops is not None and not 0 < self.max_bops < math.inf:
            raise UsageError(f"--max-bops {self.max_bops}: give a positive fraction of the bit operations at 8 bits")
        if self.calibration_size < 1 or self.batch_size < 1:
            raise UsageError("--calibration-size and --batch-size must be positive numbers of examples")

    def check_folder(self) -> None:
        """Raise UsageError where the output folder cannot be used or would be overwritten."""
        for path in (self.out, *self.out.absolute().parents):
            if path.exists() and not path.is_dir():
                raise UsageError(f"--out {self.out}: {path} is a file, not a folder")
        if self.out.is_dir() and not self.out.stat().st_mode & 0o222:
            raise UsageError(f"--out {self.out} is read-only: name another folder or change its permissions")
        present = [name for name in OUTPUTS if (self.out / name).exists()]
        cut_short = self.resume and "report.json" not in present  # written last, by a run that finished
        if present and not self.force and not cut_short:
            raise UsageError(f"--out {self.out} already holds {', '.join(present)}: name another folder or add --force")


def parse(arguments: list[str] | None = None) -> Options:
    """The options of a command line; exits with code 2 and a message where it makes no sense."""
    values = vars(parser().parse_args(arguments))
    values["bits"] = tuple(sorted(set(values["bits"])))
    values["out"] = values["out"] or Path("out") / values["task"].replace(":", "-")
    return Options(**values)


def parser() -> argparse.ArgumentParser:
    """Every option with its unit."""
    result = argparse.ArgumentParser(
        prog="python -m hawq.quantize",
        description="Shrink a trained network: per-layer bits from its curvature, packed weights, an ONNX file that runs "
        "on integer kernels, and a report that shows why.",
        epilog="""examples:
  python -m hawq.quantize digits-resnet20 --avg-bits 4
  python -m hawq.quantize digits-mobilenet --max-size 60000 --max-bops 0.6 --out out/small
  python -m hawq.quantize my_package.tasks:cifar --weights model.safetensors --avg-bits 3 --activations none
exit codes: 0 done, 1 failed or interrupted, 2 wrong usage""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("task", metavar="TASK", help="a built-in task (digits-resnet20, digits-mobilenet) or package.module:function")
    add("--out", type=Path, metavar="DIR", help="folder for the results (default: out/TASK, a colon becoming a dash)")
    add("--weights", type=Path, metavar="FILE", help="weights for the task's model: safetensors, or a torch state dict")
    budgets = result.add_argument_group("budgets (any of them together; default: --avg-bits 4)")
    budgets.add_argument("--avg-bits", type=float, metavar="X", help="bits a weight, on average over all quantized weights")
    budgets.add_argument("--max-size", type=int, metavar="BYTES", help="size of model.safetensors in bytes")
    budgets.add_argument(
        "--max-bops",
        type=float,
        metavar="RATIO",
        help="bit operations, as a fraction of those at 8-bit weights and activations",
    )
    add(
        "--bits",
        type=_width,
        nargs="+",
        default=(2, 3, 4, 5, 6, 8),
        metavar="B",
        help="widths offered to every layer, 2 to 8 (default: 2 3 4 5 6 8)",
    )
    add(
        "--activations",
        type=_activation_width,
        default=8,
        metavar="8|none",
        help="bits of activations, or none to leave them in float (default: 8)",
    )
    add("--sensitivity", choices=METHODS, default="hessian-trace", help="what a narrow layer costs (default: %(default)s)")
    add("--rounding", choices=tuple(ROUNDINGS), default="nearest", help="how weights are rounded (default: %(default)s)")
    add(
        "--no-bias-correction",
        dest="bias_correction",
        action="store_false",
        help="do not give biases the mean error that rounding causes",
    )
    add(
        "--ranges",
        choices=("mse", "percentile", "min-max"),
        default="mse",
        help="how activation ranges are chosen (default: %(default)s)",
    )
    add(
        "--calibration-size",
        type=int,
        default=512,
        metavar="N",
        help="training examples for curvature and calibration (default: %(default)s)",
    )
    add("--batch-size", type=int, default=128, metavar="N", help="examples at a time (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="seed of all sampling (default: %(default)s)")
    add("--drop-unreached", action="store_true", help="accept that weights which the data never reach are left out")
    add("--force", action="store_true", help="overwrite results in the output folder")
    add(
        "--resume",
        action="store_true",
        help="reuse the finished stages of an earlier run whose inputs have not changed (with --force: of one that ended, too)",
    )
    add("--json", action="store_true", help="print report.json, and nothing else, on standard output")
    add("--debug", action="store_true", help="show the traceback of an error")
    return result


def _activation_width(text: str) -> int | None:
    if text not in {"8", "none"}:
        raise argparse.ArgumentTypeError(f"{text!r}: activations take 8 bits, or none of quantization")
    return None if text == "none" else 8


def _width(text: str) -> int:
    if text not in {"2", "3", "4", "5", "6", "7", "8"}:
        raise argparse.ArgumentTypeError(f"{text!r} is no width: widths are whole numbers from 2 to 8")
    return int(text)
