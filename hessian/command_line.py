"""What the command lines share: usage errors of one line, a standard output for the result alone, completion by shells."""

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn, TextIO

from hessian.spelling import did_you_mean

LARGEST_SEED = 2**63 - 1  # and room above it for those of a run's stages: torch takes 64 bits

_OPTION = re.compile(r"--?[A-Za-z][\w-]+")
_PATIENCE = 10.0  # seconds for the first process to speak for all


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors take one line, which names the nearest of what there is.

    Of torchrun's processes the first one says it. Options may be cut short as long as one alone begins so.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, which would complain of what is missing before what there is not: a misspelt option is both."""
        words = sys.argv[1:] if args is None else list(args)
        for word in takewhile(lambda word: word != "--", words):
            name = word.partition("=")[0]
            if _OPTION.fullmatch(name) and not any(known.startswith(name) for known in self._option_string_actions):
                self.error(f"there is no option {name}{did_you_mean(name, self._option_string_actions, str)}")
        return super().parse_known_args(words, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            there_are = f"{value!r} is none of {', '.join(action.choices)}"
            raise argparse.ArgumentError(action, there_are + did_you_mean(value, action.choices, str))

    def error(self, message: str) -> NoReturn:
        """End with code 2 and `message`."""
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(_PATIENCE)  # torchrun ends all as soon as one has failed
        who = "" if rank == "0" else f"rank {rank}: "
        said = " ".join(message.removeprefix("argument ").split())
        self.exit(2, f"{who}error: {said}; {self.prog} --help lists the options\n")


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """For an option's `type`: reads a whole number within these bounds."""
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {bounds}")
        return value

    return read


def number(*, above: float = -math.inf, least: float = -math.inf) -> Callable[[str], float]:
    """For an option's `type`: reads a finite number within these bounds."""
    bounds = f"above {above:g}" if least == -math.inf else f"of at least {least:g}"

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (above < value < math.inf and least <= value):
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number {bounds}")
        return value

    return read


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
