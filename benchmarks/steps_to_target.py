"""Steps that methods need to a target by batch size, the noise scale beside it, and what a step costs."""

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import least_squares

import hessian
from benchmarks.training_runs import TASK, TRAINING_EXAMPLES, Case, results
from hessian.colours import BLUE, GREEN, GREY, ORANGE, PINK, SKY, YELLOW
from hessian.processes import joined
from parallel.train_options import Config
from parallel.trainer import Trainer

TARGET, MOST_EPOCHS, LEAST_STEPS = 0.97, 20, 60
BATCHES = (64, 128, 256, 512, 1024)
METHODS: dict[str, dict[str, Any]] = {
    "SGD, linear scaling": {"base_batch": 64},
    "SGD, LEGW": {"base_batch": 64, "batch_scaling": "legw"},
    "LARS": {"optimizer": "lars"},
    "LAMB": {"optimizer": "lamb"},
    "K-FAC": {"optimizer": "kfac"},
    "AdaHessian": {"optimizer": "adahessian", "curvature_passes": 1},
    "rates from curvature": {"layer_rates": "curvature"},
    "ABSA": {"adaptive_batch": "absa", "adversarial_share": 0.5, "largest_batch": 1024, "base_batch": 64},
}
COLOURS = (BLUE, SKY, ORANGE, YELLOW, GREEN, "black", PINK, GREY)
SGD_BATCHES = (16, 32, 64, 128, 256, 512, 1024)
SGD_RATES = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4)


