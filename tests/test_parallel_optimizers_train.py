"""The trainer with LARS, LAMB and AdaHessian on several ranks against one process, in float64, and from checkpoints."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F

import hessian
from hessian.processes import joined
from parallel.checkpoint import Checkpoints
from parallel.data_order import DataOrder, keyed_generator
from parallel.optimizers import AdaHessian
from parallel.run_state import numbers_of, restore, tensors_of
from parallel.train_options import Config
from parallel.trainer import NotFiniteError
from tests.ranks import run_on_ranks
from tests.test_parallel_train import assert_same, outcome, trainer
from tests.training_tasks import network, small

TRAINED = {
    "lars": {"optimizer": "lars", "weight_decay": 0.01},
    "lamb, sharded": {"optimizer": "lamb", "weight_decay": 0.1, "shard": True},
    "lamb, laid out": {"optimizer": "lamb", "weight_decay": 0.1, "mesh": "model"},
    "adahessian": {"optimizer": "adahessian", "checkpoint_activations": True},
    "adahessian, sharded, mixed": {"optimizer": "adahessian", "shard": True, "mixup": 0.4, "label_smoothing": 0.1},
    "adahessian, laid out": {"optimizer": "adahessian", "accumulate": 2, "curvature_every": 2, "mesh": "model"},
    "adahessian, first passes": {"optimizer": "adahessian", "accumulate": 2, "curvature_passes": 1},
    "newton-cg": {"optimizer": "newton-cg", "accumulate": 2},
    "newton-cg, sharded": {"optimizer": "newton-cg", "shard": True},
    "newton-mr, sharded": {"optimizer": "newton-mr", "shard": True, "steps": 1},
    "newton-cg, laid out": {"optimizer": "newton-cg", "mesh": "domain"},
    "adahessian, some ranks without targets": {"optimizer": "adahessian", "batch_size": 4},
}


def prepared(name):
    options, ranks = dict(TRAINED[name]), distributed.get_world_size()
    if "mesh" in options:
        options["mesh"] = None if ranks == 1 else f"batch={ranks // 2},{options['mesh']}=2"
    one = trainer(**{"steps": 4} | options)
    if "without targets" in name:
        one.task = dataclasses.replace(one.task, loss=nn.CrossEntropyLoss(ignore_index=0))
        one.loss = one._weighing.loss = one.task.loss
    return one


def trained():
    return {name: outcome(prepared(name)) for name in TRAINED}


@pytest.fixture(scope="module")
def one_process():
    with joined():
        return trained()


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_many_ranks_train_as_one_process(one_process, ranks):
    """Passes that do not divide evenly, moments of all ranks' examples in the batch norms that the curvature sees."""
    for rank in run_on_ranks(trained, ranks):
        for name, found in rank.items():
            # twenty Lanczos vectors without reorthogonalization magnify rounding
            assert_same(found, one_process[name], 1e-8 if name.startswith("newton-mr") else 1e-10)


def test_the_trainer_shows_the_hessian_of_its_loss(one_process):
    network_, task = network().train(), small()
    optimizer = AdaHessian(network_.named_parameters(), 0.15)
    order, losses = DataOrder(29, 0), []
    with joined():
        rates = [row["learning_rate"] for row in prepared("adahessian").train()]
    for step, rate in enumerate(rates):
        x, y = (torch.stack(parts) for parts in zip(*(task.train[index] for index in order.take(14 * step, 14)), strict=True))
        loss = F.cross_entropy(network_(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.observe(hessian.Hessian(network_, F.cross_entropy, (x, y)), keyed_generator("curvature", 0, step))
        optimizer.step()
        losses.append(float(loss.detach()))
    expected = torch.tensor(losses, dtype=torch.float64)
    torch.testing.assert_close(one_process["adahessian"][0][:, 0], expected, rtol=1e-10, atol=0)


def test_curvature_that_is_not_finite_leaves_the_weights():
    """x^(3/2) has the slope 0 where x = 0, and no curvature."""
    with joined():
        one = trainer(optimizer="adahessian")
        one.loss = lambda outputs, targets: F.cross_entropy(outputs, targets) + (0 * outputs).pow(1.5).mean()
        before = {name: tensor.clone() for name, tensor in one.replica.model.named_parameters()}
        with pytest.raises(NotFiniteError, match=r"the curvature of .0\.weight. is not finite in step 0"):
            next(one.train())
        assert all(torch.equal(tensor, before[name]) for name, tensor in one.replica.model.named_parameters())


def test_curvature_of_more_passes_than_there_are():
    with pytest.raises(ValueError, match="--curvature-passes 3: a step has 2: raise --accumulate"):
        Config("small", accumulate=2, curvature_passes=3).check()


def test_newton_methods_take_whole_steps_of_one_group():
    with pytest.raises(ValueError, match="newton-cg takes loss and curvature of the same passes"):
        Config("small", optimizer="newton-cg", accumulate=2, curvature_passes=1).check()
    with joined(), pytest.raises(ValueError, match="NewtonCG moves all parameters by one step: pass one group"):
        trainer(optimizer="newton-cg", layer_rates="report.json")


RESUMED = ("newton-cg", "lars", "lamb, sharded", "adahessian, laid out", "adahessian, first passes")


def resumed(folder):
    """Whether three steps, a checkpoint and one more are four steps, bit by bit."""
    found = {}
    for name in RESUMED:
        expected = outcome(prepared(name))
        one = prepared(name)
        outcome(one, 3)
        checkpoints = Checkpoints(Path(folder, name))
        checkpoints.save(one.step, tensors_of(one), numbers_of(one))
        checkpoints.finish()
        two = prepared(name)
        restore(two, checkpoints, 3)
        rows, state, evaluation = outcome(two)
        same = [torch.equal(tensor, expected[1][key]) for key, tensor in state.items()]
        found[name] = all(same) and torch.equal(rows, expected[0][3:]) and torch.equal(evaluation, expected[2])
    return found


@pytest.mark.nightly
def test_resumed_runs_go_on_bit_by_bit(tmp_path):
    with joined():
        assert resumed(tmp_path / "one") == dict.fromkeys(RESUMED, True)
    assert run_on_ranks(resumed, 2, tmp_path / "two") == [dict.fromkeys(RESUMED, True)] * 2
