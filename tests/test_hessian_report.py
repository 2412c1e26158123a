"""python -m hessian: what it writes, against independently computed numbers, and how it behaves when things go wrong."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hessian
from hessian import figures
from hessian.__main__ import PICTURES, main
from hessian.report_options import Options, ProductCost

USER_MODULE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
import hessian

def task(**changes):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(24, 4, generator=generator)
    targets = (inputs.sum(1) > 0).long() + (inputs[:, 0] > 1).long()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    data = TensorDataset(inputs, targets)
    accuracy = lambda o, t: (o.argmax(1) == t).float().mean()
    values = dict(model=model, train=data, evaluation=data, loss=nn.CrossEntropyLoss(), metric=accuracy, name="tiny <task>")
    return hessian.Task(**(values | changes))

def noisy():
    print("noise on standard output")
    return task()

def with_dropout():
    model = task().model
    return task(model=nn.Sequential(model, nn.Dropout(0.5)).train())

def no_mean():
    return task(loss=lambda outputs, targets: nn.functional.cross_entropy(outputs, targets).sqrt())

def nan_data():
    data = task().train
    inputs = data.tensors[0].clone()
    inputs[3, 1] = float("nan")
    return task(train=TensorDataset(inputs, data.tensors[1]))

def broken():
    raise KeyError("surprise")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "user_curves.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "user_curves", raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a run over all 24 examples, and the user's module beside them."""
    folder = tmp_path_factory.mktemp("written")
    (folder / "user_curves.py").write_text(USER_MODULE)
    command = [sys.executable, "-m", "hessian", "user_curves:task", "--examples", "24", "--eigenvalues", "4", "--layers"]
    command += ["--probes", "4", "--steps", "43", "--out", "o", "--json"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(result.stdout) == json.loads((folder / "o" / "report.json").read_text())
    assert "eigenvalues" in result.stderr
    return folder / "o"


@pytest.fixture(scope="module")
def dense(written: Path) -> tuple[torch.Tensor, float, torch.Tensor]:
    """The Hessian by torch.func in double precision, (43, 43), the loss and the gradient."""
    sys.path.insert(0, str(written.parent))
    sys.modules.pop("user_curves", None)
    try:
        task = importlib.import_module("user_curves").task()
    finally:
        sys.path.remove(str(written.parent))
        sys.modules.pop("user_curves", None)
    model = task.model.double()
    inputs, targets = task.train.tensors[0].double(), task.train.tensors[1]
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    start = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])

    def loss(vector: torch.Tensor) -> torch.Tensor:
        pieces = vector.split([shape.numel() for shape in shapes.values()])
        moved = {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
        return task.loss(torch.func.functional_call(model, moved, (inputs,)), targets)

    return torch.func.hessian(loss)(start), float(loss(start)), torch.func.grad(loss)(start)


def test_the_numbers_are_those_of_the_dense_matrix(written, dense):
    matrix, loss, gradient = dense
    report = json.loads((written / "report.json").read_text())
    values = torch.linalg.eigvalsh(matrix).flip(0)
    assert (report["format"], report["version"]) == ("hessianware.curvature-report", 1)
    assert (report["num_params"], report["num_tensors"], report["examples"]) == (43, 4, 24)
    assert report["task"] == "tiny <task>"
    assert report["loss"] == pytest.approx(loss, rel=1e-5)
    assert report["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-4)
    for position, (value, residual) in enumerate(
        zip(report["eigenvalues"]["values"], report["eigenvalues"]["residuals"], strict=True)
    ):
        assert abs(value - float(values[position])) <= residual + 1e-6
    for name, expected in (("largest_eigenvalue", values[0]), ("smallest_eigenvalue", values[-1])):
        assert report[name]["value"] == pytest.approx(float(expected), rel=1e-3)
    assert report["largest_stable_step"] == pytest.approx(2 / float(values[0]), rel=1e-3)
    assert abs(report["trace"]["value"] - float(matrix.trace())) <= 4 * report["trace"]["stderr"] + 1e-5
    assert report["verification"]["ok"]
    share = report["spectrum"]["share_not_positive"]
    assert share["lower"] <= float((values <= 0).double().mean()) <= share["upper"]


def test_each_layer_has_its_own_block(written, dense):
    matrix = dense[0]
    report = json.loads((written / "report.json").read_text())
    start = 0
    for row, size in zip(report["layers"], (20, 5, 15, 3), strict=True):
        block = matrix[start : start + size, start : start + size]
        assert row["num_params"] == size
        assert row["top_eigenvalue"] == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]), rel=1e-3)
        assert abs(row["trace"] - float(block.trace())) <= 5 * row["trace_stderr"] + 1e-5
        start += size


