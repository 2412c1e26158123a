"""python -m hawq.quantize: what it writes, what it promises, and how it behaves when things go wrong."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import onnx
import pytest
import safetensors.torch
import torch

import hawq
import hawq.fold
import hessian
from hawq import runtime
from hawq.allocation import Allocation
from hawq.command_line import parse
from hawq.job import Job
from hawq.options import EXTRA_OUTPUTS, OUTPUTS
from hawq.packing import packed_size
from hawq.prediction import sensitivities
from hawq.quantize import main

USER_MODULE = """
import dataclasses, os, sys, time
import torch
from torch import nn
from torch.utils.data import TensorDataset
import hessian

def build(train=None, model=None, loss=None):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 1, 8, 8, generator=generator)
    targets = (inputs.mean((1, 2, 3)) > 0).long()
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    data = TensorDataset(inputs, targets)
    accuracy = lambda o, t: (o.argmax(1) == t).float().mean()
    return hessian.Task(model, train or data, data, loss or nn.CrossEntropyLoss(), accuracy, "small")

def task():
    return build()

def noisy():
    print("noise on standard output")
    return build()

def other_loss():
    return build(loss=nn.CrossEntropyLoss(label_smoothing=0.3))

def nan_data():
    full = build()
    inputs = full.train.tensors[0].clone()
    inputs[5, 0, 0, 0] = float("nan")
    return build(TensorDataset(inputs, full.train.tensors[1]))

def nan_weights():
    task = build()
    with torch.no_grad():
        task.model[0].weight[0, 0, 0, 0] = float("inf")
    return task

def bad_targets():
    full = build()
    return build(TensorDataset(full.train.tensors[0], full.train.tensors[1] + 1))

def nothing_to_quantize():
    return build(model=nn.Sequential(nn.Flatten(), nn.ReLU()))

def unreached():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(64, 2), nn.Linear(3, 3)
        def forward(self, x):
            return self.used(x.flatten(1))
    return build(model=Net())

def regression():
    full = build()
    data = TensorDataset(full.train.tensors[0], full.train.tensors[0].mean((1, 2, 3)))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 1), nn.Flatten(0))
    score = lambda o, t: -(o - t).abs().mean()
    return hessian.Task(model, data, data, nn.MSELoss(), score, "regression")

def without_data():
    class Nothing(torch.utils.data.Dataset):
        def __len__(self):
            return 64
        def __getitem__(self, index):
            if index:  # the first is looked at when a task is loaded
                raise RuntimeError("the training data were read")
            return build().train[0]
    return dataclasses.replace(build(), train=Nothing())

def slow():
    class Slow(torch.utils.data.Dataset):
        def __len__(self):
            return 64
        def __getitem__(self, index):
            if os.environ.get("SLOW"):
                time.sleep(0.03)
            return build_once.train[index]
    return dataclasses.replace(build_once, evaluation=Slow())

build_once = build()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "user_networks.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hawq.quantize", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=300)


