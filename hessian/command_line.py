"""What the command lines share: standard output belongs to the result."""

import os
import sys
from typing import TextIO


def reserve_stdout() -> TextIO:
    """Standard output for results alone; whatever else prints, native libraries too, is sent to standard error."""
    sys.stdout.flush()
    reserved = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return reserved


def write_result(stdout: TextIO, text: str) -> None:
    """Print `text`; a reader that has had enough, such as `head`, is no error."""
    try:
        stdout.write(text)
        stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
