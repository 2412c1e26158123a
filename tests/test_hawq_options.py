"""The options of python -m hawq.quantize, each on a small network of a user."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import hawq
import hawq.fold
import hessian
from hawq.command_line import parse
from hawq.job import Job
from hawq.options import EXTRA_OUTPUTS, OUTPUTS
from hawq.prediction import sensitivities
from hawq.quantize import main
from hessian.doctor import products_are_exact
from hessian.processes import one_process


def report_of(folder: Path, monkeypatch: pytest.MonkeyPatch, task: str, *arguments: str) -> dict:
    """The report of a run in this process, into the folder o."""
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "user_networks", raising=False)
    assert main([f"user_networks:{task}", "--out", "o", "--force", *arguments]) == 0
    return json.loads((folder / "o" / "report.json").read_text())


def test_data_free_reads_no_training_data(folder, monkeypatch):
    arguments = ("--data-free", "--calibration-size", "16", "--bits", "2", "4", "8")
    report = report_of(folder, monkeypatch, "without_data", *arguments)
    assert report["average_bits"] <= 4
    again = report_of(folder, monkeypatch, "without_data", *arguments, "--resume")
    assert {"distillation", "traces", "sensitivity", "quantization"} <= set(again["reused_stages"])
    assert again["quantized"] == report["quantized"]


@pytest.mark.parametrize("order", [(), pytest.param(("--finetune-order", "hawq-v1"), marks=pytest.mark.nightly)])
def test_fine_tuning_trains_at_the_widths_allocated(folder, monkeypatch, order):
    widths = ("--bits", "2", "--avg-bits", "2")
    training = ("--finetune", "1", "--batch-size", "16", *order)
    report_of(folder, monkeypatch, "task", *widths)
    rounded = (folder / "o" / "model.safetensors").read_bytes()
    tuned = report_of(folder, monkeypatch, "task", *widths, *training)
    trained = (folder / "o" / "model.safetensors").read_bytes()
    assert [row["bits"] for row in tuned["layers"]] == [2, 2]
    assert tuned["file_bytes"]["model.safetensors"] == len(trained)
    assert trained != rounded
    again = report_of(folder, monkeypatch, "task", *widths, *training, "--resume")
    assert "fine-tuning" in again["reused_stages"]
    assert again["quantized"] == tuned["quantized"]


def test_the_smallest_file_within_a_drop(folder, monkeypatch):
    report = report_of(folder, monkeypatch, "task", "--max-drop", "0.05")
    threshold = report["float"]["metric"] - 0.05
    assert report["max_drop"]["threshold"] == pytest.approx(threshold)
    assert report["quantized"]["metric"] >= threshold - 1e-9
    trials = report["max_drop"]["trials"]
    assert [trial["kept"] for trial in trials] == [trial["metric"] >= threshold - 1e-9 for trial in trials]
    assert report["weight_bytes"] == min(trial["size"] for trial in trials if trial["kept"])


def test_the_widths_of_single_layers(folder, monkeypatch, capsys):
    report = report_of(folder, monkeypatch, "task", "--layer-bits", "0=7", "4=2,3", "--avg-bits", "8")
    assert {row["name"]: row["bits"] for row in report["layers"]} == {"0": 7, "4": 3}
    monkeypatch.delitem(sys.modules, "user_networks")
    assert main(["user_networks:task", "--out", "p", "--layer-bits", "features.*=8"]) == 2
    assert "'features.*' matches none of the 2 rows, such as 0, 4" in capsys.readouterr().err
    for entry, message in (("0=9", "widths are whole numbers from 2 to 8"), ("0", "is not of the form GLOB=BITS")):
        with pytest.raises(SystemExit):
            main(["user_networks:task", "--out", "p", "--layer-bits", entry])
        assert message in capsys.readouterr().err


def test_a_divergence_predicts_the_loss_as_it_is(folder, monkeypatch):
    report = report_of(folder, monkeypatch, "task", "--sensitivity", "kl")
    assert report["sensitivity"]["method"] == "kl"
    assert report["sensitivity"]["predicts"] == 1.0
    assert report["predicted_increase"] == pytest.approx(sum(row["sensitivity"] for row in report["layers"]))


@pytest.mark.nightly
def test_the_whole_frontier_and_its_audit(folder, monkeypatch):
    monkeypatch.setattr("hawq.measurement._SECONDS", 0)
    skipped = report_of(folder, monkeypatch, "task", "--avg-bits", "3")
    assert set(skipped["not_measured"]) == {"frontier", "single layers"}
    assert all("--pareto measures it" in why for why in skipped["not_measured"].values())
    assert skipped["frontier"] == []
    report = report_of(folder, monkeypatch, "task", "--avg-bits", "3", "--pareto")
    assert report["not_measured"] == {}
    averages = [point["average_bits"] for point in report["frontier"]]
    assert len(averages) > 4
    assert averages == sorted(averages)
    assert report["audit"]["frontier"]["measured"] == [point["audited_increase"] for point in report["frontier"]]

    task = hessian.load_task("user_networks:task")
    inputs, targets = task.train.tensors
    folded = hawq.fold.folded(task.model, inputs)
    quantized = hawq.load(folder / "o", task.model)
    with torch.no_grad():
        before = task.loss(folded(inputs), targets)
        layer = quantized.layers()["4"]
        folded.get_parameter("4.weight").copy_(layer.weight())
        folded.get_parameter("4.bias").copy_(layer.real_bias())
        increase = float(task.loss(folded(inputs), targets) - before)
    audit = report["audit"]["layers"]
    assert audit["labels"] == [f"{row['name']} at {row['bits']}" for row in report["layers"]]
    assert audit["measured"][1] == pytest.approx(increase, abs=1e-6)
    assert audit["predicted"] == pytest.approx([row["sensitivity"] / 2 for row in report["layers"]])


def test_formats_of_others(folder, monkeypatch):
    report_of(folder, monkeypatch, "task", "--extra-formats", "--activations", "none")
    assert sorted(path.name for path in (folder / "o").iterdir()) == sorted([".resume", *OUTPUTS, *EXTRA_OUTPUTS])
    task = hessian.load_task("user_networks:task")
    inputs = task.train.tensors[0]
    plain, quantized = hawq.fold.folded(task.model, inputs), hawq.load(folder / "o", task.model)
    plain.load_state_dict(safetensors.torch.load((folder / "o" / "fake_quantized.safetensors").read_bytes()))
    torch.testing.assert_close(plain(inputs), quantized(inputs))
    configuration = json.loads((folder / "o" / "torchao.json").read_text())
    assert configuration["_type"] == "FqnToConfig"
    layers = configuration["_data"]["fqn_to_config"]
    assert {name: layer["_data"]["weight_dtype"]["_data"] for name, layer in layers.items()} == {
        name: f"int{layer.bits}" for name, layer in quantized.layers().items()
    }


@pytest.mark.parametrize("times", [2, 4])
def test_a_loss_that_is_infinite_is_rolled_back(folder, monkeypatch, capsys, times):
    """So many losses in torch come out infinite; three layers at most are raised."""
    evaluate, seen = Job.evaluate, []

    def infinite_at_first(job, network, where):
        seen.append(where)
        result = evaluate(job, network, where)
        return dataclasses.replace(result, loss=math.inf) if len(seen) <= times else result

    monkeypatch.setattr(Job, "evaluate", infinite_at_first)
    if times == 4:
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, "user_networks", raising=False)
        assert main(["user_networks:task", "--out", "o", "--bits", "2", "--avg-bits", "2"]) == 1
        assert "the loss of the quantized network is inf, even after more bits for" in capsys.readouterr().err
        return
    report = report_of(folder, monkeypatch, "task", "--bits", "2", "--avg-bits", "2")
    assert [row["bits"] for row in report["raised_layers"]] in ([8, 8], [8, None])
    assert report["gap"] is None
    raised = {row["layer"] for row in report["raised_layers"]}
    page = (folder / "o" / "report.html").read_text()
    assert all(f"{name} went from" in page for name in raised)


def test_activations_are_allocated_with_weights(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "user_networks", raising=False)
    options = parse(["user_networks:task", "--out", "o", "--activations", "4", "8", "--bits", "4", "8", "--max-bops", "0.4"])
    job = Job.start(options, one_process())
    budgets = job.budgets()
    table = sensitivities(job, job.traces())
    allocation = job.allocate(table, budgets)
    assert set(allocation.layers) == {"0", "4"}
    assert set(allocation.activations.values()) <= {4, 8}
    macs = {name: layer.macs for name, layer in job.layers.items()}
    sources = {"0": next(iter(allocation.activations)), "4": list(allocation.activations)[1]}
    used = sum(bits * allocation.activations[sources[name]] * macs[name] for name, bits in allocation.layers.items())
    assert allocation.budgets["bit operations"].used == pytest.approx(used)
    assert used <= 0.4 * 64 * sum(macs.values())
    assert table.method == "second-order | activation-trace"


def test_a_latency_that_no_width_reaches(folder, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "user_networks", raising=False)
    assert main(["user_networks:task", "--out", "o", "--max-latency", "0.001"]) == 2
    why = "all widths run on the same kernels" if products_are_exact() else "no widths offered are faster"
    assert why in capsys.readouterr().err
    report = report_of(folder, monkeypatch, "task", "--max-latency", "1.5", "--avg-bits", "4")
    prediction = report["latency_prediction"]
    assert prediction["network_ms"] == report["latency_ms"]["quantized"]["1_1"]
    assert prediction["layers_ms"] + prediction["other_ms"] == pytest.approx(prediction["network_ms"])
    assert prediction["layers_ms"] == pytest.approx(1e3 * report["budgets"]["seconds of layers"]["used"])