@pytest.fixture(scope="module")
def demo(resnet20: hessian.Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The main job: average 4 bits, activations 8."""
    out = tmp_path_factory.mktemp("demo") / "digits-resnet20"
    assert resnet20.name == "digits-resnet20"
    assert main(["digits-resnet20", "--avg-bits", "4", "--out", str(out)]) == 0
    return out


def test_the_demo_keeps_its_promises(demo, resnet20):
    report = json.loads((demo / "report.json").read_text())
    assert report["float"]["metric"] >= 0.99
    assert report["float"]["metric"] - report["quantized"]["metric"] <= 0.005
    assert report["float"]["metric"] - report["onnx"]["metric"] <= 0.005
    assert report["average_bits"] <= 4
    assert report["onnx"]["agreement"] >= 0.995
    assert report["onnx"]["largest_output_difference"] > 0
    assert report["gap"] <= 1e-9
    float_file = safetensors.torch.save(dict(resnet20.model.state_dict()))
    assert len(float_file) / (demo / "model.safetensors").stat().st_size >= 6.5
    codes = sum(packed_size(row["num_params"], row["bits"]) for row in report["layers"])
    assert report["weight_bytes"] == codes
    assert (demo / "model.onnx").stat().st_size <= 1.15 * codes + 60_000
    for name in ("model.safetensors", "model.onnx"):
        assert report["file_bytes"][name] == (demo / name).stat().st_size
    assert report["onnx"]["kernels"]["QLinearConv"] == 21
    assert report["onnx"]["kernels"]["QLinearAdd"] == 9
    assert report["onnx"]["kernels"]["MatMulInteger"] == 1
    assert not {"Conv", "FusedConv", "Gemm", "MatMul"} & set(report["onnx"]["kernels"])
    assert set(report["latency_ms"]["float"]) == {"1_1", "1_32", "2_1", "2_32"}
    assert all(row["exact"] for row in report["layers"])
    assert report["sensitivity"]["method"] == "second-order"
    assert report["stability"]["exact"]
    assert report["audit"]["frontier"]["spearman"] >= 0.8  # above 4 bits the increases are noise
    assert {kernel["layer"] for kernel in report["kernels"] if kernel["layer"]} == {row["name"] for row in report["layers"]}
    assert report["integer_only"]["float_operations"] == {}
    assert report["not_measured"] == {}


def test_the_onnx_file_is_standard(demo):
    model = onnx.load(demo / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [(item.domain, item.version) for item in model.opset_import] == [("", 21)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert Counter(node.op_type for node in model.graph.node)["BitwiseAnd"] == 20  # conv1 and fc have 8 bits


def test_the_packed_file_gives_the_same_logits_in_a_new_process(demo, resnet20, tmp_path):
    images = resnet20.evaluation.tensors[0][:32]
    expected = hawq.load(demo, resnet20.model)(images).detach()
    torch.save(images, tmp_path / "images.pt")
    program = (
        "import sys, torch, hawq, hessian\n"
        "task = hessian.load_task('digits-resnet20')\n"
        "torch.save(hawq.load(sys.argv[1], task.model)(torch.load(sys.argv[2])).detach(), sys.argv[3])\n"
    )
    paths = [str(demo), str(tmp_path / "images.pt"), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", program, *paths], check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_the_reported_metrics_are_those_of_the_files(demo, resnet20):
    report = json.loads((demo / "report.json").read_text())
    images, targets = resnet20.evaluation.tensors
    with torch.no_grad():
        outputs = hawq.load(demo, resnet20.model)(images)
        in_runtime = runtime.network((demo / "model.onnx").read_bytes())(images)
    assert report["quantized"]["metric"] == pytest.approx(float(resnet20.metric(outputs, targets)), abs=1e-6)
    assert report["quantized"]["loss"] == pytest.approx(float(resnet20.loss(outputs, targets)), rel=1e-3)
    assert report["onnx"]["metric"] == pytest.approx(float(resnet20.metric(in_runtime, targets)), abs=1e-6)
    allocation = Allocation.load(demo / "allocation.json")
    assert [allocation.bits[row["name"]] for row in report["layers"]] == [row["bits"] for row in report["layers"]]
    assert allocation.activation_bits == 8
    layers = hessian.LayerReport.load(demo / "layers.json")
    for row in report["layers"]:
        assert layers[row["weight"]].trace / row["num_params"] == pytest.approx(row["average_trace"])
    assert report["predicted_increase"] == pytest.approx(allocation.objective / 2)


def test_the_page_is_self_contained(demo):
    page = (demo / "report.html").read_text()
    assert page.count("<svg") == 5
    assert "layer2.0.downsample.0" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "https://" not in page


def test_tampered_and_truncated_files_are_refused(demo, resnet20, tmp_path):
    content = bytearray((demo / "model.safetensors").read_bytes())
    for name, changed, message in (
        ("truncated", content[:-100], "truncated or damaged"),
        ("tampered", bytes(content[:-100]) + bytes([content[-100] ^ 1]) + bytes(content[-99:]), "was changed after"),
        ("foreign", safetensors.torch.save({"a": torch.zeros(3)}), "not a quantized model of version 2"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(changed)
        with pytest.raises(ValueError, match=message):
            hawq.load(tmp_path / name, resnet20.model)
    with pytest.raises(ValueError, match="does not exist"):
        hawq.load(tmp_path, resnet20.model)
    with pytest.raises(ValueError, match="does not belong to this network: it has no layer"):
        hawq.load(demo, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10)))


@pytest.mark.nightly
def test_json_alone_on_standard_output_and_nothing_overwritten(folder):
    first = run("user_networks:noisy", "--out", "o", "--json")
    assert first.returncode == 0, first.stderr
    report = json.loads(first.stdout)
    assert json.loads((folder / "o" / "report.json").read_text()) == report
    assert sorted(path.name for path in (folder / "o").iterdir()) == sorted([".resume", *OUTPUTS])
    assert "noise on standard output" in first.stderr
    before = (folder / "o" / "report.json").read_bytes()
    second = run("user_networks:task", "--out", "o")
    assert second.returncode == 2
    assert "already holds model.safetensors" in second.stderr
    assert "--force" in second.stderr
    assert (folder / "o" / "report.json").read_bytes() == before
    third = run("user_networks:task", "--out", "o", "--force", "--resume", "--avg-bits", "3", "--json")
    report = json.loads(third.stdout)
    assert {"traces", "sensitivity", "float-export", "frontier"} <= set(report["reused_stages"])
    assert "quantization" not in report["reused_stages"]
    changed = run("user_networks:other_loss", "--out", "o", "--force", "--resume", "--avg-bits", "3", "--json")
    assert json.loads(changed.stdout)["reused_stages"] == []


@pytest.mark.nightly
def test_every_budget_is_kept(folder):
    result = run("user_networks:task", "--out", "o", "--json", "--max-size", "4600", "--max-bops", "0.6", "--avg-bits", "6.5")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (folder / "o" / "model.safetensors").stat().st_size <= 4600
    assert report["average_bits"] <= 6.5
    assert set(report["budgets"]) == {"bits of weights", "bytes of weights", "bit operations"}
    operations = sum(row["bits"] * 8 * row["macs"] for row in report["layers"])
    assert operations <= 0.6 * sum(64 * row["macs"] for row in report["layers"])


def test_weights_only_and_other_outputs(folder):
    result = run("user_networks:regression", "--out", "o", "--json", "--activations", "none", "--sensitivity", "weight-error")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["onnx"]["agreement"] is None
    assert report["onnx"]["largest_output_difference"] < 1e-4
    assert report["predicted_increase"] is None
    assert report["activation_bits"] is None
    assert report["float_weights"] == {}
    assert [row["exact"] for row in report["layers"]] == [False, True]
    assert [row["reason"] for row in report["layers"]] == ["Gelu is not linear in it", ""]
    assert (folder / "o" / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("no-such-task",), 2, "unknown task 'no-such-task'"),
        (("user_networks:tusk",), 2, "did you mean 'task'?"),
        (("user_networks:task", "--avg-bits", "1.5", "--bits", "2", "4"), 2, "narrowest width offered is 2"),
        (("user_networks:task", "--avg-bits", "3", "--bits", "4", "8"), 2, "add 3 to --bits"),
        (("user_networks:task", "--max-size", "500"), 2, "--max-size 500: the smallest file has up to"),
        (("user_networks:task", "--max-bops", "0.01"), 2, "--max-bops 0.01: the widths offered need at least 0.25"),
        (("user_networks:task", "--max-bops", "0.5", "--activations", "none"), 2, "float activations count as 32 bits"),
        (("user_networks.py:task",), 2, "name the module, not its file: user_networks:task"),
        (("user_networks:task", "--out", "/proc/nowhere"), 2, "cannot be made"),
        (("user_networks:task", "--max-bops", "inf"), 2, "positive fraction"),
        (("user_networks:task", "--bits", "1"), 2, "widths are whole numbers from 2 to 8"),
        (("user_networks:task", "--activations", "4"), 2, "activations take 8 bits"),
        (("user_networks:task", "--activations", "8", "none"), 2, "none leaves all activations in float"),
        (("user_networks:task", "--activations", "4", "8", "--sensitivity", "q-bert"), 2, "cannot be compared"),
        (("user_networks:task", "--max-drop", "-1"), 2, "how far the metric may fall"),
        (("user_networks:task", "--finetune-order", "hawq-v1"), 2, "needs --finetune EPOCHS"),
        (("user_networks:task", "--max-latency", "0"), 2, "positive fraction of the seconds"),
        (("user_networks:task", "--out", "user_networks.py"), 2, "is a file, not a folder"),
        (("user_networks:task", "--out", "user_networks.py/deeper"), 2, "is a file, not a folder"),
        (("user_networks:task", "--weights", "missing.pt"), 1, "does not exist"),
        (("user_networks:nan_data",), 1, "holds NaN or Inf, first in its example"),
        (("user_networks:nan_weights",), 1, "weight '0.weight' holds NaN or Inf"),
        (("user_networks:bad_targets",), 1, "target 2 is out of range: the model has 2 outputs"),
        (("user_networks:nothing_to_quantize",), 1, "no quantizable layer"),
        (("user_networks:unreached",), 1, "'spare.weight' is never reached by the data"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_one_clear_line_and_nothing_written(folder, capsys, monkeypatch, arguments, code, message):
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "user_networks", raising=False)
    before = sorted(folder.iterdir())
    out = () if "--out" in arguments else ("--out", "o")
    try:
        found = main([*arguments, *out])
    except SystemExit as exit_:
        found = exit_.code
    errors = capsys.readouterr()
    assert found == code
    assert message in errors.err
    assert errors.out == ""
    assert not any((folder / "o" / name).exists() for name in (*OUTPUTS, ".partial"))
    assert [path for path in sorted(folder.iterdir()) if path.name not in ("o", "__pycache__")] == before


def test_metrics_that_are_no_shares_are_not_shown_in_per_cent(folder):
    result = run("user_networks:regression", "--out", "o", "--bits", "4", "8")
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("metric (torch)")]
    assert "-0." in line
    assert "%" not in line
    assert "points" not in line
    assert "per cent" not in (folder / "o" / "report.html").read_text()


def test_unreached_weights_can_be_dropped_on_purpose(folder):
    assert run("user_networks:unreached", "--out", "o", "--drop-unreached").returncode == 0
    assert (folder / "o" / "model.onnx").is_file()


def test_a_read_only_folder(folder):
    (folder / "o").mkdir()
    (folder / "o").chmod(0o555)
    result = run("user_networks:task", "--out", "o")
    assert result.returncode == 2
    assert "read-only" in result.stderr
    assert list((folder / "o").iterdir()) == []


def test_a_full_disk_is_noticed_first(folder, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "user_networks", raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    assert main(["user_networks:task", "--out", "o"]) == 1
    assert "o has 1,000 bytes free, and this job needs up to" in capsys.readouterr().err


def test_a_disk_that_fills_while_writing(folder, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "user_networks", raising=False)

    def full(path, content):
        raise OSError(28, f"No space left on device for {len(content)} bytes", str(path))

    monkeypatch.setattr("hawq.quantize.write_atomically", full)
    assert main(["user_networks:task", "--out", "o"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in (folder / "o").iterdir()] == [".resume"]
    monkeypatch.undo()
    os.chdir(folder)
    report = json.loads(run("user_networks:task", "--out", "o", "--resume", "--json").stdout)
    assert {"traces", "quantization", "export", "frontier"} <= set(report["reused_stages"])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a run that nobody stops."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "user_networks.py").write_text(USER_MODULE)
    command = [sys.executable, "-m", "hawq.quantize", "user_networks:slow", "--out", "o", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=True)
    assert json.loads(result.stdout)["reused_stages"] == []
    return folder / "o"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_goes_on_where_it_was(folder, uninterrupted, how):
    """Evaluation data are slow: the job is stopped while it works through them after its first stages are done."""
    command = [sys.executable, "-m", "hawq.quantize", "user_networks:slow", "--out", "o"]
    process = subprocess.Popen(command, env=os.environ | {"SLOW": "1"}, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((folder / "o" / ".resume").glob("export-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (1 if how != signal.SIGKILL else -signal.SIGKILL)
    if how != signal.SIGKILL:
        assert "interrupted; finished stages are kept: add --resume" in errors
    assert [path.name for path in (folder / "o").iterdir()] == [".resume"]
    resumed = run("user_networks:slow", "--out", "o", "--resume", "--json")
    assert resumed.returncode == 0, resumed.stderr
    report = json.loads(resumed.stdout)
    assert {"traces", "sensitivity", "quantization", "float-export", "export"} <= set(report["reused_stages"])
    for name in ("model.safetensors", "model.onnx", "allocation.json", "layers.json"):
        assert (folder / "o" / name).read_bytes() == (uninterrupted / name).read_bytes()


@pytest.mark.nightly
def test_a_damaged_stage_is_computed_anew(folder):
    run("user_networks:task", "--out", "o")
    (stage,) = (folder / "o" / ".resume").glob("traces-*")
    content = bytearray(stage.read_bytes())
    content[-3] ^= 1
    stage.write_bytes(content)
    report = json.loads(run("user_networks:task", "--out", "o", "--force", "--resume", "--json").stdout)
    assert "traces" not in report["reused_stages"]
    assert "quantization" in report["reused_stages"]


def test_help_shows_examples_units_and_exit_codes():
    result = run("--help")
    assert result.returncode == 0
    for text in ("examples:", "BYTES", "bits a weight", "exit codes", "--resume"):
        assert text in result.stdout


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


@pytest.mark.parametrize("order", [(), ("--finetune-order", "hawq-v1")])
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
    job = Job.start(options)
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
    assert "all widths run on the same kernels" in capsys.readouterr().err
    report = report_of(folder, monkeypatch, "task", "--max-latency", "1.5", "--avg-bits", "4")
    prediction = report["latency_prediction"]
    assert prediction["network_ms"] == report["latency_ms"]["quantized"]["1_1"]
    assert prediction["layers_ms"] + prediction["other_ms"] == pytest.approx(prediction["network_ms"])
    assert prediction["layers_ms"] == pytest.approx(1e3 * report["budgets"]["seconds of layers"]["used"])