def test_probe_traces_are_unbiased_samples(written, dense):
    spectrum = json.loads((written / "report.json").read_text())["spectrum"]
    samples = np.array(spectrum["probe_traces"])
    moments = 43 * (np.array(spectrum["nodes"]) * np.array(spectrum["weights"])).sum(1)
    assert samples == pytest.approx(moments)
    assert abs(samples.mean() - float(dense[0].trace())) <= 5 * samples.std(ddof=1) / len(samples) ** 0.5


def test_the_landscape_starts_at_the_loss_and_curves_as_the_largest_eigenvalue(written):
    report = json.loads((written / "report.json").read_text())
    line, plane = report["landscape"]["line"], report["landscape"]["plane"]
    middle = len(line["offsets"]) // 2
    assert line["losses"][middle] == pytest.approx(report["loss"], rel=1e-6)
    assert line["curvature"] == pytest.approx(report["largest_eigenvalue"]["value"], rel=1e-4)
    assert plane["examples"] == 24
    centre = len(plane["offsets"]) // 2
    assert plane["losses"][centre][centre] == pytest.approx(report["loss"], rel=1e-6)


def test_the_page_is_self_contained(written):
    page = (written / "report.html").read_text()
    assert page.count("<svg") == page.count("</svg>") == len(PICTURES)
    assert "tiny &lt;task&gt;" in page
    assert "tiny <task>" not in page
    for text in ("largest eigenvalue", "batch invariance", "2.weight", "top eigenvector", "residual / largest eigenvalue"):
        assert text in page
    for namespace in ("http://www.w3.org", "http://purl.org", "http://creativecommons.org"):
        page = page.replace(namespace, "")
    assert "http://" not in page
    assert "https://" not in page
    assert str(written.parent) not in page


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_not_blank(written, name):
    pixels = np.asarray(Image.open(written / f"{name}.png").convert("RGB"))
    assert min(pixels.shape[:2]) > 200
    assert (pixels < 200).any(axis=2).mean() > 0.01  # ink
    assert (pixels > 250).all(axis=2).mean() > 0.1  # paper


