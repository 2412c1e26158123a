"""The code of Markdown pages: blocks of Python to execute, and command lines, of which every option is checked."""

import argparse
import importlib
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser as torchrun_parser

import hawq.command_line
import hessian.report_options
import parallel.plan
import parallel.train_options
from hessian.tasks import BUILT_IN
from parallel.architectures import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[1]

_FENCE = re.compile(r"^(```+|~~~+|:::+)([^\n]*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
_PARSERS: dict[str, Callable[[list[str]], Any]] = {
    "hessian": hessian.report_options.parse,
    "hawq.quantize": hawq.command_line.parse,
    "parallel.plan": parallel.plan.parse,
    "parallel.train": parallel.train_options.parse,
}


class _ParsedError(Exception):
    """A command line was understood, and nothing more shall happen."""


def fences(page: Path) -> Iterator[tuple[str, int, str]]:
    """The language, the first line's number and the text of every fenced block."""
    text = page.read_text()
    for match in _FENCE.finditer(text):
        yield match[2].strip(), text.count("\n", 0, match.start(3)) + 1, match[3]


def blocks(page: Path, language: str) -> list[str]:
    """The texts of all blocks in that language."""
    return [text for name, _, text in fences(page) if name == language]


def execute(page: Path) -> dict[str, Any]:
    """All Python blocks of a page, one after the other; the names that they leave."""
    names: dict[str, Any] = {"__name__": "example"}
    for language, line, text in fences(page):
        if language == "python":
            exec(compile("\n" * (line - 1) + text, str(page), "exec"), names)
    return names


def command_lines(page: Path) -> Iterator[list[str]]:
    """The words of every command in the page's bash blocks."""
    for text in blocks(page, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def check_command(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise AssertionError for a command line that its program would not take; nothing is run."""
    words = [word for position, word in enumerate(words) if position or "=" not in word]  # OMP_NUM_THREADS=1 in front
    match words:
        case ["make", *targets]:
            rules = (ROOT / "Makefile").read_text()
            assert all(re.search(rf"^{re.escape(target)}:", rules, re.MULTILINE) for target in targets), words
        case ["pip", "install", *rest]:
            _check_pip(rest)
        case ["pytest", *files]:
            assert all((ROOT / file).is_file() for file in files), words
        case ["python", "-m", module, *rest]:
            _check_module(module, rest, monkeypatch)
        case ["torchrun", *rest]:
            asked = torchrun_parser().parse_args(rest)
            if asked.module:
                _check_module(asked.training_script, asked.training_script_args, monkeypatch)
            else:
                assert asked.training_script.endswith(".py"), words
        case _:
            raise AssertionError(f"no check is known for the command {shlex.join(words)}")


def _check_module(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        if module in _PARSERS:
            options = _PARSERS[module](arguments)
            if hasattr(options, "check"):
                options.check()
            assert options.task in {*BUILT_IN, *ARCHITECTURES} or ":" in options.task, f"there is no task {options.task}"
        else:
            _parse_in_main(module, arguments, monkeypatch)
    except SystemExit as error:
        raise AssertionError(f"python -m {module} {shlex.join(arguments)}: wrong usage") from error


def _parse_in_main(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """For a program that makes its parser in `main`: stop it as soon as the arguments are parsed."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        parse_args(self, arguments)
        raise _ParsedError

    main = importlib.import_module(module).main
    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        with pytest.raises(_ParsedError):
            main()


def _check_pip(words: list[str]) -> None:
    """That extras and files exist; what packages there are is the index's business."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        if found := re.fullmatch(r"\.\[([\w,-]+)\]", word):
            assert set(found[1].split(",")) <= set(extras), word
        elif word.endswith(".txt"):
            assert (ROOT / word).is_file(), word
