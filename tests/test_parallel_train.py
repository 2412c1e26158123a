"""The trainer on several ranks against one process, in float64, and through kills, rollbacks and changes of the world."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import unittest.mock
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import distributed, nn
from torch.distributed import HashStore
from torch.nn import functional as F

import hessian
from hessian.processes import FirstRankError, Processes, joined
from parallel.checkpoint import Checkpoints
from parallel.layouts.batch_norm import globalize
from parallel.layouts.replicated import summed
from parallel.replica import whole
from parallel.run_state import numbers_of, restore, tensors_of
from parallel.train import train
from parallel.train_options import Config
from parallel.trainer import Trainer
from tests.ranks import run_on_ranks
from tests.training_tasks import images, network, small

CONFIGS = {
    "plain": {},
    "weight decay, accumulated": {"accumulate": 2, "weight_decay": 1e-2},
    "augmented": {"mixup": 0.4, "flip": True, "shift": 2},
    "adamw, averaged": {"optimizer": "adamw", "ema": 0.9, "learning_rate": 0.01},
    "sharded": {"shard": True, "optimizer": "adamw", "clip": 0.1, "ema": 0.9},
    "clipped, smooth": {"clip": 0.1, "label_smoothing": 0.1},
    "recomputed": {"checkpoint_activations": True},
}


def trainer(**options):
    processes = Processes(distributed.get_rank(), distributed.get_world_size(), torch.device("cpu"), HashStore(), 0)
    config = Config("small", **{"batch_size": 14, "steps": 6, "evaluate_every": 100} | options)
    return Trainer(small(), config, processes)


def outcome(one, steps=None):
    """Losses, gradient norms and weights after some steps, and the evaluation."""
    rows = []
    for row in one.train():
        rows.append([row["loss"], row["gradient_norm"]])
        if one.step == steps:
            break
    evaluation = one.evaluate()
    state = whole(one.replica.state())
    if one.average is not None:
        state |= {f"average.{name}": tensor for name, tensor in whole(one.average.tensors).items()}
    return (
        torch.tensor(rows, dtype=torch.float64),
        state,
        torch.tensor([evaluation.metric, evaluation.loss], dtype=torch.float64),
    )


def outcomes():
    return {name: outcome(trainer(**options)) for name, options in CONFIGS.items()}


LAID_OUT = {  # on 1 x 2 or 2 x 2 ranks; each is to equal the run of this name
    "model": ({"mesh": "batch={},model=2"}, "plain"),
    "domain": ({"mesh": "batch={},domain=2", "accumulate": 2, "weight_decay": 1e-2}, "weight decay, accumulated"),
    "model, clipped": ({"mesh": "batch={},model=2", "clip": 0.1, "label_smoothing": 0.1}, "clipped, smooth"),
    "domain, augmented": ({"mesh": "batch={},domain=1x2", "mixup": 0.4, "flip": True, "shift": 2}, "augmented"),
    "model, averaged": ({"mesh": "batch={},model=2"} | CONFIGS["adamw, averaged"], "adamw, averaged"),
    "planned": ({"plan": "auto", "beta": 1e-5}, "plain"),
}


def laid_out_outcomes():
    found = {}
    for name, (options, _) in LAID_OUT.items():
        mesh = options.get("mesh", "").format(distributed.get_world_size() // 2) or None
        found[name] = outcome(trainer(**(options | {"mesh": mesh})))
    return found


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.nightly), 4])
def test_layouts_train_as_one_process(one_process, ranks):
    for rank in run_on_ranks(laid_out_outcomes, ranks):
        for name, found in rank.items():
            assert_same(found, one_process[LAID_OUT[name][1]])


def assert_same(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[2], expected[2], rtol=tolerance, atol=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, tensor in found[1].items():
        torch.testing.assert_close(
            tensor, expected[1][name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def one_process():
    with joined():
        return outcomes()


@pytest.mark.parametrize("ranks", [2, 4])
def test_many_ranks_train_as_one_process(one_process, ranks):
    """Batches of 14 (and passes of 7) that do not divide evenly, batch norm, a data set that ends within a batch."""
    for rank in run_on_ranks(outcomes, ranks):
        for name, found in rank.items():
            assert_same(found, one_process[name])


def test_one_process_trains_as_a_plain_loop(one_process):
    """Written with torch alone: the order, cross-entropy's mean, SGD with momentum and the schedule."""
    model = network().train()
    task = small()
    optimizer = torch.optim.SGD(model.parameters(), 1.0, momentum=0.9)
    from parallel.data_order import DataOrder

    order, losses = DataOrder(29, 0), []
    for step in range(6):
        x, y = (torch.stack(parts) for parts in zip(*(task.train[index] for index in order.take(14 * step, 14)), strict=True))
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 0.05 * (1.0 if step == 0 else 0.5 * (1 + math.cos(math.pi * (step - 1) / 5)))
        optimizer.step()
        losses.append(float(loss.detach()))
    rows, state, _ = one_process["plain"]
    torch.testing.assert_close(rows[:, 0], torch.tensor(losses, dtype=torch.float64), rtol=1e-12, atol=0)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-12, atol=1e-14)


