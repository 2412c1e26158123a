"""The README's code runs, its commands are understood, and its tables are the committed ones."""

import re
from pathlib import Path

import pytest

from tests.code_blocks import ROOT, blocks, check_command, command_lines

PAGE = ROOT / "README.md"
README = PAGE.read_text()
(EXAMPLE,) = blocks(PAGE, "python")
RESULTS = {  # what the table of peers says, and in which file it is
    "0.0001": ("quantizer_peers.md", "| hessianware | 4 | 8 | average | 99.17% | 0.00014 |"),
    "Brevitas GPTQ 0.0047": ("quantizer_peers.md", "| Brevitas, GPTQ | 4 | 8 |  | 99.17% | 0.00468 |"),
    "onnxruntime 0.164": ("quantizer_peers.md", "| onnxruntime, static QDQ | 4 | 8 |  | 94.72% | 0.16396 |"),
    "0.0006": ("quantizer_peers.md", "| hessianware | 3 | 8 | average | 98.89% | 0.00055 |"),
    "Brevitas GPTQ 0.132": ("quantizer_peers.md", "| Brevitas, GPTQ | 3 | 8 |  | 95.83% | 0.13185 |"),
    "5.1 s": ("engine_cpu.md", "| hessianware | 5.10 |"),
    "curvlinops 27 s": ("engine_cpu.md", "| curvlinops + eigsh | 27.18 |"),
    "13 gradients": ("engine_cpu.md", "= 13.2 gradients"),
    "4.5": ("large_batch_tuning.md", "| SGD, rates from curvature | 4.5 ("),
    "SGD 1.0, LAMB 1.0, LARS 2.0": ("large_batch_tuning.md", "| LARS | 2.0 ("),
    "99.6%": ("large_batch_batch.md", "| K-FAC, half adversarial | 28 | 99.56% ("),
    "small batch 98.9% (with these examples 99.2%)": (
        "large_batch_batch.md",
        "| SGD, batch 64, half adversarial | 225 | 99.22% (",
    ),
    "LARS 98.7%": ("large_batch_batch.md", "| LARS | 28 | 98.72% ("),
    "**211** recommended by the noise scale | 126 measured": ("large_batch_noise.md", "E / S = **126**. Recommended"),
    "1.01 to 1.02": ("distributed_overhead.md", "| 32x32 | 2 |"),
    "equal bit for bit": ("distributed_chaos.md", "final weights equal bit for bit: True"),
}


def test_the_python_example(resnet20, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "example"}
    exec(EXAMPLE, names)
    assert (tmp_path / "model.onnx").stat().st_size < 250_000
    assert bool(names["top"].converged.all())
    assert names["allocation"].gap <= 1e-9
    assert len(names["traces"]) == len(list(resnet20.model.parameters()))
    images, targets = resnet20.evaluation.tensors
    assert float((names["small"](images).argmax(1) == targets).double().mean()) > 0.98


def test_commands_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    commands = list(command_lines(PAGE))
    assert len(commands) >= 6
    for words in commands:
        check_command(words, monkeypatch)


@pytest.mark.parametrize("claim", RESULTS)
def test_the_table_of_peers_is_the_benchmarks(claim):
    file, line = RESULTS[claim]
    assert claim in README
    assert line in (ROOT / "benchmarks" / "results" / file).read_text()


def test_the_table_of_widths_is_the_benchmark():
    table = (ROOT / "benchmarks" / "results" / "three_bits.md").read_text().split("\n\n")[0]
    assert table in README


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []
