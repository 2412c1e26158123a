"""Batches and rates that follow the curvature: policies by themselves, then the trainer on ranks and from checkpoints."""

import math
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.utils.data import TensorDataset

import hessian
from hessian.processes import joined
from parallel.adversarial import ATTACKS
from parallel.batch_size import ABSA, AdaBatch, GrowingBatch, NoiseScaleBatch
from parallel.checkpoint import Checkpoints
from parallel.layouts.ghost_batch_norm import use_ghosts
from parallel.noise_scale import NoiseScale
from parallel.run_state import numbers_of, restore, tensors_of
from parallel.train_options import Config
from parallel.trainer import Trainer
from tests.ranks import run_on_ranks
from tests.test_parallel_train import assert_same, outcome, trainer
from tests.training_tasks import small


class Measured:
    """Measurements that are known beforehand."""

    def __init__(self, eigenvalues=(), scales=()):
        self.eigenvalues, self.scales = iter(eigenvalues), iter(scales)

    def top_eigenvalue(self):
        return next(self.eigenvalues)

    def noise_scale(self):
        return NoiseScale(next(self.scales), 1.0, 0.0, 1.0, math.inf, math.inf)


def sizes(policy, steps, data, measurements=None, share=lambda _: 1.0):
    """Batch and rate factor of each step, `data` being the examples of an epoch."""
    found, examples = [], 0
    for step in range(steps):
        policy.update(step, examples / data, share(step / steps), measurements or Measured())
        found.append((policy.batch_size, policy.rate_factor))
        examples += policy.batch_size
    return found


def test_adabatch_doubles_by_epochs_up_to_the_largest():
    found = sizes(AdaBatch(10, 40, epochs=1.0), 12, 40)
    assert found == [(10, 1.0)] * 4 + [(20, 1.0)] * 2 + [(40, 1.0)] * 6


def test_growing_batches_take_over_what_the_rate_would_lose():
    policy = GrowingBatch(8, 32)
    shares = [1.0, 0.9, 0.5, 0.4, 0.25, 0.2, 0.1]
    found = sizes(policy, 7, 100, share=lambda done: shares[round(7 * done)])
    assert found == [(8, 1.0), (8, 1.0), (16, 2.0), (16, 2.0), (32, 4.0), (32, 4.0), (32, 4.0)]
    assert [factor * share for (_, factor), share in zip(found, shares, strict=True)][:5] == [1.0, 0.9, 1.0, 0.8, 1.0]


def test_a_batch_follows_the_noise_scale():
    policy = NoiseScaleBatch(10, 80, steps=2)
    found = sizes(policy, 7, 100, Measured(scales=[25.0, 25.0, 95.0]))
    # averages over the parts: 25, 25 and (0.64 x 25 + ... ) with the same weights in both, so the ratio is a mean
    assert [size for size, _ in found] == [10, 10, 20, 20, 20, 20, 40]
    assert found[-1][1] == pytest.approx(2.0)
    assert policy.recommended == pytest.approx((0.16 + 0.128) / 0.488 * 25 + 0.2 / 0.488 * 95)


def test_absa_doubles_when_the_eigenvalue_has_halved_or_after_some_epochs():
    policy = ABSA(10, 160, epochs=3.0, adversarial_share=0.4)
    found = sizes(policy, 16, 40, Measured(eigenvalues=[8.0, 5.0, 4.0, 3.9, 3.8, 3.7, 3.6, 3.5]))
    assert [size for size, _ in found] == [10] * 8 + [20] * 6 + [40] * 2
    assert found[-1][1] == 4.0
    assert policy.adversarial_share == pytest.approx(0.1)


def test_policies_go_on_from_their_state():
    first = ABSA(10, 160, epochs=3.0, adversarial_share=0.4)
    sizes(first, 9, 40, Measured(eigenvalues=[8.0, 5.0, 4.0]))
    later = ABSA(10, 160, epochs=3.0, adversarial_share=0.4)
    later.load(first.state())
    assert vars(later) == vars(first)
    with pytest.raises(ValueError, match="the largest batch, 5, is smaller"):
        AdaBatch(10, 5, 1.0)


