"""What the command lines share: standard output belongs to the result, and shells can complete options."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, TextIO


def reserve_stdout() -> TextIO:
    """Standard output for results alone; whatever else prints, native libraries too, is sent to standard error."""
    sys.stdout.flush()
    reserved = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return reserved


def add_completion(parser: argparse.ArgumentParser, command: str) -> None:
    """Give a parser --print-completion SHELL, for the installed program `command`."""
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh", "tcsh"),
        command=command,
        help=f'print what lets a shell complete options; for bash: eval "$({command} --print-completion bash)"',
    )


class _PrintCompletion(argparse.Action):
    def __init__(self, *args: Any, command: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.default, self.command = argparse.SUPPRESS, command

    def __call__(self, parser: argparse.ArgumentParser, _namespace: Any, values: Any, _option: str | None = None) -> None:
        import shtab  # for this option alone

        parser.prog = self.command
        for action in parser._actions:
            if action.type is Path:
                action.complete = shtab.DIR if action.metavar == "DIR" else shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(parser, values))
        parser.exit()


def write_result(stdout: TextIO, text: str) -> None:
    """Print `text`; a reader that has had enough, such as `head`, is no error."""
    try:
        stdout.write(text)
        stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
