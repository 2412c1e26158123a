"""What native code prints is discarded inside, and only there."""

import ctypes
import os
import subprocess
import sys

import pytest

from hawq.native_output import native_output_discarded

pytestmark = pytest.mark.skipif(os.name != "posix", reason="C's buffers are flushed on POSIX systems only")

PRINTS = """
import ctypes
from hawq.native_output import native_output_discarded
c = ctypes.CDLL(None)
c.printf(b"before ")
with native_output_discarded():
    c.printf(b"inside ")
c.printf(b"after")
c.fflush(None)
"""


def test_only_what_is_printed_inside_is_lost():
    done = subprocess.run([sys.executable, "-c", PRINTS], capture_output=True, text=True, check=True)
    assert done.stdout == "before after"


def test_an_error_inside_gives_standard_output_back(capfd: pytest.CaptureFixture[str]):
    with pytest.raises(KeyError), native_output_discarded():
        raise KeyError
    ctypes.CDLL(None).puts(b"here")
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == "here\n"


def test_a_process_without_standard_output():
    code = "import os; os.close(1); from hawq.native_output import native_output_discarded as n\nwith n(): pass"
    subprocess.run([sys.executable, "-c", code], check=True, stdin=subprocess.DEVNULL)
