"""The command line of `python -m hessian`, and how much work fits the time that a person waits."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from hessian.command_line import LARGEST_SEED, Parser, add_completion, whole_number

_SECONDS = 100.0  # that the products of a run may take where its options leave a choice
_PRODUCTS_OF_A_BLOCK = 4  # for a tensor's top eigenvalue, in products with all parameters: some ten, at less than half the cost
_OTHER_PRODUCTS = 40  # verification, the trace where it is not exact
_GRADIENTS = 2.3  # that a product costs
_OPERATIONS_A_SECOND = {"cpu": 1.5e11, "cuda": 1e13}  # of small networks, on modest hardware
_FIXED_SECONDS = 0.03  # of a product, whatever the number of examples
_REBUILDING = 4  # how much more a product costs whose graph is not kept


@dataclass(frozen=True)
class Plan:
    """How much is computed.

    examples: that the loss is averaged over. eigenvalues: of the upper end. probes, steps: of the density. layer_probes:
    most products for traces that are not exact. layer_eigenvalues: whether each tensor's is computed. plane_points: on each
    side of the contour. product_seconds: what a product was expected to take; None where nothing was left to choose.
    """

    examples: int = 256
    eigenvalues: int = 10
    probes: int = 8
    steps: int = 60
    layer_probes: int = 128
    layer_eigenvalues: bool = True
    plane_points: int = 21
    product_seconds: float | None = None

    def products(self, num_tensors: int) -> int:
        """About how many products with the whole Hessian that is."""
        of_layers = _PRODUCTS_OF_A_BLOCK * num_tensors if self.layer_eigenvalues else 0
        return _OTHER_PRODUCTS + 3 * self.eigenvalues + self.probes * self.steps + self.layer_probes // 2 + of_layers

    def __str__(self) -> str:
        text = (
            f"{self.examples:,} examples, {self.eigenvalues} eigenvalues, {self.probes} probes of {self.steps} steps"
            f"{'' if self.layer_eigenvalues else ', no eigenvalues of layers'}"
        )
        return text if self.product_seconds is None else f"{text} (a product takes about {self.product_seconds:.2g} s)"


_PLANS = (  # from thorough to coarse: probes are given up before examples, on which all numbers depend
    Plan(),
    Plan(probes=4, steps=50),
    Plan(examples=128, probes=4, steps=50),
    Plan(examples=64, probes=4, steps=50),
    Plan(examples=32, probes=4, steps=40, layer_probes=96, plane_points=17),
    Plan(examples=16, eigenvalues=8, probes=3, steps=32, layer_probes=64, plane_points=15),
    Plan(examples=8, eigenvalues=5, probes=2, steps=18, layer_probes=16, plane_points=11),
)


@dataclass(frozen=True)
class ProductCost:
    """Seconds that a product with the Hessian of a batch takes: fixed ones, and those of each example."""

    fixed: float
    each: float

    @classmethod
    def of(cls, operations: float, device: str) -> "ProductCost":
        """From the floating-point operations of one example's gradient, by nominal speeds: the same on every machine."""
        speed = _OPERATIONS_A_SECOND["cuda" if device.startswith("cuda") else "cpu"]
        return cls(_FIXED_SECONDS, _GRADIENTS * operations / speed)

    def seconds(self, examples: int) -> float:
        return self.fixed + self.each * examples


