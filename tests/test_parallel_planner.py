"""The planner against formulas written out, brute force, and networks' published sizes."""

import io
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import parallel
from parallel import AlphaBeta, Grid, LayerShape, best_plans
from parallel.layer_cost import LAYOUTS, memory, obstacle, relayout, traffic
from parallel.measure import fit
from parallel.plan import parse, run
from parallel.planner import assignment

NETWORK = AlphaBeta(2e-6, 1 / 6e9)
CONV = LayerShape(
    "conv", weights=1000, inputs=3 * 20 * 30, outputs=8 * 20 * 30, channels=8, rows_in=20, rows_out=20, kernel_rows=5
)


def seconds(collectives):
    return sum(NETWORK.seconds(one) for one in collectives)


def test_layers_cost_what_the_paper_says():
    """Equations 4, 7 and 8 of Gholami et al. 2018 in bytes: Pr = 4, Pc = 8, B = 32, log2 4 = 2, log2 8 = 3, log2 32 = 5."""
    grid, a, b, group = Grid(4, 8), NETWORK.alpha, 4 * NETWORK.beta, 32 / 8
    weights = 2 * (5 * a + b * 1000 * 31 / 32)
    assert seconds(traffic(CONV, "batch", grid, 32, first=False)) == pytest.approx(weights)
    halo = a + b * group * (3 * 30) * 2
    assert seconds(traffic(CONV, "domain", grid, 32, first=True)) == pytest.approx(halo + weights)
    assert seconds(traffic(CONV, "domain", grid, 32, first=False)) == pytest.approx(2 * halo + weights)
    gather = 2 * a + b * group * 4800 * 3 / 4
    gradients = 2 * (2 * a + b * group * 1800 * 3 / 4)
    shared = 2 * (3 * a + b * 250 * 7 / 8)
    assert seconds(traffic(CONV, "model", grid, 32, first=True)) == pytest.approx(gather + shared)
    assert seconds(traffic(CONV, "model", grid, 32, first=False)) == pytest.approx(gather + gradients + shared)


def test_relayouts_move_activations_and_their_gradients_once():
    grid, a, b = Grid(4, 8), NETWORK.alpha, 4 * NETWORK.beta
    gather = 2 * a + b * 4 * 1800 * 3 / 4
    exchange = 3 * a + b * 1800 * 3 / 4
    for before, after in itertools.product(LAYOUTS, LAYOUTS):
        expected = 0 if before == after else gather if "model" in (before, after) else 2 * exchange
        assert seconds(relayout(before, after, 1800, grid, 32)) == pytest.approx(expected)
        assert relayout(before, after, 1800, Grid(1, 32), 32) == []


def test_obstacles_name_the_layer_and_the_numbers():
    assert obstacle(CONV, "batch", Grid(4, 8), 31) == "a batch of 31 cannot be divided among 32"
    assert obstacle(CONV, "model", Grid(9, 1), 31) == "'conv' has 8 channels for 9 ranks"
    assert obstacle(CONV, "domain", Grid(21, 1), 31) == "'conv' has 20 rows for 21 ranks"
    assert obstacle(CONV, "domain", Grid(11, 1), 31) == "'conv' needs 2 rows of a neighbour that has 1"
    assert [obstacle(CONV, layout, Grid(4, 8), 32) for layout in LAYOUTS] == ["", "", ""]


@st.composite
def networks(draw):
    layers = []
    for index in range(draw(st.integers(1, 4))):
        rows, kernel = draw(st.sampled_from([1, 6, 12])), draw(st.sampled_from([1, 3, 5]))
        channels = draw(st.sampled_from([0, 3, 16, 400]))
        weights = draw(st.sampled_from([0, 10, 10**4, 10**7])) if channels == 0 else draw(st.integers(1, 10**7))
        values = [rows * draw(st.sampled_from([1, 50, 10**4])) for _ in range(2)]
        layers.append(LayerShape(f"layer{index}", weights, *values, channels, rows, rows, kernel))
    return layers


