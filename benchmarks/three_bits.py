"""python -m benchmarks.three_bits: accuracy at an average of 3 bits, by who chose the widths.

ResNet-20 on digits, trained with three seeds. Weights only, rounded to nearest, no bias correction: nothing but the
allocation differs between the rows. Prints a Markdown table and writes it to benchmarks/results/three_bits.md.
"""

import argparse
import platform
import statistics
from pathlib import Path

import torch

import hawq
from hawq.cost.size import bits_of_weights
from hawq.evaluation import evaluate
from hawq.fold import folded
from hawq.graph import example_inputs, find_layers, tied_layers
from hessian.files import write_atomically
from hessian.objective import batches_of
from hessian.tasks import digits_resnet20

BITS = (2, 3, 4, 5, 6, 8)
RESULT = Path(__file__).parent / "results" / "three_bits.md"


def accuracies(seed: int, average: int) -> dict[str, float]:
    """Test accuracy of one trained network under each allocation."""
    task = digits_resnet20(seed=seed)
    data = batches_of(task.train, 128, size=512, generator=torch.Generator().manual_seed(seed))
    test = batches_of(task.evaluation, 360)
    graph = folded(task.model, example_inputs(data))
    layers = find_layers(graph)
    counts = {name: layer.num_params for name, layer in layers.items()}
    budget = hawq.Budget("bits", bits_of_weights(counts, BITS), average * sum(counts.values()))

    def chosen_by(method: str) -> hawq.Allocation:
        table = hawq.sensitivity(graph, task.loss, data, bits=BITS, method=method)
        return hawq.allocate(table, [budget], tied_layers(layers))

    def accuracy(allocation: hawq.Allocation) -> float:
        model = hawq.quantize_model(graph, allocation, data, activations=None, bias_correction=False)
        return evaluate(model, task, test).metric

    return {
        "float": evaluate(task.model, task, test).metric,
        f"{average} bits everywhere": accuracy(hawq.Allocation(dict.fromkeys(layers, average))),
        "widths by weight error": accuracy(chosen_by("weight-error")),
        "widths by Hessian trace (HAWQ-V2)": accuracy(chosen_by("hessian-trace")),
    }


def table(seeds: int, average: int) -> str:
    """All seeds as Markdown, with the medians."""
    columns = [accuracies(seed, average) for seed in range(seeds)]
    lines = [
        "| " + " | ".join(["widths", *(f"seed {seed}" for seed in range(seeds)), "median"]) + " |",
        "| --- |" + " ---: |" * (seeds + 1),
    ]
    for name in columns[0]:
        values = [column[name] for column in columns]
        cells = [f"{100 * value:.1f}%" for value in (*values, statistics.median(values))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3, help="training seeds (default: %(default)s)")
    parser.add_argument("--average", type=int, default=3, help="average bits of a weight (default: %(default)s)")
    options = parser.parse_args()
    text = table(options.seeds, options.average)
    print(text)
    machine = f"Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}, {platform.machine()}"
    write_atomically(
        RESULT, f"{text}\n\n`python -m benchmarks.three_bits --seeds {options.seeds} --average {options.average}`, {machine}\n"
    )


if __name__ == "__main__":
    main()