RUNS = {
    "rates": {"layer_rates": "curvature", "curvature_examples": 8, "measure_every": 2, "learning_rate": 1.0},
    "rates of adamw": {
        "layer_rates": "curvature",
        "curvature_examples": 8,
        "measure_every": 1,
        "optimizer": "adamw",
        "learning_rate": 0.01,
    },
    "found": {"find_rate": True, "curvature_examples": 9, "sharpness_every": 2},
    "noise": {"adaptive_batch": "noise-scale", "measure_every": 1, "curvature_examples": 10, "batch_size": 7},
    "adabatch": {"adaptive_batch": "adabatch", "doubling_epochs": 0.5, "batch_size": 7, "largest_batch": 28},
    "growing": {"adaptive_batch": "growing", "batch_size": 7, "largest_batch": 28, "steps": 12},
    "absa": {
        "adaptive_batch": "absa",
        "doubling_epochs": 0.7,
        "batch_size": 7,
        "adversarial_share": 0.5,
        "curvature_examples": 8,
        "largest_batch": 14,
    },
}


def train_all():
    found = {}
    for name, options in RUNS.items():
        one = trainer(**options)
        rows = []
        result = outcome(Recording(one, rows))
        found[name] = (result, rows)
    return found


class Recording:
    """A trainer whose rows are kept."""

    def __init__(self, one, rows):
        self.one, self.rows = one, rows

    def __getattr__(self, name):
        return getattr(self.one, name)

    def train(self):
        for row in self.one.train():
            self.rows.append(row)
            yield row


@pytest.fixture(scope="module")
def one_process():
    with joined():
        return train_all()


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_many_ranks_do_as_one_process(one_process, ranks):
    for rank in run_on_ranks(train_all, ranks):
        for name, (result, rows) in rank.items():
            expected, expected_rows = one_process[name]
            torch.testing.assert_close(result[0], expected[0], rtol=1e-7, atol=1e-9, msg=lambda text, name=name: name + text)
            assert [row["batch_size"] for row in rows] == [row["batch_size"] for row in expected_rows]
            for row, other in zip(rows, expected_rows, strict=True):
                assert row == pytest.approx(other, rel=1e-6)


def test_every_example_is_counted(one_process):
    budgets = {"noise": 42, "adabatch": 42, "growing": 84, "absa": 42}
    for name, budget in budgets.items():
        rows = one_process[name][1]
        assert rows[-1]["examples"] == sum(row["batch_size"] for row in rows)
        assert budget <= rows[-1]["examples"] < budget + rows[-1]["batch_size"]
        assert len({row["batch_size"] for row in rows}) > 1, name
    assert [row["batch_size"] for row in one_process["adabatch"][1]] == [7, 7, 7, 14, 28]


def test_rates_and_sharpness(one_process):
    rows = one_process["rates"][1]
    assert 0 < max(row["learning_rate"] for row in rows) < 1.0  # the base rate is beyond what is stable
    found = one_process["found"][1]
    assert [("top_eigenvalue" in row) for row in found] == [False, True] * 3
    assert all(row["top_eigenvalue"] > 0 and row["trace_stderr"] > 0 for row in found[1::2])


def test_the_found_rate_is_that_of_the_first_examples(one_process):
    task = small()
    with joined():
        one = trainer(**RUNS["found"])
        chosen = [task.train[index] for index in one.batches.order.take(0, 9)]
    batch = tuple(torch.stack(column) for column in zip(*chosen, strict=True))
    dense = hessian.Hessian(task.model.train(), nn.CrossEntropyLoss(), batch).to_dense()
    largest = float(torch.linalg.eigvalsh(dense).abs().max())
    stable = 0.5 * 2 * (1 + 0.9) / largest
    found = max(row["learning_rate"] for row in one_process["found"][1])
    assert 0.999 * stable <= found < 1.3 * stable  # few steps of a power iteration find less than the largest


