"""The committed notebooks ran top to bottom without a word on stderr, use the public API only, and run again."""

import ast
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import hawq
import hessian
import parallel
import parallel.optimizers

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
LARGEST = 1_000_000  # bytes
SECONDS = 180
PACKAGES = {"hessian": hessian, "hawq": hawq, "parallel": parallel}
PUBLIC_MODULES = {**PACKAGES, "parallel.optimizers": parallel.optimizers}
PATHS = re.compile(r"/(tmp|work|home|root)\b")

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def outputs(path: Path) -> list[Any]:
    return [output for cell in code_cells(path) for output in cell.outputs]


def source(path: Path) -> ast.Module:
    return ast.parse("\n".join(cell.source for cell in code_cells(path)))


def test_there_are_notebooks():
    assert {path.stem[:2] for path in NOTEBOOKS} >= {"01", "02", "03", "04", "05", "07"}


@each
def test_committed_after_one_run_from_top_to_bottom(path: Path):
    nbformat.validate(read(path))
    assert read(path).metadata.kernelspec.name == "python3"
    assert [cell.execution_count for cell in code_cells(path)] == list(range(1, len(code_cells(path)) + 1))
    kinds = {output.output_type for output in outputs(path)}
    assert "error" not in kinds
    assert not [output.text for output in outputs(path) if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs(path)) >= 1


@each
def test_small_and_of_no_machine(path: Path):
    assert path.stat().st_size <= LARGEST
    texts = [cell.source for cell in read(path).cells]
    for output in outputs(path):
        data = {kind: text for kind, text in output.get("data", {}).items() if kind.startswith("text/")}
        texts += [output.get("text", ""), *data.values()]
    assert not [text for text in texts if PATHS.search(text)]


@each
def test_public_names_only(path: Path):
    assert not [problem for node in ast.walk(source(path)) for problem in private_uses(node)]


def private_uses(node: ast.AST) -> list[str]:
    """What a reader of the README would not know of: underscore names, and modules and names that no `__all__` has."""
    if isinstance(node, ast.Attribute):
        name = dotted(node)
        package, _, rest = name.partition(".")
        if node.attr.startswith("_"):
            return [name]
        if package in PACKAGES and rest and "." not in rest and name not in PUBLIC_MODULES:
            return [] if rest in PACKAGES[package].__all__ else [name]
    if isinstance(node, ast.Import):
        own = [alias.name for alias in node.names if alias.name.partition(".")[0] in PACKAGES]
        return [name for name in own if name not in PUBLIC_MODULES]
    if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
        module = PUBLIC_MODULES.get(node.module or "")
        return [f"{node.module}.{alias.name}" for alias in node.names if module is None or alias.name not in module.__all__]
    return []


def dotted(node: ast.expr) -> str:
    """a.b.c of nested attributes; of any other expression the last part alone."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize(
    "text", ["hessian._x", "hawq.fold.folded", "import hawq.fold", "from hessian.report import write", "a()._b"]
)
def test_private_uses_are_seen(text: str):
    assert [problem for node in ast.walk(ast.parse(text)) for problem in private_uses(node)]


@pytest.mark.parametrize(
    "text", ["hessian.landscape.line", "from parallel.optimizers import LARS", "import torch", "a.b(c.d).e"]
)
def test_public_uses_are_allowed(text: str):
    assert not [problem for node in ast.walk(ast.parse(text)) for problem in private_uses(node)]


@pytest.mark.nightly
@each
def test_runs_from_top_to_bottom(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", str(path.parents[1]))  # the kernel starts in another folder
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(read(path), timeout=SECONDS, kernel_name="python3", resources=resources).execute()