def test_passes_in_which_no_target_counts():
    """Every pass has one example, and class 0, a third of them, is ignored."""
    with joined():
        one = trainer(batch_size=6, accumulate=6, steps=4)
        one.task = dataclasses.replace(one.task, loss=nn.CrossEntropyLoss(ignore_index=0))
        one.loss = one._weighing.loss = one.task.loss
        rows = list(one.train())
    assert all(math.isfinite(row["loss"]) and row["gradient_norm"] > 0 for row in rows)


def test_mixup_of_tokens_is_refused():
    config = Config("text-transformer", batch_size=4, steps=1, mixup=0.2)
    with joined() as processes:
        steps = Trainer(hessian.load_task("text-transformer", pretrained=False), config, processes).train()
        with pytest.raises(ValueError, match="--mixup mixes inputs, and these are no floating-point numbers"):
            next(steps)


def test_options_matter(one_process):
    plain = one_process["plain"][0]
    for name in ("augmented", "adamw, averaged", "clipped, smooth"):
        assert not torch.allclose(one_process[name][0], plain, rtol=1e-3)
    torch.testing.assert_close(one_process["recomputed"][0], plain, rtol=1e-12, atol=0)


MESHES = {1: {}, 2: {"mesh": "batch=1,model=2"}, 4: {"mesh": "batch=2,model=2"}}
CONTINUED = {"adamw, averaged": "adamw, averaged", "sharded": "sharded", "laid out": "adamw, averaged"}


def continued(folder, steps):
    """From the newest checkpoints in `folder`, if any, to `steps`, and other checkpoints."""
    found = {}
    for name, config in CONTINUED.items():
        one = trainer(**CONFIGS[config], **(MESHES[distributed.get_world_size()] if name == "laid out" else {}))
        checkpoints = Checkpoints(Path(folder, name), keep=2)
        for step in checkpoints.steps()[:1]:
            restore(one, checkpoints, step)
        found[name] = outcome(one, steps)
        checkpoints.save(one.step, tensors_of(one), numbers_of(one))
        checkpoints.finish()
    return found


def test_checkpoints_go_on_on_any_number_of_ranks(one_process, tmp_path):
    found = [run_on_ranks(continued, 2, str(tmp_path), 2)[-1]]
    with joined():
        found.append(continued(str(tmp_path), 4))
    found.append(run_on_ranks(continued, 4, str(tmp_path), 6)[-1])
    for name, config in CONTINUED.items():
        rows = torch.cat([part[name][0] for part in found])
        assert_same((rows, *found[-1][name][1:]), one_process[config])
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["step-00000004", "step-00000006"]


def moments():
    """Outputs, running moments, gradients and second derivatives of a global batch norm; examples divided 5 and 2."""
    torch.manual_seed(0)
    x = torch.randn(7, 3, 4, dtype=torch.float64)
    norm = nn.BatchNorm1d(3).double()
    start, stop = [(0, 5), (5, 7)][distributed.get_rank()] if distributed.get_world_size() > 1 else (0, 7)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, -1.0]))
    if distributed.get_world_size() > 1:
        globalize(norm, None)
    own = x[start:stop].requires_grad_()
    loss = summed((norm(own) ** 3).sum())
    first = torch.autograd.grad(loss, own, retain_graph=True)[0]
    gradients = torch.autograd.grad(loss, [own, norm.weight], create_graph=True)
    second = torch.autograd.grad((gradients[0] * x[start:stop].detach().cos()).sum(), own)[0]
    return first, gradients[0].detach(), second, norm.running_mean, norm.running_var


