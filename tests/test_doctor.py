"""What the doctor says of this machine, and completion of options in a shell."""

import json
import platform
import subprocess
import sys

import pytest
import torch

import hawq.command_line
import hessian.report_options
import parallel.plan
import parallel.train_options
from hessian import doctor

PARSERS = {
    "hessian": hessian.report_options.parser,
    "hessian-doctor": doctor.parser,
    "hawq-quantize": hawq.command_line.parser,
    "parallel-plan": parallel.plan.parser,
    "parallel-train": parallel.train_options.parser,
}


def test_the_doctor_finds_what_is_here(capsys):
    assert doctor.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["self_test"] is True
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["machine"]["free_memory_bytes"] is None or found["machine"]["free_memory_bytes"] > 2**20
    assert found["extras"]["onnx"]["missing"] == []
    assert set(found["integer_kernels"]) == {"Conv", "MatMul"}
    assert isinstance(found["exact_products"], bool)
    assert all(kernel["on_integers"] and kernel["speedup"] > 0 for kernel in found["integer_kernels"].values())


def test_the_doctor_says_what_saturates(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "products_are_exact", lambda: False)
    doctor.main([])
    assert "session.x64quantprecision=1" in capsys.readouterr().out


def test_the_doctor_says_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda _: None)
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "scipy" else "1")
    monkeypatch.setattr(doctor, "self_test", lambda: False)
    assert doctor.main([]) == 1
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["scipy", "MISSING"] in lines
    assert ["onnx", "onnx, onnxruntime, onnxscript missing (the extra [onnx]): " + doctor.EXTRAS["onnx"][0]] in lines
    assert any(line[0] == "self-test" and line[1].startswith("FAILED") for line in lines)


@pytest.mark.parametrize("command", PARSERS)
def test_a_shell_can_complete_every_option(command, capsys):
    parser = PARSERS[command]()
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--print-completion", "bash"])
    assert ended.value.code == 0
    script = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    options = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    assert set(options) <= set(script.replace("(", " ").replace(")", " ").split())
    function = next(line.split()[-2] for line in script.splitlines() if line.startswith("complete "))
    asked = f"{script}\nCOMP_WORDS=({command} --pri)\nCOMP_CWORD=1\n{function}\necho ${{COMPREPLY[@]}}"
    found = subprocess.run(["bash"], input=asked, text=True, capture_output=True, check=True).stdout
    assert found.strip() == "--print-completion"


@pytest.mark.parametrize("module", ["hessian", "hessian.doctor", "hawq.quantize", "parallel.plan", "parallel.train"])
def test_help_teaches(module):
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    assert f"python -m {module}" in done.stdout
    assert "doctor" in module or "examples:" in done.stdout
