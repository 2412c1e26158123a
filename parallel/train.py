"""python -m parallel.train TASK, or torchrun ... -m parallel.train TASK: train a network on as many processes as there are."""

import json
import logging
import os
import socket
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TextIO

import safetensors.torch
import torch
from torch import distributed

import hessian
from hessian.command_line import reserve_stdout, write_result
from hessian.files import write_atomically
from hessian.processes import FirstRankError, Processes, RankLostError, joined, leave
from hessian.progress import up_to
from hessian.tables import metric_text
from parallel.checkpoint import Checkpoints, DamagedCheckpointError, check_space
from parallel.metrics import Metrics, without_nan
from parallel.optimizers import KFAC
from parallel.replica import whole
from parallel.run_state import numbers_of, restore, tensors_of
from parallel.train_options import Config, parse
from parallel.train_report import render_html, summary
from parallel.trainer import PHASES, Evaluation, NotFiniteError, Trainer

FORMAT, VERSION = "hessianware-training-report", 1
OUTPUTS = ("metrics.jsonl", "report.json", "report.html", "model.safetensors")

_LAUNCH = ".launch"  # tells which launcher's run the folder holds
_ROLLBACKS = 5  # without a checkpoint's progress between them

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """One run of a trainer, with everything that outlives it in a folder."""

    trainer: Trainer
    checkpoints: Checkpoints
    metrics: Metrics | None  # on rank 0
    rollbacks: list[dict[str, Any]] = field(default_factory=list)
    resumed_at: int | None = None

    @property
    def config(self) -> Config:
        return self.trainer.config

    def train(self) -> Evaluation:
        """Take all steps that are left, whatever happens on the way; the last evaluation."""
        trainer = self.trainer
        evaluation = None
        first = trainer.processes.rank == 0
        with up_to(trainer.steps, "training", "step", initial=trainer.step, progress=first) as bar:
            while not trainer.done:
                try:
                    for row in trainer.train():
                        evaluation = self._after(row)
                        bar.set_postfix(loss=f"{row['loss']:.4g}", refresh=False)
                        bar.update()
                except NotFiniteError as error:
                    self._roll_back(error)
                    bar.n = trainer.step
                    bar.refresh()
        self.checkpoints.finish()
        return evaluation or trainer.evaluate()

    def _after(self, row: dict[str, float]) -> Evaluation | None:
        """Evaluate, note and keep what is due behind a step."""
        trainer, config = self.trainer, self.config
        is_last = trainer.done
        evaluation = None
        if is_last or self._evaluation_is_due(int(row["batch_size"])):
            evaluation = trainer.evaluate()
            row = row | {"evaluation_metric": evaluation.metric, "evaluation_loss": evaluation.loss}
            logger.info(
                "step %d: loss %.4g, evaluation metric %s, loss %.4g",
                trainer.step,
                row["loss"],
                metric_text(evaluation.metric),
                evaluation.loss,
            )
        if self.metrics is not None:
            self.metrics.add(row)
        if is_last or trainer.step % config.checkpoint_every == 0:
            self.save()
        self.checkpoints.poll()
        return evaluation

    def _evaluation_is_due(self, row_size: int) -> bool:
        trainer, every = self.trainer, self.config.evaluate_every
        if every is not None:
            return trainer.step % every == 0
        before = trainer.examples - row_size
        return trainer.examples // trainer.size > before // trainer.size

    def save(self) -> None:
        """Begin a checkpoint of the present state."""
        self.checkpoints.save(
            self.trainer.step, tensors_of(self.trainer), numbers_of(self.trainer) | {"rollbacks": self.rollbacks}
        )

    def _roll_back(self, error: NotFiniteError) -> None:
        """Go back to the newest checkpoint with half the learning rate."""
        trainer = self.trainer
        failed = trainer.step
        self.checkpoints.finish()
        newest = self.checkpoints.steps()[0]
        scale = trainer.rate_scale / 2
        self.rollbacks.append({"step": failed, "back_to": newest, "rate_scale": scale, "reason": str(error)})
        if sum(one["back_to"] == newest for one in self.rollbacks) > _ROLLBACKS:
            raise NotFiniteError(
                f"{error}, {_ROLLBACKS} times after going back to step {newest} with half the learning rate: look for NaN in "
                "the data, or start with a smaller --learning-rate"
            )
        restore(trainer, self.checkpoints, newest)
        trainer.rate_scale = scale
        logger.warning("%s: back to step %d, learning rate times %g from there", error, newest, scale)
        if self.metrics is not None:
            self.metrics.go_back(newest)