@dataclass(frozen=True)
class Options:
    """What to analyse and where to write it; None leaves the choice to `plan`. See `parser` for units."""

    task: str
    out: Path
    weights: Path | None = None
    examples: int | None = None
    batch_size: int | None = None
    eigenvalues: int | None = None
    probes: int | None = None
    steps: int | None = None
    layers: bool | None = None
    landscape: bool = True
    seed: int = 0
    device: str = "cpu"
    json: bool = False
    debug: bool = False

    def check(self) -> None:
        """Raise ValueError for a folder that cannot be used."""
        for path in (self.out, *self.out.absolute().parents):
            if path.exists() and not path.is_dir():
                raise ValueError(f"--out {self.out}: {path} is a file, not a folder")
        if self.out.is_dir() and not self.out.stat().st_mode & 0o222:
            raise ValueError(f"--out {self.out} is read-only: name another folder or change its permissions")

    def plan(self, available: int, num_params: int, num_tensors: int, cost: ProductCost | None) -> Plan:
        """The most thorough plan within the time, with what the options ask for; None: whatever a product costs.

        Raises ValueError for more eigenvalues than there are."""
        if self.eigenvalues is not None and self.eigenvalues > num_params:
            raise ValueError(f"--eigenvalues {self.eigenvalues}: the Hessian has {num_params:,}, one for each parameter")
        plans = [self._asked(plan, available, num_params) for plan in _PLANS]
        if cost is None:
            return plans[0]
        rebuilt = _REBUILDING if self.batch_size is not None else 1
        plans = [replace(plan, product_seconds=rebuilt * cost.seconds(plan.examples)) for plan in plans]
        if self.layers is None:
            plans += [replace(plan, layer_eigenvalues=False) for plan in plans]
        for plan in plans:
            assert plan.product_seconds is not None
            if plan.product_seconds * plan.products(num_tensors) <= _SECONDS:
                return plan
        return plans[-1]

    def leaves_a_choice(self) -> bool:
        """Whether the amount of work depends on what a product costs."""
        return None in (self.examples, self.eigenvalues, self.probes, self.steps)

    def _asked(self, plan: Plan, available: int, num_params: int) -> Plan:
        return replace(
            plan,
            examples=min(self.examples or plan.examples, available),
            eigenvalues=self.eigenvalues or min(plan.eigenvalues, num_params),
            probes=self.probes or plan.probes,
            steps=self.steps or plan.steps,
            layer_eigenvalues=plan.layer_eigenvalues if self.layers is None else self.layers,
        )


def parse(arguments: list[str] | None = None) -> Options:
    """The options of a command line; exits with code 2 and a message where it makes no sense."""
    values = vars(parser().parse_args(arguments))
    values["out"] = values["out"] or Path("out") / f"{values['task'].replace(':', '-')}-curvature"
    return Options(**values)


def parser() -> argparse.ArgumentParser:
    """Every option with its unit."""
    result = Parser(
        prog="python -m hessian",
        description="The curvature of a network's loss: eigenvalues, their density, traces by layer and the landscape, each "
        "with its error, as report.json, report.html and PNG figures; of the network in evaluation mode.",
        epilog="""examples:
  python -m hessian digits-resnet20
  python -m hessian text-transformer --examples 64 --eigenvalues 20 --out out/text
  python -m hessian my_package.tasks:cifar --weights model.safetensors --device cuda
Numbers that are not given are chosen for a run of about two minutes, by a count of operations,
which is the same on every machine.
exit codes: 0 done, 1 failed or interrupted, 2 wrong usage, or a task that cannot be analysed""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    built_in = "digits-resnet20, digits-mobilenet, text-transformer, minilm"
    add("task", metavar="TASK", help=f"a built-in task ({built_in}) or package.module:function")
    add("--out", type=Path, metavar="DIR", help="folder for the results (default: out/TASK-curvature, a colon becoming a dash)")
    add("--weights", type=Path, metavar="FILE", help="weights for the task's model: safetensors, or a torch state dict")
    add(
        "--examples",
        type=whole_number(1),
        metavar="N",
        help="training examples that the loss is averaged over (default: up to 256)",
    )
    add("--batch-size", type=whole_number(1), metavar="N", help="examples at a time (default: all at once, which is fastest)")
    add("--eigenvalues", type=whole_number(1), metavar="K", help="largest eigenvalues to compute (default: up to 10)")
    add("--probes", type=whole_number(1), metavar="N", help="random probes of the density (default: up to 8)")
    add("--steps", type=whole_number(1), metavar="N", help="Lanczos steps of each probe (default: up to 60)")
    add(
        "--layers",
        "--layer-eigenvalues",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the largest eigenvalue of each parameter tensor (default: where the time allows)",
    )
    add("--landscape", action=argparse.BooleanOptionalAction, default=True, help="the loss around the model (default: yes)")
    add(
        "--seed", type=whole_number(0, LARGEST_SEED), default=0, metavar="S", help="seed of all sampling (default: %(default)s)"
    )
    add("--device", default="cpu", metavar="NAME", help="where to compute, such as cuda (default: %(default)s)")
    add("--json", action="store_true", help="print report.json, and nothing else, on standard output")
    add("--debug", action="store_true", help="show the traceback of an error")
    add_completion(result, "hessian")
    return result