def halves(folder, until):
    found = {}
    for name in ("rates", "absa", "noise"):
        one = trainer(**RUNS[name])
        checkpoints = Checkpoints(Path(folder, name), keep=2)
        for step in checkpoints.steps()[:1]:
            restore(one, checkpoints, step)
        found[name] = outcome(one, until)
        checkpoints.save(one.step, tensors_of(one), numbers_of(one))
        checkpoints.finish()
    return found


def test_runs_go_on_from_checkpoints(one_process, tmp_path):
    with joined():
        first = halves(str(tmp_path), 3)
        second = halves(str(tmp_path), 10**6)
    for name, found in second.items():
        rows = torch.cat([first[name][0], found[0]])
        assert_same((rows, *found[1:]), one_process[name][0])
        assert torch.equal(rows, one_process[name][0][0])


def test_refusals(tmp_path):
    with joined():
        for options, message in (
            ({"adaptive_batch": "adabatch", "largest_batch": 56}, "--largest-batch 56: the training data has 29"),
            ({"layer_rates": "curvature", "optimizer": "lamb"}, "not for LAMB"),
            ({"find_rate": True, "optimizer": "adamw"}, "stable for sgd, not for adamw, before its first step"),
            ({"adversarial_share": 0.5, "shard": True}, "need the whole model on each rank"),
        ):
            with pytest.raises(ValueError, match=message):
                list(trainer(**options).train())
        model = nn.Sequential(nn.Linear(3, 2))
        report = hessian.layer_report(model, nn.CrossEntropyLoss(), (torch.randn(4, 3), torch.arange(4) % 2), eigenvalues=True)
        report.save(tmp_path / "layers.json")
        with pytest.raises(ValueError, match="it is of another network"):
            trainer(layer_rates=str(tmp_path / "layers.json"))
    with pytest.raises(ValueError, match="--adaptive-batch sometimes: choose one of"):
        Config("small", adaptive_batch="sometimes").check()


def test_rates_from_a_report_are_kept(tmp_path):
    task = small()
    batch = tuple(torch.stack(column) for column in zip(*(task.train[index] for index in range(20)), strict=True))
    hessian.layer_report(task.model, task.loss, batch, eigenvalues=True).save(tmp_path / "layers.json")
    with joined():
        one = trainer(layer_rates=str(tmp_path / "layers.json"), learning_rate=0.1, schedule="constant", warmup=0.0)
        next(one.train())
    rates = {group["layer"]: group["lr"] for group in one.optimizer.param_groups}
    assert len(set(rates.values())) > 1
    assert all(0.01 <= rate <= 1.0 for rate in rates.values())
    assert rates == {name: 0.1 * factor for name, factor in one.control.fixed.items()}


def test_a_warm_up_does_not_make_the_batch_grow():
    with joined():
        one = trainer(adaptive_batch="growing", batch_size=7, largest_batch=28, steps=12, warmup=0.5, adversarial_share=0.2)
        sizes_taken = [row["batch_size"] for row in one.train()]
    assert sizes_taken[:6] == [7] * 6
    assert sizes_taken[-1] > 7
    assert one.control.adversarial_share == 0.2


def test_rates_of_adam_are_the_base_rate_until_it_has_a_preconditioner():
    with joined():
        one = trainer(**RUNS["rates of adamw"] | {"schedule": "constant", "warmup": 0.0})
        steps = one.train()
        next(steps)
        assert {group["lr"] for group in one.optimizer.param_groups} == {0.01}
        assert not one.control.layers.is_measured
        next(steps)
    assert one.control.layers.is_measured
    expected = torch.cat([(one.optimizer.state[p]["exp_avg_sq"]).flatten() for p in one.control.parameters.values()])
    assert one.control._preconditioner().shape == expected.shape
    assert len({group["lr"] for group in one.optimizer.param_groups}) > 1


def adversarial():
    return outcome(trainer(adversarial_share=0.3, accumulate=2, steps=3))


def test_the_same_examples_are_attacked_on_any_number_of_ranks():
    with joined():
        expected, plain = adversarial(), outcome(trainer(accumulate=2, steps=3))
    assert not torch.allclose(expected[0], plain[0], rtol=1e-6)
    for rank in run_on_ranks(adversarial, 2):
        assert_same(rank, expected)


