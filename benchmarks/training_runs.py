"""Training runs for benchmarks: made once each, several at a time, and kept in a file."""

import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import hessian
from hessian.processes import joined
from parallel.batch_size import NoiseScaleBatch
from parallel.train_options import Config
from parallel.trainer import NotFiniteError, Trainer

RESULTS = Path(__file__).parent / "results"
RUNS = RESULTS / "large_batch_runs.jsonl"
TASK, TRAINING_EXAMPLES = "digits-resnet20", 1437


@dataclass(frozen=True)
class Case:
    """One training run; options are those of `parallel.train`. target: the metric at which it ends, evaluated four times an
    epoch, or after each step."""

    method: str
    seed: int
    options: dict[str, Any] = field(default_factory=dict)
    target: float | None = None

    @property
    def key(self) -> str:
        """By which its result is found again."""
        return json.dumps(asdict(self), sort_keys=True)


def trained(case: Case) -> dict[str, Any]:
    """Metric and loss on the evaluation data (0 and None after divergence), steps and examples taken, seconds, the share spent
    on curvature, and what the noise scale was, where it was measured."""
    torch.set_num_threads(1)
    config = Config(TASK, seed=case.seed, **case.options)
    config.check()
    torch.manual_seed(config.seed)
    with joined() as processes:
        trainer = Trainer(hessian.load_task(TASK, pretrained=False), config, processes)
        started = time.perf_counter()
        metric, loss, reached = 0.0, math.nan, False
        try:
            for row in trainer.train():
                every = max(1, round(trainer.size / (4 * row["batch_size"])))
                if case.target is not None and trainer.step % every == 0 and trainer.evaluate().metric >= case.target:
                    reached = True
                    break
            found = trainer.evaluate()
            metric, loss = found.metric, found.loss
        except NotFiniteError:
            pass
        seconds = time.perf_counter() - started
        policy = trainer.control.policy
    return asdict(case) | {
        "metric": metric,
        "loss": loss if math.isfinite(loss) else None,
        "reached": reached,
        "steps": trainer.step,
        "examples": trainer.examples,
        "seconds": round(seconds, 2),
        "curvature_share": round(trainer.control.seconds / seconds, 4),
        "noise_scale": policy.recommended if isinstance(policy, NoiseScaleBatch) and policy.square > 0 else None,
    }


def results(cases: Sequence[Case], workers: int) -> list[dict[str, Any]]:
    """Of all cases, in their order; those that are not on file are run, `workers` at a time, and put there."""
    known = {}
    names = [one.name for one in fields(Case)]
    if RUNS.exists():
        for line in RUNS.read_text().splitlines():
            row = json.loads(line)
            known[Case(**{name: row[name] for name in names if name in row}).key] = row
    missing = list({case.key: case for case in cases if case.key not in known}.values())
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool, RUNS.open("a") as file:
        for case, row in zip(missing, tqdm(pool.map(trained, missing), total=len(missing), unit="run"), strict=True):
            known[case.key] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
    return [known[case.key] for case in cases]
