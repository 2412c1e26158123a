"""python -m hawq.quantize in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

USER_NETWORKS = Path(__file__).with_name("user_networks.py")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hawq.quantize", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=300)