def train(config: Config, processes: Processes) -> dict[str, Any]:
    """Train as `config` says and write the results; report.json's content. Collective."""
    started = time.perf_counter()
    config.check()
    processes.agree(config.to_dict() | {"torch": torch.__version__})
    resuming = config.resume or _is_restart(config.out, processes)
    processes.first(lambda: _check_folder(config, resuming))
    torch.manual_seed(config.seed)
    task = hessian.load_task(config.task, config.weights, pretrained=False)
    processes.broadcast(task.model)
    trainer = Trainer(task, config, processes)
    needed = (config.keep + 1) * _state_bytes(trainer)
    processes.first(lambda: _prepare_folder(config.out, needed))
    checkpoints = Checkpoints(config.out / "checkpoints", config.keep)
    run = Run(trainer, checkpoints, None)
    if resuming:
        _resume(run)
    if processes.rank == 0:
        run.metrics = Metrics(config.out, trainer.step)
    if run.resumed_at is None:
        run.save()  # what a NaN in the first steps goes back to
    evaluation = run.train()
    attacked = trainer.evaluate_attacked() if config.attack is not None else None
    state = trainer.replica.state() | ({} if trainer.average is None else trainer.average.tensors)
    weights = whole(state)
    report = {
        "format": FORMAT,
        "version": VERSION,
        "task": task.name,
        "config": config.to_dict(),
        "world_size": processes.world_size,
        "steps": trainer.step,
        "examples": trainer.examples,
        "evaluation": without_nan({"metric": evaluation.metric, "loss": evaluation.loss}),
        "attacked": None if attacked is None else {"attack": config.attack} | asdict(attacked),
        "resumed_at": run.resumed_at,
        "rollbacks": run.rollbacks,
        "seconds": time.perf_counter() - started,
        "curvature_seconds": trainer.control.seconds,
    }
    if processes.rank == 0:
        assert run.metrics is not None
        run.metrics.close()
        _write(config.out, report, run.metrics.rows, weights)
    distributed.barrier()
    return report


def _is_restart(folder: Path, processes: Processes) -> bool:
    """Whether torchrun started this run before, in this folder: a folder that was refused then is refused again."""
    path = folder / _LAUNCH
    return processes.restarts > 0 and processes.first(lambda: path.is_file() and path.read_text() == _launcher())


def _launcher() -> str:
    """The process that started this one, which outlives restarts."""
    return f"{socket.gethostname()} {os.getppid()}"


def _resume(run: Run) -> None:
    """Restore the newest checkpoint that can be read, if there is any."""
    for step in run.checkpoints.steps():
        try:
            restore(run.trainer, run.checkpoints, step)
        except DamagedCheckpointError as error:
            logger.warning("the checkpoint of step %d is damaged, the one before it is taken: %s", step, error)
            continue
        before = run.checkpoints.read_run(step)
        run.resumed_at, run.rollbacks = step, before["rollbacks"]
        now = run.trainer.processes.world_size
        if before["world_size"] != now:
            logger.info("the checkpoint was made by %d ranks, this run has %d: equal to rounding", before["world_size"], now)
        if before["torch"] != torch.__version__:
            logger.warning("the checkpoint was made by torch %s, this is %s", before["torch"], torch.__version__)
        logger.info("resumed at step %d", step)
        return
    logger.info("there is no checkpoint in %s: starting fresh", run.checkpoints.folder)


def _check_folder(config: Config, resuming: bool) -> None:
    present = [name for name in (*OUTPUTS, "checkpoints") if (config.out / name).exists()]
    if present and not resuming and not config.force:
        raise ValueError(
            f"--out {config.out} already holds {', '.join(present)}: add --resume or --force, or name another folder"
        )
    if config.force and not resuming:
        for path in (config.out / "checkpoints").glob("step-*/run.json"):
            path.unlink()  # no checkpoint of the run before counts any more


def _prepare_folder(folder: Path, needed: int) -> None:
    check_space(folder, needed)
    write_atomically(folder / _LAUNCH, _launcher())


def _state_bytes(trainer: Trainer) -> int:
    """What a checkpoint will take: the model's tensors, two for the optimizer, one for an average, K-FAC's factors."""
    copies = 3 + (trainer.average is not None)
    factors = trainer.optimizer.factor_bytes if isinstance(trainer.optimizer, KFAC) else 0
    return factors + copies * sum(tensor.numel() * tensor.element_size() for tensor in trainer.replica.state().values())


def _write(folder: Path, report: dict[str, Any], rows: list[dict[str, Any]], weights: dict[str, torch.Tensor]) -> None:
    write_atomically(folder / "model.safetensors", safetensors.torch.save(weights))
    write_atomically(folder / "report.html", render_html(report, rows))
    write_atomically(folder / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")


def run(config: Config, stdout: TextIO) -> int:
    """Do what `config` says and print the result to `stdout`; the exit code."""
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("parallel").setLevel(logging.INFO if first else logging.ERROR)
    logger.setLevel(logging.INFO if first else logging.ERROR)
    try:
        with joined(config.device, config.timeout) as processes:
            try:
                report = train(config, processes)
            except RuntimeError as error:
                lagging = processes.lagging(PHASES) if processes.world_size > 1 else ""
                if lagging:
                    raise RankLostError(f"others wait for {lagging}") from error
                raise
    except KeyboardInterrupt:
        print(f"\ninterrupted: --resume goes on from the newest checkpoint in {config.out}", file=sys.stderr)
        return 1
    except FirstRankError:
        return 2
    except Exception as error:
        if config.debug:
            traceback.print_exc()
        who = "" if first else f"rank {os.environ['RANK']}: "
        print(f"{who}error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | TypeError | OSError | ImportError) else 1
    if first:
        text = json.dumps(report, indent=1) if config.json else summary(report, config.out)
        write_result(stdout, text + "\n")
    return 0


def command() -> NoReturn:
    """The program, started by its name or by `python -m`."""
    parsed = parse()
    leave(run(parsed, reserve_stdout()))


if __name__ == "__main__":
    command()
