"""python -m hawq.quantize: what it writes, what it promises, and how it behaves when things go wrong."""

import json
import os
import shutil
import subprocess
import sys
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
from hawq.options import OUTPUTS
from hawq.packing import packed_size
from hawq.quantize import main
from tests.command_line import run


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
    narrow = [bits for bits in hawq.Allocation.load(demo / "allocation.json").bits.values() if bits < 8]
    assert len(narrow) > 10
    assert Counter(node.op_type for node in model.graph.node)["BitwiseAnd"] == len(narrow)


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
        (("user_networks:task", "--avg-bits", "40"), 2, "the widest width offered is 8: --avg-bits 8 leaves all at it"),
        (("user_networks:task", "--avg-bits", "5.5", "--bits", "2", "4"), 2, "the widest width offered is 4: add 6 to --bits"),
        (("user_networks:task", "--avg-bits", "nan"), 2, "--avg-bits nan: give a number of bits a weight"),
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
        (("user_networks:task", "--data-free", "--calibration-size", "1"), 2, "--calibration-size 1: distilled inputs"),
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


@pytest.mark.nightly
def test_metrics_that_are_no_shares_are_not_shown_in_per_cent(folder):
    result = run("user_networks:regression", "--out", "o", "--bits", "4", "8")
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("metric (torch)")]
    assert "-0." in line
    assert "%" not in line
    assert "points" not in line
    assert "per cent" not in (folder / "o" / "report.html").read_text()


@pytest.mark.nightly
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


@pytest.mark.nightly
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


def test_help_shows_examples_units_and_exit_codes():
    result = run("--help")
    assert result.returncode == 0
    for text in ("examples:", "BYTES", "bits a weight", "exit codes", "--resume"):
        assert text in result.stdout
