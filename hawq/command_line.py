"""The command line of `python -m hawq.quantize`."""

import argparse
from pathlib import Path

from hawq.options import Options
from hawq.rounding import ROUNDINGS
from hawq.sensitivity import METHODS
from hawq.widths import parse_widths
from hessian.command_line import LARGEST_SEED, Parser, add_completion, whole_number

_WIDTHS = ("2", "3", "4", "5", "6", "7", "8")
_EXAMPLES = 256  # for curvature and calibration
_DISTILLED = 128  # where each costs a hundred gradients


def parse(arguments: list[str] | None = None) -> Options:
    """The options of a command line; exits with code 2 and a message where it makes no sense."""
    line = parser()
    values = vars(line.parse_args(arguments))
    values["bits"] = tuple(sorted(set(values["bits"])))
    values["out"] = values["out"] or Path("out") / values["task"].replace(":", "-")
    if values["calibration_size"] is None:
        values["calibration_size"] = _DISTILLED if values["data_free"] else _EXAMPLES
    widths = set(values["activations"])
    if None in widths and len(widths) > 1:
        line.error("--activations: none leaves all activations in float: give it alone")
    values["activations"] = tuple(sorted(widths - {None}))
    try:
        values["layer_bits"] = parse_widths(values["layer_bits"]) or None
    except ValueError as error:
        line.error(f"--layer-bits: {error}")
    for glob, listed in (values["layer_bits"] or {}).items():
        if not {*map(str, listed)} <= {*_WIDTHS}:
            line.error(f"--layer-bits: {glob}={','.join(map(str, listed))}: widths are whole numbers from 2 to 8")
    return Options(**values)


