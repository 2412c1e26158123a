"""python -m benchmarks.large_batch: what curvature does for tuning and for large batches, on ResNet-20 and the digits.

`tuning`: the span of base rates at which each method reaches 98% in 10 epochs at batch 64. `batch`: every method as it comes,
at 16 times that batch and an eighth of the steps. `scaling`: steps to a target against the batch. `noise`: the best batch for
SGD, and the one that the noise scale recommends. `cost`: a step's time over SGD's. Runs are kept in
benchmarks/results/large_batch_runs.jsonl: what is there is not run again. Prints Markdown and writes it, and a figure, to
benchmarks/results/large_batch_<section>.
"""

import argparse
import math
import platform
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.steps_to_target import cost, noise, scaling
from benchmarks.training_runs import RESULTS, TRAINING_EXAMPLES, Case, results
from hessian.colours import BLUE, GREEN, GREY, ORANGE, PINK
from hessian.files import write_atomically

SMALL, LARGE, EPOCHS = 64, 1024, 10
TARGET = 0.98


METHODS: dict[str, dict[str, Any]] = {
    "SGD": {},
    "LARS": {"optimizer": "lars"},
    "LAMB": {"optimizer": "lamb"},
    "SGD, rates from curvature": {"layer_rates": "curvature"},
}
RATES = {
    "SGD": (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0),
    "LARS": (1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0),
    "LAMB": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1),
    "SGD, rates from curvature": (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
}
HALF = {"adversarial_share": 0.5}
UNTUNED: dict[str, dict[str, Any]] = {
    "SGD": {},
    "SGD, rate times 16": {"base_batch": SMALL},
    "SGD, LEGW": {"base_batch": SMALL, "batch_scaling": "legw"},
    "LARS": {"optimizer": "lars"},
    "LAMB": {"optimizer": "lamb"},
    "K-FAC": {"optimizer": "kfac"},
    "SGD, LEGW, half adversarial": {"base_batch": SMALL, "batch_scaling": "legw"} | HALF,
    "LARS, half adversarial": {"optimizer": "lars"} | HALF,
    "K-FAC, half adversarial": {"optimizer": "kfac"} | HALF,
    "AdaHessian": {"optimizer": "adahessian"},
    "SGD, rates from curvature": {"layer_rates": "curvature", "measure_every": 4},
    "SGD, rates from curvature, base 1": {"layer_rates": "curvature", "measure_every": 4, "learning_rate": 1.0},
}


def longest_span(rates: Sequence[float], reached: Iterable[bool]) -> float:
    """Decades between the ends of the longest run of neighbouring rates that reached the target; 0 for one or none."""
    best, first = 0.0, None
    for rate, success in zip(rates, reached, strict=True):
        first = None if not success else rate if first is None else first
        best = max(best, 0.0 if first is None else math.log10(rate / first))
    return best


def tuning(seeds: Sequence[int], workers: int) -> tuple[str, Figure]:
    """Accuracy against the base rate."""
    cases = [
        Case(method, seed, options | {"batch_size": SMALL, "epochs": float(EPOCHS), "learning_rate": rate})
        for method, options in METHODS.items()
        for rate in RATES[method]
        for seed in seeds
    ]
    rows = {(row["method"], row["options"]["learning_rate"], row["seed"]): row for row in results(cases, workers)}
    lines = [
        "| method | base rates that reach 98%, decades (median; by seed) | best accuracy | time on curvature |",
        "|-|-|-|-|",
    ]
    figure = Figure(figsize=(7.2, 4), layout="constrained")
    axes = figure.subplots()
    for (method, rates), colour in zip(RATES.items(), (BLUE, ORANGE, GREEN, PINK), strict=True):
        by_seed = [[rows[method, rate, seed]["metric"] for rate in rates] for seed in seeds]
        spans = [longest_span(rates, [metric >= TARGET for metric in metrics]) for metrics in by_seed]
        share = statistics.median(rows[method, rate, seed]["curvature_share"] for rate in rates for seed in seeds)
        medians = [statistics.median(column) for column in zip(*by_seed, strict=True)]
        each = " ".join(f"{span:.1f}" for span in spans)
        lines.append(f"| {method} | {statistics.median(spans):.1f} ({each}) | {max(medians):.2%} | {share:.1%} |")
        low, high = ([choose(column) for column in zip(*by_seed, strict=True)] for choose in (min, max))
        axes.plot(rates, medians, marker="o", markersize=3, color=colour, label=method)
        axes.fill_between(rates, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(TARGET, color=GREY, linestyle=":", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_ylim(0.85, 1.003)
    axes.set_xlabel("base learning rate")
    axes.set_ylabel(f"accuracy: median and range of {len(seeds)} seeds")
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    rates_text = "; ".join(f"{method}: {', '.join(f'{rate:g}' for rate in rates)}" for method, rates in RATES.items())
    lines += ["", f"Batch {SMALL}, {EPOCHS} epochs, warm-up over 5% of the steps, cosine. Rates tried: {rates_text}."]
    return "\n".join(lines), figure


def batch(seeds: Sequence[int], workers: int) -> tuple[str, Figure]:
    """Accuracy at 16 times the batch, in an eighth of the steps."""
    steps = math.ceil(EPOCHS * TRAINING_EXAMPLES / SMALL) // 8
    small = [
        Case(method, seed, options | {"batch_size": SMALL, "epochs": float(EPOCHS)})
        for method, options in (("SGD, batch 64", {}), ("SGD, batch 64, half adversarial", HALF))
        for seed in seeds
    ]
    cases = [
        Case(method, seed, options | {"batch_size": LARGE, "accumulate": 4, "steps": steps})
        for method, options in UNTUNED.items()
        for seed in seeds
    ]
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in results([*small, *cases], workers):
        rows.setdefault(row["method"], []).append(row)
    lines = ["| method, untuned | steps | accuracy (mean; by seed) |", "|-|-|-|"]
    figure = Figure(figsize=(7.2, 4), layout="constrained")
    axes = figure.subplots()
    for position, (method, found) in enumerate(rows.items()):
        metrics = [row["metric"] for row in found]
        each = " ".join(f"{metric:.2%}" for metric in metrics)
        lines.append(f"| {method} | {found[0]['steps']} | {statistics.mean(metrics):.2%} ({each}) |")
        errors = [max(100 * (1 - metric), 0.1) for metric in metrics]
        axes.plot(errors, [position] * len(metrics), "o", color=BLUE, markersize=4, alpha=0.6)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("% of the evaluation data that are wrong, each seed")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    lines += [
        "",
        f"Batch {LARGE} in passes of {LARGE // 4}; the first two rows are the small batch. Default settings, FGSM.",
    ]
    return "\n".join(lines), figure


SECTIONS = {"tuning": tuning, "batch": batch, "scaling": scaling, "noise": noise, "cost": cost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(SECTIONS), help="one section (default: all)")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default: 5)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, of one thread each (default: 2)")
    options = parser.parse_args()
    for name, section in SECTIONS.items():
        if options.only in (None, name):
            text, figure = section(range(options.seeds), options.workers)
            where = f"torch {torch.__version__}, {platform.machine()}, one thread a run"
            text = f"# {name}: `python -m benchmarks.large_batch --only {name}`\n\n{text}\n\n{where}\n"
            print(text)
            write_atomically(RESULTS / f"large_batch_{name}.md", text)
            if figure is not None:
                figure.savefig(RESULTS / f"large_batch_{name}.svg")


if __name__ == "__main__":
    main()
