"""python -m hawq.quantize under torchrun: tables and traces on several ranks equal those of one process."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed import HashStore

import hawq.stages
from hawq.fold import folded
from hawq.graph import find_layers
from hawq.quantize import main
from hawq.sensitivity import activation_sensitivity, automatic_method, sensitivity
from hawq.sensitivity.hessian import layer_traces
from hawq.stages import Stages
from hessian.processes import Processes
from hessian.split_data import divided
from tests.networks import build, classes
from tests.ranks import run_on_ranks

BITS = (2, 4)
EXAMPLES, BATCH = 21, 8  # the last batch has 5, which no number of ranks here divides
METHODS = ("top-eigenvalue", "q-bert", "kl", "fisher", "second-order", "gauss-newton", "hessian-trace")
STAGES = ["traces", "sensitivity", "activation-sensitivity"]


class Positions(nn.Module):
    """A layer whose output has no row for each example, and 70 outputs, so that labels are drawn for whole batches."""

    def __init__(self):
        super().__init__()
        self.positions, self.head = nn.Embedding(5, 4), nn.Linear(20, 70)

    def forward(self, x):
        return self.head((x + self.positions(torch.arange(5))).tanh().flatten(1))


def drawn():
    """Piecewise linear with 70 outputs: labels are drawn for traces, and the colour images disturbed."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 70))


def problem(name):
    """The folded graph, its layers, and batches; in float64, so that rounding is far below every tolerance."""
    if name in ("drawn", "positions"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = (drawn() if name == "drawn" else Positions()).eval()
            inputs = torch.randn(EXAMPLES, *((3, 6, 6) if name == "drawn" else (5, 4)))
    else:
        model, inputs = build(name, EXAMPLES)
    graph = folded(model, inputs).double()
    targets = classes(graph(inputs.double()).shape[1], EXAMPLES)
    targets[3] = -100  # ignored
    batches = list(zip(inputs.double().split(BATCH), targets.split(BATCH), strict=True))
    return graph, find_layers(graph), batches


def tables(ranks):
    """Every table and report of every network, as JSON."""
    found = {}
    for name in ("in place", "tokens", "drawn", "positions"):
        graph, layers, batches = problem(name)
        objective = divided(graph, nn.CrossEntropyLoss(), batches, ranks)

        def own():
            return torch.Generator().manual_seed(5)

        found[name, "automatic"] = automatic_method(objective, layers)
        found[name, "traces"] = json.loads(layer_traces(objective, layers, generator=own()).to_json())
        for method in ("gauss-newton",) if name == "positions" else METHODS:
            found[name, method] = sensitivity(objective, bits=BITS, method=method, generator=own()).to_dict()
        if name != "positions":
            single = [(x.float(), y) for x, y in batches]  # activations are rounded in float32
            objective = divided(graph.float(), nn.CrossEntropyLoss(), single, ranks)
            found[name, "activations"] = activation_sensitivity(objective, max_probes=8, generator=own()).to_dict()
    found["sum"] = sensitivity(
        divided(graph, nn.CrossEntropyLoss(reduction="sum"), batches, ranks), method="gauss-newton", generator=own()
    ).to_dict()
    return found


def tables_on_ranks():
    return tables(distributed.get_world_size())


def leaves(document, path=()):
    """Every value of nested dicts and lists, by its path."""
    if isinstance(document, dict | list):
        items = document.items() if isinstance(document, dict) else enumerate(document)
        return {key: value for name, part in items for key, value in leaves(part, (*path, name)).items()}
    return {path: document}


@pytest.fixture(scope="module")
def of_one_process():
    return leaves(tables(1))


@pytest.mark.nightly
@pytest.mark.parametrize("ranks", [2, 3])
def test_tables_and_traces_equal_those_of_one_process(of_one_process, ranks):
    """With their standard errors; those that are drawn or sampled from the same numbers."""
    for found in map(leaves, run_on_ranks(tables_on_ranks, ranks)):
        assert found.keys() == of_one_process.keys()
        for path, value in of_one_process.items():
            rtol = 1e-4 if "activations" in path[0] else 1e-7
            assert found[path] == (pytest.approx(value, rel=rtol, abs=1e-14) if isinstance(value, float) else value), path


def test_the_networks_take_every_path(of_one_process):
    """Else the test above would show less than it seems to."""
    assert of_one_process[("in place", "automatic"),] == "second-order"
    assert of_one_process[("drawn", "automatic"),] == "gauss-newton"
    exact = {
        name: {value for path, value in of_one_process.items() if path[0] == (name, "traces") and path[-1] == "exact"}
        for name in ("in place", "tokens", "drawn")
    }
    assert exact == {"in place": {True}, "tokens": {True, False}, "drawn": {False}}
    for name in ("drawn", "positions"):
        errors = [value for path, value in of_one_process.items() if path[:2] == ((name, "gauss-newton"), "stderr")]
        assert errors
        assert all(0 < error < math.inf for error in errors)


def bad_target():
    graph, _, batches = problem("in place")
    batches[-1][1][-1] = 9
    objective = divided(graph, nn.CrossEntropyLoss(), batches, distributed.get_world_size())
    found = []
    for method in ("second-order", "fisher"):
        try:
            sensitivity(objective, method=method)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_errors_reach_every_rank():
    first, last = run_on_ranks(bad_target, 2)
    assert last[0].startswith("DataMismatchError: target 9 is out of range")
    assert first[0].startswith("RuntimeError: rank 1 failed: target 9 is out of range")
    assert len(first) == len(last) == 2


def staged(folder):
    rank = distributed.get_rank()
    processes = Processes(rank, distributed.get_world_size(), torch.device("cpu"), HashStore(), 0)
    stages = Stages(folder, processes, resume=False)
    found = [stages.run("one", {}, f"rank {rank}".encode)]
    again = Stages(folder, processes, resume=True)
    found += [again.run("one", {}, lambda: b"anew"), again.reused]

    def full(path, content):
        raise OSError(28, f"No space left on device for {len(content)} bytes", str(path))

    hawq.stages.write_checked = full
    try:
        again.run("two", {}, lambda: b"")
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
    return [*found, again.alone().reused]


def test_stages_are_the_first_ranks(tmp_path):
    first, second = run_on_ranks(staged, 2, tmp_path / "stages")
    assert first[:3] == second[:3] == [b"rank 0", b"rank 0", ["one"]]
    assert first[3].startswith("OSError: [Errno 28] No space left on device")
    assert second[3] == first[3].replace("OSError", "FirstRankError")
    assert first[4] == ["one"]
    assert len(list((tmp_path / "stages").iterdir())) == 1


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "hawq.quantize"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, cwd=folder, timeout=200)