def _case(method: str, seed: int, batch: int, options: dict[str, Any]) -> Case:
    """Constant rate behind the warm-up, in passes of at most 256 examples."""
    steps = max(math.ceil(MOST_EPOCHS * TRAINING_EXAMPLES / batch), LEAST_STEPS)
    own = {"batch_size": batch, "steps": steps, "schedule": "constant", "accumulate": max(1, batch // 256)}
    return Case(method, seed, options | own, TARGET)


def scaling(seeds: Sequence[int], workers: int) -> tuple[str, Figure]:
    """Steps to 97% against the batch, each method as it comes."""
    keys = [(method, batch, seed) for method in METHODS for batch in BATCHES for seed in seeds if _can_start(method, batch)]
    cases = [_case(method, seed, batch, METHODS[method]) for method, batch, seed in keys]
    rows = dict(zip(keys, results(cases, workers), strict=True))
    lines = [f"| method | {' | '.join(f'batch {batch}' for batch in BATCHES)} |", f"|-|{'-:|' * len(BATCHES)}"]
    figure = Figure(figsize=(7.2, 5), layout="constrained")
    axes = figure.subplots()
    for (method, _), colour in zip(METHODS.items(), COLOURS, strict=True):
        cells, points = [], []
        for batch in BATCHES:
            found = [rows[method, batch, seed] for seed in seeds if (method, batch, seed) in rows]
            cells.append(_cell(found))
            if found:
                mean_batch = statistics.median(row["examples"] / row["steps"] for row in found)
                points.append((mean_batch, [row["steps"] if row["reached"] else math.nan for row in found]))
        lines.append(f"| {method} | {' | '.join(cells)} |")
        _curve(axes, points, colour, method)
    first = statistics.median(rows["SGD, linear scaling", BATCHES[0], seed]["steps"] for seed in seeds)
    ideal = [first * BATCHES[0] / batch for batch in BATCHES]
    axes.plot(BATCHES, ideal, color=GREY, linestyle=":", linewidth=1, label="ideal: steps halve as the batch doubles")
    _finish(axes, f"steps to {TARGET:.0%}: median and range of {len(seeds)} seeds")
    lines += [
        "",
        f"Steps to an accuracy of {TARGET:.0%}: median (range) of {len(seeds)} seeds, by evaluation four times an epoch "
        f"or after each step; failures are runs that did not get there in {MOST_EPOCHS} epochs and at least {LEAST_STEPS} "
        "steps, or diverged. Default rates, constant behind a warm-up over 5% of the longest run. ABSA grows from the batch "
        "that is given; the figure has its mean batch, and gaps where a seed failed. AdaHessian takes its curvature of the "
        "first 256 examples of a batch.",
    ]
    return "\n".join(lines), figure


def _can_start(method: str, batch: int) -> bool:
    return method != "ABSA" or batch < max(BATCHES)


def _cell(found: Sequence[dict[str, Any]]) -> str:
    if not found:
        return "-"
    steps = [row["steps"] for row in found if row["reached"]]
    failed = len(found) - len(steps)
    text = f"{statistics.median(steps):.0f} ({min(steps)}-{max(steps)})" if steps else ""
    return f"{text} {failed} failed".strip() if failed else text


def _curve(axes: Axes, points: Sequence[tuple[float, Sequence[float]]], colour: str, label: str) -> None:
    """Broken where a seed failed."""
    points = [(batch, steps if all(map(math.isfinite, steps)) else [math.nan]) for batch, steps in points]
    batches = [batch for batch, _ in points]
    axes.plot(batches, [statistics.median(steps) for _, steps in points], "o-", color=colour, markersize=4, label=label)
    for batch, steps in points:
        axes.plot([batch, batch], [min(steps), max(steps)], color=colour, linewidth=0.8, alpha=0.6)


def _finish(axes: Axes, ylabel: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.set_xlabel("batch size")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def noise(seeds: Sequence[int], workers: int) -> tuple[str, Figure]:
    """The best batch by measured steps, and the one that the noise scale recommends."""
    keys = [(batch, rate, seed) for batch in SGD_BATCHES for rate in SGD_RATES for seed in seeds]
    cases = [_case("SGD", seed, batch, {"learning_rate": rate}) for batch, rate, seed in keys]
    rows = dict(zip(keys, results(cases, workers), strict=True))
    measured = results([_measured(seed) for seed in seeds], workers)
    best: dict[int, float] = {}
    for batch in SGD_BATCHES:
        medians = [_median_steps([rows[batch, rate, seed] for seed in seeds]) for rate in SGD_RATES]
        if math.isfinite(min(medians)):
            best[batch] = min(medians)
    least_steps, least_examples = fitted(best)
    critical = least_examples / least_steps
    recommended = [row["noise_scale"] for row in measured if row["noise_scale"] is not None]
    lines = ["| batch | steps at the best rate | examples | by the fit |", "|-:|-:|-:|-:|"]
    lines += [
        f"| {batch} | {steps:.0f} | {steps * batch:.0f} | {least_steps + least_examples / batch:.0f} |"
        for batch, steps in best.items()
    ]
    each = " ".join(f"{value:.0f}" for value in recommended)
    middle = statistics.median(recommended)
    lines += [
        "",
        f"Steps = S + E / B fits with S = {least_steps:.0f}, E = {least_examples:.0f}: the best batch, of twice the least "
        f"steps and twice the least examples, is E / S = **{critical:.0f}**. Recommended by the gradient noise scale, measured "
        f"every 5 steps on 2 x 64 examples along a run at batch 64 to the target: **{middle:.0f}** (by seed: {each}), "
        f"{middle / critical:.2f} of it.",
    ]
    figure = Figure(figsize=(7.2, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(best), list(best.values()), "o", color=BLUE, label="SGD at its best rate")
    curve = [least_steps + least_examples / batch for batch in SGD_BATCHES]
    axes.plot(SGD_BATCHES, curve, color=BLUE, linewidth=1, label="S + E / B")
    axes.axvline(critical, color=GREY, linestyle=":", label=f"E / S = {critical:.0f}")
    axes.axvline(middle, color=ORANGE, linestyle="--", label=f"noise scale: {middle:.0f}")
    _finish(axes, f"steps to {TARGET:.0%}: median of {len(seeds)} seeds")
    return "\n".join(lines), figure


def _measured(seed: int) -> Case:
    own = {"adaptive_batch": "noise-scale", "largest_batch": 64, "measure_every": 5, "curvature_examples": 64}
    return _case("SGD, noise scale", seed, 64, own)


def _median_steps(found: Sequence[dict[str, Any]]) -> float:
    return statistics.median(row["steps"] if row["reached"] else math.inf for row in found)


def fitted(steps: dict[int, float]) -> tuple[float, float]:
    """The least steps S and least examples E of steps = S + E / batch (McCandlish et al. 2018, equation 2.11), by least squares
    of logarithms."""
    batches, values = torch.tensor(list(steps)).double(), torch.tensor(list(steps.values())).double()

    def errors(logs: Any) -> Any:
        least, examples = (math.exp(one) for one in logs)
        return (torch.log(least + examples / batches) - values.log()).numpy()

    found = least_squares(errors, [math.log(float(values.min())), math.log(float((values * batches).min()))])
    return math.exp(found.x[0]), math.exp(found.x[1])


def cost(seeds: Sequence[int], workers: int) -> tuple[str, None]:
    """A step's time over SGD's, taken in turn in one process."""
    del seeds, workers
    torch.set_num_threads(1)
    kinds = ("sgd", "adamw", "lars", "lamb", "kfac", "adahessian", "newton-cg")
    batches, rounds = (64, 256), 7
    lines = [f"| optimizer | {' | '.join(f'batch {batch}' for batch in batches)} |", f"|-|{'-:|' * len(batches)}"]
    cells: dict[str, list[str]] = {kind: [] for kind in kinds}
    with joined() as processes:
        for batch in batches:
            seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
            runs = {}
            for kind in kinds:
                task = hessian.load_task(TASK, pretrained=False)
                runs[kind] = Trainer(task, Config(TASK, optimizer=kind, batch_size=batch, steps=10_000), processes).train()
            for number in range(rounds + 1):
                for kind, run in runs.items():
                    steps = 1 if kind == "newton-cg" else 5  # as many as from one of K-FAC's factors to the next
                    started = time.perf_counter()
                    for _ in range(steps):
                        next(run)
                    if number:
                        seconds[kind].append((time.perf_counter() - started) / steps)
            for kind in kinds:
                ratio = statistics.median(one / sgd for one, sgd in zip(seconds[kind], seconds["sgd"], strict=True))
                cells[kind].append(f"{ratio:.2f} ({1000 * statistics.median(seconds[kind]):.0f} ms)")
    lines += [f"| {kind} | {' | '.join(cells[kind])} |" for kind in kinds]
    lines += [
        "",
        "Median of 7 rounds: a step's time over SGD's in the same round. K-FAC finds and inverts its factors every 5 steps.",
    ]
    return "\n".join(lines), None
