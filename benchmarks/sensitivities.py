"""python -m benchmarks.sensitivities: the sensitivities side by side, judged by the networks they lead to.

Trained networks on digits; weights only, rounded to nearest with bias correction; only the table differs between the rows.
Prints Markdown tables and writes them to benchmarks/results/sensitivities.md.
"""

import argparse
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import fx

import hawq
from hawq.cost.size import bits_of_weights
from hawq.evaluation import evaluate
from hawq.fold import folded
from hawq.graph import example_inputs, find_layers, tied_layers
from hawq.sensitivity import METHODS, SensitivityTable
from hessian.files import write_atomically
from hessian.objective import batches_of
from hessian.task import Task, load_task

BITS = (2, 3, 4, 5, 6, 8)
AVERAGES = (2.5, 3.0, 3.5, 4.0)
MEASURED = (2, 3)  # widths of one layer, alone, whose loss increase is compared with the prediction
RESULT = Path(__file__).parent / "results" / "sensitivities.md"


def settings(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The methods as `hawq.sensitivity` runs them, and without bias correction those that know it."""
    found: dict[str, dict[str, Any]] = {method: {"method": method} for method in methods}
    for method in methods:
        if method in ("kl", "second-order", "gauss-newton"):
            found[f"{method}, weights alone"] = {"method": method, "bias_correction": False}
    return found


class Case:
    """One trained network: its tables, and what an allocation does to it."""

    def __init__(self, name: str, examples: int) -> None:
        self.name = name
        self.task: Task = load_task(name)
        self.task.model.eval()
        self.data = batches_of(self.task.train, examples, size=examples, generator=torch.Generator().manual_seed(0))
        self.test = batches_of(self.task.evaluation, 360)
        self.graph: fx.GraphModule = folded(self.task.model, example_inputs(self.data))
        self.layers = find_layers(self.graph)
        self.num_params = sum(layer.num_params for layer in self.layers.values())
        self.float = evaluate(self.task.model, self.task, self.test)

    def table(self, options: Mapping[str, Any]) -> tuple[SensitivityTable, float]:
        """The table and the processor seconds it took."""
        start = time.process_time()
        generator = torch.Generator().manual_seed(0)
        found = hawq.sensitivity(self.graph, self.task.loss, self.data, bits=BITS, generator=generator, **options)
        return found, time.process_time() - start

    def allocated(self, table: Mapping[str, Mapping[int, float]], average: float) -> tuple[float, float]:
        """Accuracy and loss increase on the test data of the best widths for this average."""
        counts = {name: layer.num_params for name, layer in self.layers.items()}
        budget = hawq.Budget(
            "bits",
            bits_of_weights(counts, BITS),
            average * self.num_params,
        )
        return self.measured(hawq.allocate(table, [budget], tied_layers(self.layers)), self.test)

    def measured(self, allocation: hawq.Allocation, data: Any) -> tuple[float, float]:
        model = hawq.quantize_model(self.graph, allocation, self.data, activations=None)
        result = evaluate(model, self.task, data)
        reference = self.float if data is self.test else evaluate(self.graph, self.task, data)
        return result.metric, result.loss - reference.loss

    def single_layers(self) -> dict[tuple[str, int], float]:
        """The loss increase on the test data with one layer rounded alone."""
        pairs = [(name, bits) for name in self.layers for bits in MEASURED]
        return {pair: self.measured(hawq.Allocation({pair[0]: pair[1]}), self.test)[1] for pair in pairs}


def rows(case: Case, methods: Sequence[str]) -> list[list[str]]:
    """One row a method: seconds, rank correlation, then accuracy and loss increase at each average."""
    truth = case.single_layers()
    lines = []
    for label, options in settings(methods).items():
        table, seconds = case.table(options)
        predicted = [table[name][bits] for name, bits in truth]
        cells = [label, f"{seconds:.1f}", f"{spearmanr(predicted, list(truth.values())).statistic:.2f}"]
        for average in AVERAGES:
            metric, increase = case.allocated(table, average)
            cells.append(f"{100 * metric:.1f}% ({increase:.3f})")
        lines.append(cells)
        print(f"{case.name}: {' | '.join(cells)}", flush=True)
    return lines


def report(cases: Sequence[Case], methods: Sequence[str]) -> str:
    """All networks as Markdown."""
    text = []
    for case in cases:
        header = ["sensitivity", "seconds", "rank correlation", *(f"{average:g} bits" for average in AVERAGES)]
        text += [
            f"{case.name}, {len(case.layers)} layers, {case.num_params:,} weights; float: {100 * case.float.metric:.1f}%, loss "
            f"{case.float.loss:.3f}.",
            "",
            "| " + " | ".join(header) + " |",
            "| --- |" + " ---: |" * (len(header) - 1),
            *("| " + " | ".join(cells) + " |" for cells in rows(case, methods)),
            "",
        ]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--examples", type=int, default=128, help="calibration examples, in one batch (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS[1:], default=METHODS[1:], help="default: all")
    parser.add_argument("tasks", nargs="*", default=["digits-resnet20", "digits-mobilenet"])
    options = parser.parse_args()
    text = report([Case(name, options.examples) for name in options.tasks], options.methods)
    notes = (
        "Accuracy on the test data (and increase of its loss) at an average of so many bits a weight. Rank correlation: "
        "Spearman's, between the table and the measured increase of the test loss with one layer alone at 2 or 3 bits, over "
        "all layers. Seconds: processor time of one thread."
    )
    machine = f"Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}, {platform.machine()}"
    arguments = f"{' '.join(options.tasks)} --examples {options.examples} --methods {' '.join(options.methods)}"
    command = f"OMP_NUM_THREADS=1 python -m benchmarks.sensitivities {arguments}"
    write_atomically(RESULT, f"{notes}\n\n{text}\n`{command}`, {machine}\n")
    print(text)


if __name__ == "__main__":
    main()
