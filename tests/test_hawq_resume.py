"""Interrupted runs of python -m hawq.quantize go on where they were."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command_line import USER_NETWORKS, run


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a run that nobody stops."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    shutil.copy(USER_NETWORKS, folder)
    command = [sys.executable, "-m", "hawq.quantize", "user_networks:slow", "--out", "o", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=True)
    assert json.loads(result.stdout)["reused_stages"] == []
    return folder / "o"


def _heed_interrupts() -> None:
    """A shell that starts the tests in the background has told all its processes to ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    "how", [signal.SIGINT, *(pytest.param(one, marks=pytest.mark.nightly) for one in (signal.SIGTERM, signal.SIGKILL))]
)
def test_an_interrupted_run_goes_on_where_it_was(folder, uninterrupted, how):
    """Evaluation data are slow: the job is stopped while it works through them after its first stages are done."""
    command = [sys.executable, "-m", "hawq.quantize", "user_networks:slow", "--out", "o"]
    process = subprocess.Popen(
        command, env=os.environ | {"SLOW": "1"}, stderr=subprocess.PIPE, text=True, preexec_fn=_heed_interrupts
    )
    deadline = time.monotonic() + 120
    while not list((folder / "o" / ".resume").glob("export-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)  # into the evaluation data
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (1 if how != signal.SIGKILL else -signal.SIGKILL)
    if how != signal.SIGKILL:
        assert "interrupted; finished stages are kept: add --resume" in errors
    assert [path.name for path in (folder / "o").iterdir()] == [".resume"]
    resumed = run("user_networks:slow", "--out", "o", "--resume", "--json")
    assert resumed.returncode == 0, resumed.stderr
    report = json.loads(resumed.stdout)
    assert {"traces", "sensitivity", "quantization", "float-export", "export"} <= set(report["reused_stages"])
    for name in ("model.safetensors", "model.onnx", "allocation.json", "layers.json"):
        assert (folder / "o" / name).read_bytes() == (uninterrupted / name).read_bytes()


@pytest.mark.nightly
def test_a_damaged_stage_is_computed_anew(folder):
    run("user_networks:task", "--out", "o")
    (stage,) = (folder / "o" / ".resume").glob("traces-*")
    content = bytearray(stage.read_bytes())
    content[-3] ^= 1
    stage.write_bytes(content)
    report = json.loads(run("user_networks:task", "--out", "o", "--force", "--resume", "--json").stdout)
    assert "traces" not in report["reused_stages"]
    assert "quantization" in report["reused_stages"]