def test_global_batch_norm_can_be_differentiated_twice():
    with joined():
        expected = moments()
    found = run_on_ranks(moments, 2)
    for index in range(3):
        torch.testing.assert_close(torch.cat([rank[index] for rank in found]), expected[index], rtol=1e-10, atol=1e-10)
    for index in (3, 4):
        torch.testing.assert_close(found[1][index], expected[index], rtol=1e-12, atol=1e-12)


def test_batch_norms_that_do_more_are_not_replaced():
    class Activated(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    with pytest.raises(ValueError, match=r"'1' is a Activated.*--batch-norm local"):
        globalize(nn.Sequential(nn.Conv2d(1, 2, 1), Activated(2)), None)
    norm, seen = nn.BatchNorm2d(2), []
    norm.register_forward_hook(lambda *_: seen.append(True))
    globalize(norm, None)
    norm.eval()(torch.zeros(1, 2, 1, 1))
    assert seen == [True]


def with_unused():
    one = trainer(**CONFIGS["plain"])
    task = small()
    task.model.spare = nn.Linear(2, 2, bias=False).double()
    nn.init.ones_(task.model.spare.weight)
    task.model.forward = lambda x: nn.Sequential(*list(task.model)[:-1])(x)
    return outcome(Trainer(task, one.config, one.processes), 3)


def test_parameters_that_outputs_do_not_depend_on():
    with joined():
        expected = with_unused()
    for rank in run_on_ranks(with_unused, 2):
        assert_same(rank, expected)


def refused_by_the_first():
    processes = Processes(distributed.get_rank(), distributed.get_world_size(), torch.device("cpu"), HashStore(), 0)
    assert processes.first(distributed.get_rank) == 0
    kind = ValueError if processes.rank == 0 else FirstRankError
    with pytest.raises(kind, match="a reason"):
        processes.first(fail)


def fail():
    raise ValueError("a reason")


def test_errors_of_the_first_rank_are_those_of_all():
    run_on_ranks(refused_by_the_first, 2)


def test_a_loss_that_is_not_finite_rolls_back(tmp_path):
    with joined() as processes:
        config = Config(
            "tests.training_tasks:small", tmp_path, steps=9, batch_size=14, learning_rate=1e300, checkpoint_every=4, warmup=0.9
        )
        with pytest.raises(ArithmeticError, match="5 times after going back to step 0 with half the learning rate"):
            train(config, processes)


def test_a_run_writes_what_it_did_and_resumes(tmp_path):
    with joined() as processes:
        options = {"steps": 5, "batch_size": 14, "checkpoint_every": 2, "ema": 0.5}
        config = Config("tests.training_tasks:with_dropout", tmp_path / "whole", **options)
        report = train(config, processes)
        with pytest.raises(ValueError, match=r"already holds .*add --resume or --force"):
            train(config, processes)
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["examples"] for line in lines] == [14, 28, 42, 56, 70]
    assert all(line.keys() >= {"loss", "learning_rate", "batch_size"} for line in lines)
    assert json.loads((tmp_path / "whole/report.json").read_text()) == report
    task = hessian.load_task("tests.training_tasks:small", tmp_path / "whole/model.safetensors")
    assert float(task.metric(task.model.eval()(images()[0][29:]), images()[1][29:])) == report["evaluation"]["metric"]
    assert "<svg" in (tmp_path / "whole/report.html").read_text()


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "run.json"])
def test_a_damaged_checkpoint_leaves_the_one_before(file, tmp_path, caplog):
    with joined() as processes:
        options = {"batch_size": 14, "checkpoint_every": 2}
        expected = train(Config("tests.training_tasks:small", tmp_path / "whole", steps=6, **options), processes)
        train(
            Config("tests.training_tasks:small", tmp_path / "cut", steps=4, warmup=0.0, schedule="constant", **options),
            processes,
        )
        path = tmp_path / "cut/checkpoints/step-00000004" / file
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
        report = train(Config("tests.training_tasks:small", tmp_path / "cut", steps=6, resume=True, **options), processes)
    assert report["resumed_at"] == 2
    assert "the checkpoint of step 4 is damaged" in caplog.text
    assert report["steps"] == expected["steps"]


