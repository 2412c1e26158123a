"""The README's code runs, and its benchmark table is the committed one."""

import json
from pathlib import Path

import pytest

from hawq.quantize import main
from tests.code_blocks import ROOT, blocks, check_command, command_lines

README = ROOT / "README.md"
OWN_TASK, FROM_PYTHON, CURVATURE = blocks(README, "python")


def test_the_readers_own_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "my_tasks.py").write_text(OWN_TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["my_tasks:task", "--avg-bits", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["average_bits"] <= 4
    assert (tmp_path / "out" / "my_tasks-task" / "report.html").is_file()


def test_the_python_example(resnet20, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "example"}
    exec(FROM_PYTHON, names)
    assert (tmp_path / "out" / "small" / "model.onnx").is_file()
    images = resnet20.evaluation.tensors[0]
    small, same = names["small"], names["same"]
    assert callable(small)
    assert callable(same)
    assert bool((small(images) == same(images)).all())


def test_the_curvature_example(resnet20):
    names: dict[str, object] = {"__name__": "example"}
    exec(CURVATURE, names)
    pairs, trace, layers = names["pairs"], names["trace"], names["layers"]
    assert bool(pairs.converged.all())
    assert trace.stderr == 0
    assert trace.value == pytest.approx(sum(row.trace for row in layers.values()), rel=1e-6)
    assert len(layers) == len(list(resnet20.model.parameters()))


def test_the_table_is_the_benchmarks():
    table = (ROOT / "benchmarks" / "results" / "three_bits.md").read_text().split("\n\n")[0]
    assert table in README.read_text()


def test_the_commands_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    commands = list(command_lines(README))
    assert commands
    for words in commands:
        check_command(words, monkeypatch)
