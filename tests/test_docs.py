"""The documentation builds without a warning, its links lead somewhere, and all of its code is executed or checked."""

import doctest
import importlib
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import matplotlib as mpl
import pytest
import torch
from torch import distributed

from tests.code_blocks import ROOT, blocks, check_command, command_lines, execute, fences

DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
CHECKED = {"python", "bash", "toml"}  # what is executed, parsed, or given to a command line
SHOWN = {"text"}
MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for package in ("hessian", "hawq", "parallel")
    for file in (ROOT / package).rglob("*.py")
    if ">>> " in file.read_text()
)


def named(pages: list[Path]) -> list:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


@pytest.fixture(autouse=True)
def undisturbed():
    """Figures are drawn into files, and the global random state is left as it was."""
    backend = mpl.get_backend()
    mpl.use("agg")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    mpl.use(backend)


class Page(HTMLParser):
    """The relative links of a page, and the anchors that it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del tag
        for name, value in attrs:
            if name in ("href", "src") and value and not urlsplit(value).scheme and not value.startswith("//"):
                self.links.append(value)
            elif name == "id" and value:
                self.anchors.add(value)


def test_the_site_builds_without_warnings_and_its_links_lead_somewhere(tmp_path: Path):
    pytest.importorskip("sphinx", reason="the docs extra is not installed")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", str(DOCS), str(tmp_path)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    pages = {path: Page(path) for path in tmp_path.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                broken.append(f"{path.name}: {link}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                broken.append(f"{path.name}: {link} (no such anchor)")
    assert not broken


@pytest.mark.parametrize("page", named(PAGES))
def test_every_block_is_checked_or_only_shown(page: Path):
    languages = {language for language, _, _ in fences(page) if not language.startswith("{")}
    assert languages <= CHECKED | SHOWN


@pytest.mark.parametrize("page", named([page for page in PAGES if blocks(page, "python")]))
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    execute(page)
    assert not distributed.is_initialized()


@pytest.mark.parametrize("page", named([page for page in PAGES if blocks(page, "bash")]))
def test_the_commands_of_a_page_are_understood(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for text in blocks(page, "toml"):
        Path("run.toml").write_text(text)
    for words in command_lines(page):
        check_command(words, monkeypatch)


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_a_module_are_right(module: str):
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize("page", named(RESULTS))
def test_every_result_names_its_command_and_is_on_the_site(page: Path, monkeypatch: pytest.MonkeyPatch):
    commands = [line.split("`")[1] for line in page.read_text().splitlines() if "`" in line and "python -m benchmarks" in line]
    assert commands
    for command in commands:
        check_command(command.split(), monkeypatch)
    assert f"results/{page.name}" in (DOCS / "benchmarks.md").read_text()


@pytest.mark.nightly
def test_the_distributed_page_runs_on_two_ranks(tmp_path: Path):
    script = tmp_path / "distributed_curvature.py"
    script.write_text("\n".join(blocks(DOCS / "howto" / "distributed_curvature.md", "python")))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
