"""What `parallel.train` is asked to do: one dataclass, which is also the command line and the TOML file."""

import argparse
import math
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

from hessian.command_line import LARGEST_SEED, Parser, add_completion
from hessian.spelling import did_you_mean, require_file
from parallel.adversarial import ATTACKS
from parallel.learning_rate import RULES
from parallel.optimizers import OPTIMIZERS
from parallel.schedules import SCHEDULES

_LONGEST_TIMEOUT = 1e9  # seconds: 32 years, which the clocks of processes can count


def _option(default: Any, text: str, metavar: str | None = None, choices: Sequence[str] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "metavar": metavar, "choices": choices})


@dataclass(frozen=True)
class Config:
    """All that decides a run. Every field but `task` is the option of its name, and a key of the TOML file."""

    task: str
    out: Path = _option(Path("out/train"), "folder for the results", "DIR")
    weights: Path | None = _option(None, "start from these weights: safetensors, or a torch state dict", "FILE")
    steps: int | None = _option(None, "steps to take; 0 evaluates only", "N")
    epochs: float | None = _option(None, "passes over the data (default: 10)", "E")
    batch_size: int = _option(64, "examples a step, over all ranks", "B")
    accumulate: int = _option(1, "passes that a step's batch is divided among, to save memory", "N")
    optimizer: str = _option("sgd", "the optimizer", choices=tuple(OPTIMIZERS))
    learning_rate: float | None = _option(None, "the base learning rate (default: the optimizer's own, 0.05 for sgd)", "R")
    momentum: float = _option(0.9, "of sgd, lars and kfac", "M")
    weight_decay: float = _option(0.0, "decay of weights: by the gradient for sgd and lars, else decoupled", "D")
    curvature_every: int | None = _option(
        None, "steps from one estimate of the curvature to the next (default: 1 for adahessian, 5 for kfac)", "STEPS"
    )
    curvature_passes: int | None = _option(
        None, "of how many of a step's passes (--accumulate) it is taken (default: all)", "N"
    )
    schedule: str = _option("cosine", "how the rate goes on after the warm-up", choices=tuple(SCHEDULES))
    warmup: float = _option(0.05, "share of the steps over which the rate grows from 0", "SHARE")
    base_batch: int | None = _option(None, "the batch that the learning rate was chosen for, to scale it by", "B")
    batch_scaling: str = _option(
        "linear", "how the rate grows with the batch; legw: by its square root, with a longer warm-up", choices=RULES
    )
    layer_rates: str | None = _option(
        None, "curvature: rates of layers from their curvature, as it is measured; or the layers.json of a report", "SOURCE"
    )
    rate_ratio: float = _option(10.0, "by how much the rates of layers may differ from the base rate", "RATIO")
    find_rate: bool = _option(False, "take the base learning rate from the curvature before the first step")
    curvature_examples: int = _option(16, "examples that curvature is measured on, over all ranks", "N")
    measure_every: int | None = _option(
        None,
        "steps from one measurement to the next (default: 20 for noise-scale, for rates what costs about 5%%)",
        "STEPS",
    )
    adaptive_batch: str | None = _option(None, "what the batch follows", choices=("noise-scale", "adabatch", "growing", "absa"))
    doubling_epochs: float = _option(2.0, "passes over the data after which adabatch and absa double it in any case", "E")
    largest_batch: int | None = _option(None, "up to which it grows (default: 16 times the first)", "B")
    adversarial_share: float = _option(0.0, "of the examples, which an attack changes in training (absa: at first)", "SHARE")
    attack: str | None = _option(
        None,
        "the attack (in training by default fgsm); the trained network is evaluated under it, too",
        choices=ATTACKS,
    )
    epsilon: float = _option(0.1, "by how much fgsm and pgd change an input, of inputs about as large as 1", "E")
    sharpness_every: int | None = _option(None, "record the Hessian's top eigenvalue and trace after so many steps", "STEPS")
    clip: float | None = _option(None, "largest norm of the gradient; longer ones are shortened to it", "NORM")
    label_smoothing: float = _option(0.0, "of cross-entropy", "S")
    mixup: float = _option(0.0, "alpha of mixup's beta distribution, 0 for none", "ALPHA")
    flip: bool = _option(False, "mirror half of the images")
    shift: int = _option(0, "move images by up to so many pixels each way", "PIXELS")
    ema: float | None = _option(None, "decay of an average of the weights, which is then evaluated and saved", "DECAY")
    precision: str = _option("float32", "bf16: autocast to bfloat16", choices=("float32", "bf16"))
    checkpoint_activations: bool = _option(False, "compute the insides of blocks anew in the backward pass, to save memory")
    batch_norm: str = _option(
        "global", "moments of the whole batch, as one process has them, or of each rank's part", choices=("global", "local")
    )
    ghost_batch: int | None = _option(None, "normalise so many examples at a time, as small batches would be", "N")
    mesh: str | None = _option(None, "ranks by what they share, such as batch=2,model=2,domain=1 (default: the batch)")
    plan: str | None = _option(None, "auto: the grid and the layouts that communicate least, by --alpha and --beta", "auto")
    alpha: float = _option(2e-6, "seconds a message, for --plan auto", "S")
    beta: float = _option(1 / 6e9, "seconds a byte, for --plan auto", "S_PER_BYTE")
    shard: bool = _option(False, "keep parameters and optimizer state in parts over the ranks that share the batch (FSDP2)")
    seed: int = _option(0, "seed of the data's order, of augmentation, and of the weights that your task's function draws", "S")
    device: str = _option("cpu", "cpu or cuda")
    workers: int = _option(0, "processes a rank that load data", "N")
    evaluate_every: int | None = _option(None, "evaluate after so many steps (default: once an epoch)", "STEPS")
    checkpoint_every: int = _option(200, "write a checkpoint after so many steps", "STEPS")
    keep: int = _option(2, "checkpoints kept", "N")
    timeout: float = _option(600.0, "seconds after which ranks that do not answer count as lost", "S")
    resume: bool = _option(False, "go on from the newest checkpoint in the folder, if there is one")
    force: bool = _option(False, "overwrite results in the folder")
    json: bool = _option(False, "print report.json, and nothing else, on standard output")
    debug: bool = _option(False, "show the traceback of an error")

    def check(self) -> None:
        """Raise ValueError for values out of their range or at odds with each other."""
        positive = (
            *("batch_size", "accumulate", "checkpoint_every", "curvature_examples", "rate_ratio", "keep"),
            *("timeout", "doubling_epochs"),
        )
        optional = (
            *("evaluate_every", "curvature_passes", "learning_rate", "clip", "epochs", "base_batch", "largest_batch"),
            *("curvature_every", "sharpness_every", "measure_every", "ghost_batch"),
        )
        for name in (*positive, *(name for name in optional if getattr(self, name) is not None)):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{_flag(name)} {getattr(self, name)}: give a positive number")
        for name in ("momentum", "label_smoothing", "warmup", "adversarial_share", *(["ema"] if self.ema is not None else [])):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{_flag(name)} {getattr(self, name)}: give a number from 0 to below 1")
        from_0 = ("weight_decay", "mixup", "shift", "workers", "epsilon", "alpha", "beta", "seed")
        for name in (*from_0, *(["steps"] if self.steps is not None else [])):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{_flag(name)} {getattr(self, name)}: give a number of at least 0")
        for name, most in (("seed", LARGEST_SEED), ("timeout", _LONGEST_TIMEOUT)):
            if getattr(self, name) > most:
                raise ValueError(f"{_flag(name)} {getattr(self, name)}: give a number of at most {most}")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"--steps {self.steps} and --epochs {self.epochs:g}: give one of them")
        if self.plan not in (None, "auto"):
            raise ValueError(f"--plan {self.plan}: the one plan is auto")
        if self.plan is not None and self.mesh is not None:
            raise ValueError(f"--plan {self.plan} chooses the mesh: leave out --mesh {self.mesh}")
        if self.shard and (self.plan is not None or self.mesh is not None):
            raise ValueError("--shard divides parameters over the ranks that share the batch: leave out --mesh and --plan")
        if self.batch_size % self.accumulate:
            raise ValueError(f"--accumulate {self.accumulate} does not divide --batch-size {self.batch_size}")
        if self.optimizer.startswith("newton") and self.curvature_passes is not None:
            raise ValueError(
                f"--optimizer {self.optimizer} takes loss and curvature of the same passes: leave out --curvature-passes"
            )
        if (self.curvature_passes or 1) > self.accumulate:
            raise ValueError(f"--curvature-passes {self.curvature_passes}: a step has {self.accumulate}: raise --accumulate")
        for item in fields(self):
            choices = item.metadata.get("choices")
            value = getattr(self, item.name)
            if choices and value not in choices and value != item.default:
                raise ValueError(
                    f"{_flag(item.name)} {value}: choose one of {', '.join(choices)}{did_you_mean(value, choices, str)}"
                )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def parse(arguments: Sequence[str] | None = None) -> Config:
    """The config of a command line: defaults, then --config FILE, then what is given; a usage error where it makes no sense."""
    chosen = parser()
    given = vars(chosen.parse_args(arguments))
    file = given.pop("config", None)
    try:
        values = {} if file is None else read_toml(file)
    except (ValueError, OSError) as error:
        chosen.error(str(error))
    values.update({name: value for name, value in given.items() if name != "task" or value is not None})
    if "task" not in values:
        chosen.error("a TASK is needed, on the command line or in the file")
    config = Config(**values)
    try:
        config.check()
    except ValueError as error:
        chosen.error(str(error))
    return config


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields in a TOML file; ValueError where there is none, and for keys and types that Config has not."""
    require_file(Path(path), "config file")
    try:
        content = tomllib.loads(Path(path).read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no TOML: {error}") from error
    types = get_type_hints(Config)
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in types:
            raise ValueError(f"{path}: there is no option {key!r}{did_you_mean(name, types)}; there are {', '.join(types)}")
        wanted = _kind(types[name])
        if wanted is float and type(value) is int:
            value = float(value)
        if wanted is Path and isinstance(value, str):
            value = Path(value)
        if type(value) is not wanted and not isinstance(value, Path):
            raise ValueError(f"{path}: {key} = {value!r} is not of type {wanted.__name__}")
        values[name] = value
    return values


def parser() -> argparse.ArgumentParser:
    """Every option, with its unit; options that are not given are absent from the result."""
    result = Parser(
        prog="python -m parallel.train",
        description="Train a task's network on one process, or on many by torchrun, as one process would.",
        epilog="""examples:
  python -m parallel.train digits-resnet20 --epochs 5
  torchrun --nproc-per-node 2 --max-restarts 3 -m parallel.train digits-resnet20 --batch-size 128 --out out/digits
  torchrun --nproc-per-node 8 -m parallel.train my_package.tasks:cifar --config run.toml --resume
exit codes: 0 done, 1 failed or interrupted, 2 wrong usage, or a task that cannot be trained""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    result.add_argument("task", metavar="TASK", nargs="?", default=None, help="a built-in task or package.module:function")
    result.add_argument("--config", type=Path, metavar="FILE.toml", help="options by name; those given here go before them")
    types = get_type_hints(Config)
    for item in fields(Config):
        if item.name == "task":
            continue
        wanted, text = _kind(types[item.name]), item.metadata["help"]
        if wanted is bool:
            result.add_argument(_flag(item.name), action=argparse.BooleanOptionalAction, help=text)
            continue
        if item.default is not None:
            text += f" (default: {item.default})"
        metavar, choices = item.metadata["metavar"], item.metadata["choices"]
        result.add_argument(_flag(item.name), type=wanted, metavar=metavar, choices=choices, help=text)
    add_completion(result, "parallel-train")
    return result


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _kind(annotation: Any) -> type:
    """The type itself, of an annotation that may allow None."""
    if isinstance(annotation, UnionType):
        return next(kind for kind in get_args(annotation) if kind is not type(None))
    kind: type = annotation
    return kind