def parser() -> argparse.ArgumentParser:
    """Every option with its unit."""
    result = Parser(
        prog="python -m hawq.quantize",
        description="Shrink a trained network: per-layer bits from its curvature, packed weights, an ONNX file that runs "
        "on integer kernels, and a report that shows why.",
        epilog="""examples:
  python -m hawq.quantize digits-resnet20 --avg-bits 4
  python -m hawq.quantize digits-mobilenet --max-size 60000 --max-bops 0.6 --out out/small
  python -m hawq.quantize digits-mobilenet --max-drop 0.01 --layer-bits 'features.0.*=8' --pareto
  python -m hawq.quantize my_package.tasks:cifar --weights model.safetensors --avg-bits 3 --activations none
  torchrun --nproc-per-node 4 -m hawq.quantize digits-mobilenet --sensitivity q-bert
torchrun divides the calibration data of traces and sensitivities among its processes, with the results of one process to
rounding; the first then rounds, fine-tunes, exports and measures alone.
exit codes: 0 done, 1 failed or interrupted, 2 wrong usage""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("task", metavar="TASK", help="a built-in task (digits-resnet20, digits-mobilenet) or package.module:function")
    add("--out", type=Path, metavar="DIR", help="folder for the results (default: out/TASK, a colon becoming a dash)")
    add("--weights", type=Path, metavar="FILE", help="weights for the task's model: safetensors, or a torch state dict")
    _add_budgets(result)
    _add_widths(result)
    _add_rounding(result)
    _add_data(result)
    add("--pareto", action="store_true", help="measure the whole frontier, and all the predictions, however long it takes")
    add(
        "--seed", type=whole_number(0, LARGEST_SEED), default=0, metavar="S", help="seed of all sampling (default: %(default)s)"
    )
    add("--drop-unreached", action="store_true", help="accept that weights which the data never reach are left out")
    add(
        "--extra-formats",
        action="store_true",
        help="write torchao.json (torchao's FqnToConfig) and fake_quantized.safetensors (rounded weights as floats), too",
    )
    add("--force", action="store_true", help="overwrite results in the output folder")
    add(
        "--resume",
        action="store_true",
        help="reuse the finished stages of an earlier run whose inputs have not changed (with --force: of one that ended, too)",
    )
    add("--json", action="store_true", help="print report.json, and nothing else, on standard output")
    add("--debug", action="store_true", help="show the traceback of an error")
    add_completion(result, "hawq-quantize")
    return result


def _add_budgets(result: argparse.ArgumentParser) -> None:
    add = result.add_argument_group("budgets (any of them together; default: --avg-bits 4)").add_argument
    add("--avg-bits", type=float, metavar="X", help="bits a weight, on average over all quantized weights")
    add("--max-size", type=whole_number(1), metavar="BYTES", help="size of model.safetensors in bytes")
    add(
        "--max-bops",
        type=float,
        metavar="RATIO",
        help="bit operations, as a fraction of those at 8-bit weights and activations",
    )
    add(
        "--max-latency",
        type=float,
        metavar="RATIO",
        help="seconds of the layers in onnxruntime on this machine (one thread, one example), as a fraction of those at "
        "8-bit weights and activations",
    )
    add(
        "--max-drop",
        type=float,
        metavar="D",
        help="the smallest file whose measured metric falls by at most D (0.01: a point of accuracy)",
    )


def _add_widths(result: argparse.ArgumentParser) -> None:
    add = result.add_argument_group("widths").add_argument
    add(
        "--bits",
        type=_width,
        nargs="+",
        default=(2, 3, 4, 5, 6, 8),
        metavar="B",
        help="widths offered to every layer, 2 to 8 (default: 2 3 4 5 6 8)",
    )
    add(
        "--layer-bits",
        nargs="+",
        default=(),
        metavar="GLOB=B[,B]",
        help="widths offered to the layers whose names match, such as 'features.0.*=8' or 'head=4,8'; the last match counts",
    )
    add(
        "--activations",
        type=_activation_width,
        nargs="+",
        default=(8,),
        metavar="8|none",
        help="bits of activations, or none to leave them in float; several, such as 4 8, are allocated with the weights' "
        "(default: 8)",
    )
    add("--sensitivity", choices=METHODS, default="auto", help="what a narrow layer costs (default: %(default)s)")


def _add_rounding(result: argparse.ArgumentParser) -> None:
    add = result.add_argument_group("rounding and repair").add_argument
    add("--rounding", choices=tuple(ROUNDINGS), default="nearest", help="how weights are rounded (default: %(default)s)")
    add("--group-size", type=whole_number(1), metavar="N", help="weights that share a scale (default: a channel's)")
    add("--symmetric", action="store_true", help="no offsets: weights' codes are centred at zero")
    add("--equalize", action="store_true", help="even out channels' ranges between layers, before rounding")
    add("--smooth", action="store_true", help="move activations' outliers into the weights (SmoothQuant), before rounding")
    add(
        "--reestimate-batch-norm",
        action="store_true",
        help="take batch norms' statistics anew from the calibration data, before they are folded",
    )
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
    add("--finetune", type=whole_number(0), default=0, metavar="EPOCHS", help="train the rounded network for so many epochs")
    add("--finetune-order", choices=("hawq-v1",), help="round layer after layer while training, most sensitive first")


def _add_data(result: argparse.ArgumentParser) -> None:
    add = result.add_argument_group("data").add_argument
    add(
        "--data-free",
        action="store_true",
        help="use no training data, but inputs distilled from the statistics of the batch norms (ZeroQ)",
    )
    add(
        "--calibration-size",
        type=whole_number(1),
        metavar="N",
        help=f"examples for curvature and calibration (default: {_EXAMPLES}; {_DISTILLED} where they are distilled)",
    )
    add("--no-augment", dest="augment", action="store_false", help="take calibration examples as they are")
    add("--batch-size", type=whole_number(1), default=128, metavar="N", help="examples at a time (default: %(default)s)")


def _activation_width(text: str) -> int | None:
    if text not in {*_WIDTHS, "none"}:
        raise argparse.ArgumentTypeError(f"{text!r}: activations take 8 bits, or none of quantization")
    return None if text == "none" else int(text)


def _width(text: str) -> int:
    if text not in _WIDTHS:
        raise argparse.ArgumentTypeError(f"{text!r} is no width: widths are whole numbers from 2 to 8")
    return int(text)