def test_going_back_to_the_first_step_forgets_what_was_measured_since(tmp_path):
    with joined():
        one = trainer(layer_rates="curvature", measure_every=1)
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(0, tensors_of(one), numbers_of(one))
        checkpoints.finish()
        expected = outcome(one)
        restore(one, checkpoints, 0)
        assert not one.control.layers.is_measured
        again = outcome(one)
    assert torch.equal(again[0], expected[0])
    assert all(torch.equal(tensor, expected[1][name]) for name, tensor in again[1].items())


def attacked():
    found = {}
    for attack in ATTACKS:
        one = trainer(attack=attack, epsilon=0.1, steps=4, ema=0.5)
        outcome(one, 4)
        clean, under = one.evaluate(), one.evaluate_attacked()
        assert under.metric <= clean.metric
        found[attack] = torch.tensor([under.metric, under.perturbation], dtype=torch.float64)
    return found


def test_evaluation_under_attack_is_the_same_on_any_number_of_ranks():
    with joined():
        expected = attacked()
        with pytest.raises(ValueError, match="need the whole model on each rank: leave out --shard"):
            trainer(attack="pgd", shard=True)
    assert all(0 < float(found[1]) < 1 for found in expected.values())
    assert float(expected["trust-region"][0]) < 0.1
    for rank in run_on_ranks(attacked, 2):
        for attack, found in rank.items():
            torch.testing.assert_close(found, expected[attack], rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (
            torch.ones(8, 3, dtype=torch.int64),
            torch.zeros(8, dtype=torch.int64),
            "the inputs are torch.int64, and attacks move",
        ),
        (torch.ones(8, 3), torch.zeros(8, 2), "targets are no classes: take fgsm or pgd"),
    ],
)
def test_an_attack_that_cannot_be_is_refused_before_the_training(inputs, targets, message):
    data = TensorDataset(inputs, targets)
    task = hessian.Task(nn.Linear(3, 2), data, data, nn.MSELoss(), lambda outputs, _: outputs.mean(), "no images")
    with joined() as processes, pytest.raises(ValueError, match=message):
        Trainer(task, Config("small", attack="trust-region", batch_size=4, steps=1), processes)


def test_a_measurement_needs_an_example_for_each_rank():
    for found in run_on_ranks(few_examples, 4):
        assert found > 0


def ghosts():
    return outcome(trainer(batch_size=16, ghost_batch=4, steps=4))


def test_ghosts_are_the_same_on_any_number_of_ranks():
    with joined():
        expected = ghosts()
        with pytest.raises(ValueError, match="--ghost-batch 5 does not divide the 16 examples"):
            trainer(batch_size=16, ghost_batch=5)
    for ranks in (2, 4):
        for rank in run_on_ranks(ghosts, ranks):
            assert_same(rank, expected)


def test_a_ghost_is_normalised_as_a_batch_by_itself():
    torch.manual_seed(0)
    plain, model = nn.BatchNorm2d(3).double(), nn.Sequential(nn.BatchNorm2d(3).double())
    use_ghosts(model, 4, None)
    x = torch.randn(8, 3, 2, 2, dtype=torch.float64)
    found = model(x)
    torch.testing.assert_close(found, torch.cat([plain(x[:4]), plain(x[4:])]))
    moments = [torch.stack(torch.var_mean(part, (0, 2, 3))) for part in x.split(4)]
    variance, mean = (moments[0] + moments[1]) / 2
    torch.testing.assert_close(model[0].running_mean, 0.1 * mean)
    torch.testing.assert_close(model[0].running_var, 0.9 + 0.1 * variance)
    scale = (0.9 + 0.1 * variance + 1e-5).rsqrt().view(3, 1, 1)
    torch.testing.assert_close(model.eval()(x[:1]), (x[:1] - 0.1 * mean.view(3, 1, 1)) * scale)


def few_examples():
    one = trainer(curvature_examples=1)
    assert distributed.get_world_size() == 4
    return one.top_eigenvalue()