@given(networks(), st.sampled_from([1, 2, 6, 8]), st.integers(1, 20), st.floats(0.1, 1.0))
@settings(max_examples=80, deadline=None)
def test_the_best_plan_is_that_of_brute_force(layers, ranks, batch_size, share):
    grids = [Grid(parts, ranks // parts) for parts in range(1, ranks + 1) if ranks % parts == 0]
    every = [
        assignment(layers, layouts, grid, batch_size, NETWORK)
        for grid in grids
        for layouts in itertools.product(LAYOUTS, repeat=len(layers))
    ]
    able = [one for one in every if not one.obstacles]
    if not able:
        with pytest.raises(ValueError, match="no layout runs"):
            best_plans(layers, ranks, batch_size, NETWORK)
        return
    found = best_plans(layers, ranks, batch_size, NETWORK)
    assert found.best.seconds == pytest.approx(min(one.seconds for one in able), rel=1e-12)
    limit = share * found.best.memory
    fitting = [one.seconds for one in able if one.memory <= limit]
    if fitting:
        limited = best_plans(layers, ranks, batch_size, NETWORK, most_memory=limit).best
        assert limited.memory <= limit * (1 + 1e-12)
        assert limited.seconds == pytest.approx(min(fitting), rel=1e-12)
    else:
        with pytest.raises(ValueError, match="bytes a rank or more"):
            best_plans(layers, ranks, batch_size, NETWORK, most_memory=limit)


def test_integrated_parallelism_pays_for_alexnet():
    plans = best_plans(parallel.alexnet(), 512, 2048, NETWORK)
    assert plans.best.seconds < 0.5 * min(plans.pure_batch.seconds, plans.pure_model.seconds)
    layouts = {layer.name: layer.layout for layer in plans.best.layers}
    assert layouts["conv1"] == "batch"
    assert layouts["fc6"] == layouts["fc7"] == "model"  # most of the weights
    for ranks in (2, 8, 64):
        some = best_plans(parallel.alexnet(), ranks, 2048, NETWORK)
        assert some.best.seconds <= min(some.pure_batch.seconds, some.pure_model.seconds) * (1 + 1e-12)


def test_more_ranks_than_examples_divide_images():
    plans = best_plans(parallel.resnet50(), 4096, 2048, NETWORK)
    assert plans.pure_batch.obstacles == ("a batch of 2048 cannot be divided among 4096",)
    assert not plans.best.obstacles
    assert plans.best.layers[0].layout == "domain"


def test_architectures_have_their_published_sizes():
    assert sum(layer.weights for layer in parallel.alexnet()) == 62_378_344
    assert sum(layer.weights for layer in parallel.resnet50()) == 25_557_032 - 53_120  # torchvision's, less batch norms
    assert sum(layer.weights for layer in parallel.gpt()) == 12 * (12 * 768**2 + 9 * 768)


def test_described_networks_equal_those_written_out():
    model = nn.Sequential(
        nn.Conv2d(3, 96, 11, 4), nn.ReLU(), nn.MaxPool2d(3, 2), nn.BatchNorm2d(96), nn.Flatten(), nn.Linear(96 * 27 * 27, 7)
    )
    model.train()
    conv, pool, norm, linear = parallel.describe(model, torch.zeros(2, 3, 227, 227))
    assert model.training
    expected = parallel.alexnet()
    for found, given_ in ((conv, expected[0]), (pool, expected[1])):
        assert {**vars(found), "name": ""} == {**vars(given_), "name": ""}
    assert (norm.weights, norm.channels, norm.rows_in, norm.kernel_rows) == (192, 0, 27, 1)
    assert (linear.weights, linear.channels, linear.rows_in) == (7 * (96 * 27 * 27 + 1), 7, 1)
    wide = parallel.describe(nn.Conv1d(1, 2, 3, dilation=4), torch.zeros(1, 1, 20))
    assert wide[0].kernel_rows == 9
    with pytest.raises(ValueError, match="no weights"):
        parallel.describe(nn.ReLU(), torch.zeros(1, 3))


def test_memory_counts_weights_three_times_and_the_inputs():
    grid = Grid(4, 8)
    assert memory(CONV, "batch", grid, 32) == 4 * (3 * 1000 + 1 * 1800)
    assert memory(CONV, "model", grid, 32) == 4 * (3 * 250 + 4 * 1800)
    assert memory(CONV, "domain", grid, 32) == 4 * (3 * 1000 + 4 * (450 + 2 * 2 * 90))


def test_alpha_and_beta_are_found_again():
    rows = np.array([[2 * 3.0, 1.75 * size] for size in (256, 4096, 65536, 2**20)])
    found = fit(rows, rows @ [3e-5, 2e-9])
    assert (found.alpha, found.beta) == pytest.approx((3e-5, 2e-9))


def test_bad_input():
    for changes, message in (
        ({"world_size": 0}, "world_size=0"),
        ({"batch_size": -3}, "batch_size=-3"),
        ({"layers": []}, "no layers"),
    ):
        with pytest.raises(ValueError, match=message):
            best_plans(**{"layers": [CONV], "world_size": 2, "batch_size": 2, "network": NETWORK} | changes)
    with pytest.raises(ValueError, match="layer 'x' has rows_in=0"):
        LayerShape("x", 1, 1, 1, rows_in=0)


def command(*arguments, launcher=(sys.executable, "-m")):
    return subprocess.run(
        [*launcher, "parallel.plan", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"LOGLEVEL": "ERROR"},
    )


def test_the_command_line(tmp_path):
    done = command("alexnet", "--world-size", "512", "--batch-size", "2048", "--json", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = best_plans(parallel.alexnet(), 512, 2048, NETWORK)
    for name in ("best", "pure_batch", "pure_model"):
        assert found[name] == json.loads(json.dumps(getattr(expected, name).to_dict()))
        assert set(found[name]["layers"][0]) == {"name", "layout", "seconds", "bytes"}
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "cost.png", "cost.svg", "layouts.png", "layouts.svg"}
    assert json.loads((tmp_path / "plan.json").read_text()) == found


def test_the_command_line_refuses_in_one_line(capsys):
    size = ("--world-size", "4", "--batch-size", "8")
    for arguments, message in (
        (("nothing", *size), "unknown task 'nothing'"),
        (("resnet-50", *size), "networks that need no task: alexnet, resnet50, gpt (did you mean 'resnet50'?)"),
        (("gpt", *size, "--memory", "1e6"), "every plan needs"),
        (("gpt", *size, "--measure"), "torchrun"),
    ):
        assert run(parse(arguments), io.StringIO()) == 2
        found = capsys.readouterr().err
        assert found.startswith("error: ")
        assert message in found
        assert found.count("\n") == 1


def test_measured_among_two_processes():
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    done = command("gpt", "--world-size", "8", "--batch-size", "64", "--measure", "--json", launcher=launcher)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0 < found["alpha"] + found["beta"] < 1
