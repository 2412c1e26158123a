"""python -m benchmarks.large_batch: what curvature does for tuning and for large batches, on ResNet-20 and the digits.

`tuning`: the span of base rates at which each method reaches 98% in 10 epochs at batch 64, over five seeds. `batch`: every
method as it comes, at 16 times that batch and an eighth of the steps. Runs are kept in
benchmarks/results/large_batch_runs.jsonl: what is there is not run again. Prints Markdown and writes it, and a figure, to
benchmarks/results/large_batch_<section>.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import hessian
from hessian.files import write_atomically
from hessian.processes import joined
from parallel.train_options import Config
from parallel.trainer import NotFiniteError, Trainer

RESULTS = Path(__file__).parent / "results"
RUNS = RESULTS / "large_batch_runs.jsonl"
TASK, SMALL, LARGE, EPOCHS = "digits-resnet20", 64, 1024, 10
TARGET = 0.98


@dataclass(frozen=True)
class Case:
    """One training run; options are those of `parallel.train`."""

    method: str
    seed: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """By which its result is found again."""
        return json.dumps(asdict(self), sort_keys=True)


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
UNTUNED: dict[str, dict[str, Any]] = {
    "SGD": {},
    "SGD, rate times 16": {"base_batch": SMALL},
    "SGD, LEGW": {"base_batch": SMALL, "batch_scaling": "legw"},
    "LARS": {"optimizer": "lars"},
    "LAMB": {"optimizer": "lamb"},
    "K-FAC": {"optimizer": "kfac"},
    "AdaHessian": {"optimizer": "adahessian"},
    "SGD, rates from curvature": {"layer_rates": "curvature", "measure_every": 4},
    "SGD, rates from curvature, base 1": {"layer_rates": "curvature", "measure_every": 4, "learning_rate": 1.0},
}


def trained(case: Case) -> dict[str, Any]:
    """Accuracy and loss on the evaluation data (0 and NaN after divergence), seconds, and the share spent on curvature."""
    torch.set_num_threads(1)
    config = Config(TASK, seed=case.seed, **case.options)
    config.check()
    torch.manual_seed(config.seed)
    with joined() as processes:
        trainer = Trainer(hessian.load_task(TASK, pretrained=False), config, processes)
        started = time.perf_counter()
        metric, loss = 0.0, math.nan
        try:
            for _ in trainer.train():
                pass
            found = trainer.evaluate()
            metric, loss = found.metric, found.loss
        except NotFiniteError:
            pass
        seconds = time.perf_counter() - started
    return asdict(case) | {
        "metric": metric,
        "loss": loss if math.isfinite(loss) else None,
        "steps": trainer.step,
        "seconds": round(seconds, 2),
        "curvature_share": round(trainer.control.seconds / seconds, 4),
    }


def results(cases: Sequence[Case], workers: int) -> list[dict[str, Any]]:
    """Of all cases, in their order; those that are not on file are run, `workers` at a time, and put there."""
    known = {}
    if RUNS.exists():
        for line in RUNS.read_text().splitlines():
            row = json.loads(line)
            known[Case(row["method"], row["seed"], row["options"]).key] = row
    missing = [case for case in cases if case.key not in known]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool, RUNS.open("a") as file:
        for case, row in zip(missing, tqdm(pool.map(trained, missing), total=len(missing), unit="run"), strict=True):
            known[case.key] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
    return [known[case.key] for case in cases]


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
    for (method, rates), colour in zip(RATES.items(), ("#0072b2", "#d55e00", "#009e73", "#cc79a7"), strict=True):
        by_seed = [[rows[method, rate, seed]["metric"] for rate in rates] for seed in seeds]
        spans = [longest_span(rates, [metric >= TARGET for metric in metrics]) for metrics in by_seed]
        share = statistics.median(rows[method, rate, seed]["curvature_share"] for rate in rates for seed in seeds)
        medians = [statistics.median(column) for column in zip(*by_seed, strict=True)]
        each = " ".join(f"{span:.1f}" for span in spans)
        lines.append(f"| {method} | {statistics.median(spans):.1f} ({each}) | {max(medians):.2%} | {share:.1%} |")
        low, high = ([choose(column) for column in zip(*by_seed, strict=True)] for choose in (min, max))
        axes.plot(rates, medians, marker="o", markersize=3, color=colour, label=method)
        axes.fill_between(rates, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(TARGET, color="#666666", linestyle=":", linewidth=0.8)
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
    steps = math.ceil(EPOCHS * 1437 / SMALL) // 8
    small = [Case("SGD, batch 64", seed, {"batch_size": SMALL, "epochs": float(EPOCHS)}) for seed in seeds]
    cases = [
        Case(method, seed, options | {"batch_size": LARGE, "accumulate": 4, "steps": steps})
        for method, options in UNTUNED.items()
        for seed in seeds
    ]
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in results([*small, *cases], workers):
        rows.setdefault(row["method"], []).append(row)
    lines = ["| method, untuned | steps | accuracy (mean; by seed) | seconds |", "|-|-|-|-|"]
    figure = Figure(figsize=(7.2, 4), layout="constrained")
    axes = figure.subplots()
    for position, (method, found) in enumerate(rows.items()):
        metrics = [row["metric"] for row in found]
        each = " ".join(f"{metric:.2%}" for metric in metrics)
        seconds = statistics.median(row["seconds"] for row in found)
        lines.append(f"| {method} | {found[0]['steps']} | {statistics.mean(metrics):.2%} ({each}) | {seconds:.0f} |")
        axes.plot(metrics, [position] * len(metrics), "o", color="#0072b2", markersize=4)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("accuracy")
    axes.spines[["top", "right"]].set_visible(False)
    lines += ["", f"Batch {LARGE} in passes of {LARGE // 4}; the first row is the small batch. Default rates, no tuning."]
    return "\n".join(lines), figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("tuning", "batch"), help="one section (default: both)")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default: 5)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, of one thread each (default: 2)")
    options = parser.parse_args()
    for name, section in (("tuning", tuning), ("batch", batch)):
        if options.only in (None, name):
            text, figure = section(range(options.seeds), options.workers)
            where = f"torch {torch.__version__}, {platform.machine()}, one thread a run"
            text = f"# {name}: `python -m benchmarks.large_batch --only {name}`\n\n{text}\n\n{where}\n"
            print(text)
            write_atomically(RESULTS / f"large_batch_{name}.md", text)
            figure.savefig(RESULTS / f"large_batch_{name}.svg")


if __name__ == "__main__":
    main()