@pytest.mark.nightly
def test_the_command_line_on_two_ranks(folder, monkeypatch):
    """The same widths and metrics as one process, which goes on from the stages that two ranks have kept."""
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "user_networks", raising=False)
    options = ["user_networks:task", "--bits", "4", "8", "--activations", "4", "8", "--max-bops", "0.4", "--force"]
    result = launch(folder, *options, "--out", "two", "--json")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("evaluating the float network") == 1
    assert result.stderr.count("second order: 1batch") == 1
    two = json.loads(result.stdout)
    assert main([*options, "--out", "one"]) == 0
    one = json.loads((folder / "one" / "report.json").read_text())
    for name in ("float", "quantized", "onnx"):
        assert two[name]["metric"] == one[name]["metric"]
        assert two[name]["loss"] == pytest.approx(one[name]["loss"], rel=1e-5)
    bits, same = (json.loads((folder / name / "allocation.json").read_text()) for name in ("one", "two"))
    assert bits["bits"] == same["bits"]
    assert bits["objective"] == pytest.approx(same["objective"], rel=1e-5)
    assert main([*options, "--out", "two", "--resume"]) == 0
    assert json.loads((folder / "two" / "report.json").read_text())["reused_stages"][:3] == STAGES


@pytest.mark.nightly
def test_one_line_for_an_error_of_all_ranks(folder):
    result = launch(folder, "user_networks:task", "--out", "o", "--max-bops", "0.01")
    assert result.returncode != 0
    assert [line.split(":")[:2] for line in result.stderr.splitlines() if "error: " in line] == [["error", " --max-bops 0.01"]]
    assert result.stdout == ""
    assert [path.name for path in (folder / "o").iterdir()] == [".resume"]


@pytest.mark.nightly
def test_a_failure_behind_the_divided_part_is_one_of_the_whole(folder):
    (folder / "o" / "model.onnx").mkdir(parents=True)  # which no file can take the place of
    result = launch(folder, "user_networks:task", "--out", "o", "--force")
    assert result.returncode != 0
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1
    again = launch(folder, "user_networks:task", "--out", "p", "--force", "--resume")
    assert again.returncode == 0