def test_output_beside_the_json_goes_to_standard_error(folder):
    command = [sys.executable, "-m", "hessian", "user_curves:noisy", "--examples", "8", "--no-landscape", "--no-layers"]
    command += ["--eigenvalues", "1", "--probes", "1", "--steps", "3", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    report = json.loads(result.stdout)
    assert "noise on standard output" in result.stderr
    assert report["landscape"] == {"line": None, "plane": None}
    assert {row["top_eigenvalue"] for row in report["layers"]} == {None}
    out = folder / "out" / "user_curves-noisy-curvature"
    assert sorted(path.name for path in out.iterdir()) == [
        "convergence.png",
        "layers.png",
        "report.html",
        "report.json",
        "spectrum.png",
    ]


def test_batches_give_the_same_numbers_and_old_figures_go(folder, capsys):
    quick = ["user_curves:task", "--eigenvalues", "2", "--probes", "2", "--steps", "8", "--out", "o"]
    assert main([*quick, "--examples", "20", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert main([*quick, "--examples", "20", "--json", "--batch-size", "7", "--no-landscape"]) == 0
    cut = json.loads(capsys.readouterr().out)
    assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert cut["eigenvalues"]["values"] == pytest.approx(whole["eigenvalues"]["values"], rel=1e-3)
    assert not (folder / "o" / "landscape_line.png").exists()
    assert (folder / "o" / "spectrum.png").exists()


def test_a_failed_check_is_shown(folder, capsys):
    few = ["--eigenvalues", "1", "--probes", "1", "--steps", "2", "--no-landscape", "--no-layers", "--examples", "8"]
    assert main(["user_curves:no_mean", *few, "--out", "o"]) == 0
    assert "check failed: batch invariance" in capsys.readouterr().out
    assert "A check failed" in (folder / "o" / "report.html").read_text()
    assert main(["user_curves:with_dropout", *few, "--out", "e"]) == 0  # in evaluation mode
    assert "all 6 checks passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("no-such-task",), 2, "unknown task 'no-such-task'"),
        (("user_curves:tusk",), 2, "did you mean 'task'?"),
        (("user_curves:task", "--examples", "0"), 2, "--examples: '0' is not a whole number of at least 1"),
        (("user_curves:task", "--batch-size", "-1"), 2, "--batch-size: '-1' is not a whole number"),
        (("user_curves:task", "--eigenvalues", "44"), 2, "--eigenvalues 44: the Hessian has 43"),
        (("user_curves:task", "--out", "user_curves.py"), 2, "is a file, not a folder"),
        (("user_curves:task", "--weights", "missing.pt"), 2, "does not exist"),
        (("user_curves:task", "--device", "nowhere"), 2, "--device nowhere: there is no such device here"),
        (("user_curves:nan_data", "--examples", "24"), 2, "holds NaN or Inf"),
        (("user_curves:broken",), 1, "KeyError: 'surprise' (--debug shows where)"),
        (("user_curves:task", "--steps", "many"), 2, "--steps: 'many' is not a whole number of at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_one_clear_line_and_nothing_written(folder, capsys, arguments, code, message):
    out = () if "--out" in arguments else ("--out", "o")
    try:
        found = main([*arguments, *out])
    except SystemExit as exit_:
        found = exit_.code
    errors = capsys.readouterr()
    assert found == code
    (line,) = [line for line in errors.err.splitlines() if "error: " in line]
    assert message in line
    assert "Traceback" not in errors.err
    assert errors.out == ""
    assert not (folder / "o").exists()


def test_too_much_memory_is_a_users_error(folder, capsys, monkeypatch):
    def full(*_, **__):
        raise MemoryError("a batch of 8 examples needs about 9.0 GiB")

    monkeypatch.setattr(hessian, "verify", full)
    assert main(["user_curves:task", "--out", "o", "--debug"]) == 2
    errors = capsys.readouterr().err
    assert "error: a batch of 8 examples needs about 9.0 GiB" in errors
    assert "Traceback" in errors
    assert not (folder / "o").exists()


def test_slow_products_make_coarser_plans_and_options_stand():
    def plan(seconds: float, **given: int | bool) -> object:
        return Options("task", Path("o"), **given).plan(1000, 10**6, 50, ProductCost(0.0, seconds / 16))

    cheap, slow = plan(1e-5), plan(1.0)
    assert (cheap.examples, cheap.eigenvalues, cheap.probes, cheap.steps) == (256, 10, 8, 60)
    assert cheap.layer_eigenvalues
    assert (slow.examples, slow.layer_eigenvalues) == (8, False)
    given = plan(1.0, examples=100, probes=7, layers=True)
    assert (given.examples, given.probes, given.layer_eigenvalues) == (100, 7, True)
    assert Options("task", Path("o")).plan(20, 3, 2, None).examples == 20
    assert Options("task", Path("o")).plan(20, 3, 2, None).eigenvalues == 3
    cpu, gpu = ProductCost.of(1e9, "cpu"), ProductCost.of(1e9, "cuda:1")
    assert gpu.seconds(128) < cpu.seconds(128) < 2 * cpu.seconds(64)


def test_negative_and_missing_values_have_their_bars():
    def row(trace: float, top: float | None) -> hessian.LayerRow:
        return hessian.LayerRow(trace, 0.5, False, 6, top_eigenvalue=top, residual=None if top is None else 1e-3)

    report = hessian.LayerReport({"a": row(-2.0, 1.0), "b": row(3.0, 0.5), "bias": row(1.0, 0.1)})
    shapes = {"a": (2, 3), "b": (2, 3), "bias": (6,)}
    drawn = figures.layers(report, shapes)
    assert [axes.get_xlabel() for axes in drawn.axes] == ["largest eigenvalue", "trace"]
    hatched = [bar for bar in drawn.axes[1].patches if bar.get_hatch()]
    assert hatched[0].get_width() == 2.0
    without = figures.layers(hessian.LayerReport({"a": row(1.0, None)}), shapes)
    assert [axes.get_xlabel() for axes in without.axes] == ["trace"]
    assert figures.layers(hessian.LayerReport({"bias": row(1.0, 0.1)}), shapes) is None


def test_help_shows_examples_and_exit_codes():
    command = [sys.executable, "-m", "hessian", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=120)
    assert result.returncode == 0
    for text in ("examples:", "exit codes", "--no-landscape", "--no-layer-eigenvalues", "up to 256"):
        assert text in result.stdout