def launch(arguments, marker, restarts):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        f"--max-restarts={restarts}",
    ]
    environment = os.environ | {"TROUBLE_MARKER": str(marker), "OMP_NUM_THREADS": "1"}
    command += ["-m", "parallel.train", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def undisturbed(folder):
    processes = Processes(distributed.get_rank(), distributed.get_world_size(), torch.device("cpu"), HashStore(), 0)
    train(Config("tests.training_tasks:with_dropout", folder, steps=16, batch_size=14, checkpoint_every=4), processes)


def test_a_killed_rank_leaves_no_trace(tmp_path):
    """kill -9 of rank 1 in step 10, restarted by torchrun: the losses and the weights are bit for bit those without."""
    options = ["--steps", "16", "--batch-size", "14", "--checkpoint-every", "4"]
    marker = tmp_path / "marker"
    disturbed = launch(["tests.training_tasks:killed_once", "--out", str(tmp_path / "a"), *options, "--json"], marker, 2)
    assert disturbed.returncode == 0, disturbed.stderr
    assert marker.exists()
    report = json.loads(disturbed.stdout)
    assert report["resumed_at"] in (4, 8)
    run_on_ranks(undisturbed, 2, tmp_path / "b")
    one, other = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert (tmp_path / "a/metrics.jsonl").read_text() == (tmp_path / "b/metrics.jsonl").read_text()


@pytest.mark.nightly
def test_a_restart_does_not_resume_what_was_refused(tmp_path):
    """torchrun starts a refused run again; that is no reason to go on with the results of another one."""
    with joined() as processes:
        train(Config("tests.training_tasks:small", tmp_path, steps=2, batch_size=14), processes)
    before = (tmp_path / "metrics.jsonl").read_text()
    result = launch(["tests.training_tasks:small", "--out", str(tmp_path), "--steps", "4", "--batch-size", "14"], tmp_path, 1)
    assert result.returncode != 0
    assert "already holds" in result.stderr
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_an_evaluation_that_is_not_finite_is_null(tmp_path):
    task = dataclasses.replace(small(), metric=lambda *_: torch.tensor(math.nan))
    with joined() as processes, unittest.mock.patch("hessian.load_task", return_value=task):
        report = train(Config("small", tmp_path, steps=1, batch_size=14), processes)
    assert report["evaluation"]["metric"] is None
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["evaluation_metric"] is None


@pytest.mark.nightly
def test_a_hanging_rank_is_named(tmp_path):
    options = ["--out", str(tmp_path / "a"), "--steps", "16", "--batch-size", "14", "--timeout", "3"]
    result = launch(["tests.training_tasks:hanging", *options], tmp_path / "marker", 0)
    assert result.returncode != 0
    assert "error: others wait for rank 1 (" in result.stderr
    assert "stopped in step 9 while loading data" in result.stderr


def differing():
    processes = Processes(distributed.get_rank(), distributed.get_world_size(), torch.device("cpu"), HashStore(), 0)
    with pytest.raises(ValueError, match="rank 1 has seed = 1, rank 0 0: start all ranks alike"):
        processes.agree(Config("x", seed=processes.rank).to_dict())
    return True


def test_ranks_that_disagree_are_told_the_field():
    assert run_on_ranks(differing, 2) == [True, True]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    with joined() as processes:
        config = Config("tests.training_tasks:small", tmp_path, steps=1, batch_size=14)
        train(config, processes)
        with pytest.raises(ValueError, match="made with --batch-size 14, this run has 7"):
            train(Config("tests.training_tasks:small", tmp_path, steps=2, batch_size=7, resume=True), processes)
        with pytest.raises(ValueError, match=r"is of task .small., this is"):
            train(Config("digits-resnet20", tmp_path, steps=2, batch_size=14, resume=True), processes)


def test_a_folder_that_cannot_be_written_is_noticed_first(tmp_path):
    (tmp_path / "file").write_text("")
    with joined() as processes, pytest.raises(ValueError, match="cannot be written to"):
        train(Config("tests.training_tasks:small", tmp_path / "file", steps=1, batch_size=14), processes)


def test_half_an_environment(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match=r"has RANK but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT: start with"), joined():
        pass
