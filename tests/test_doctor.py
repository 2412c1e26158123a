"""What the doctor says of this machine, and what all command lines share: usage errors, completion, help."""

import json
import platform
import subprocess

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


@pytest.mark.parametrize(
    ("command", "line", "message"),
    [
        ("hessian", "", "the following arguments are required: TASK"),
        ("hessian", "task --no-landscpe", "there is no option --no-landscpe (did you mean --no-landscape?)"),
        ("hessian", "task --xyzzy=3", "there is no option --xyzzy"),
        ("hessian", "task --batch-size", "--batch-size: expected one argument"),
        ("hessian", "task --seed -1", f"--seed: '-1' is not a whole number from 0 to {2**63 - 1}"),
        ("hessian", "task --probes 1.5", "--probes: '1.5' is not a whole number of at least 1"),
        ("hessian-doctor", "--jsn", "there is no option --jsn (did you mean --json?)"),
        ("hawq-quantize", "task --avgbits 4", "there is no option --avgbits (did you mean --avg-bits?)"),
        ("hawq-quantize", "-avg-bits 4", "there is no option -avg-bits (did you mean --avg-bits?)"),
        ("hawq-quantize", "task other", "unrecognized arguments: other"),
        ("hawq-quantize", "task --max 4", "--max could match --max-size, --max-bops, --max-latency, --max-drop"),
        ("hawq-quantize", "task --rounding GTPQ", "'GTPQ' is none of nearest, gptq, adaround (did you mean gptq?)"),
        ("hawq-quantize", "task --finetune -1", "--finetune: '-1' is not a whole number of at least 0"),
        ("hawq-quantize", "task --group-size 0", "--group-size: '0' is not a whole number of at least 1"),
        ("hawq-quantize", "task --seed text", f"--seed: 'text' is not a whole number from 0 to {2**63 - 1}"),
        ("parallel-plan", "gpt --world-size 0", "--world-size: '0' is not a whole number from 1 to 1000000"),
        ("parallel-plan", "gpt --batch-size -1", "--batch-size: '-1' is not a whole number of at least 1"),
        ("parallel-plan", "gpt --alpha nan", "--alpha: 'nan' is not a finite number of at least 0"),
        ("parallel-plan", "gpt --beta inf", "--beta: 'inf' is not a finite number of at least 0"),
        ("parallel-plan", "gpt --memory 0", "--memory: '0' is not a finite number above 0"),
        ("parallel-plan", "gpt --wordl-size 4", "there is no option --wordl-size (did you mean --world-size?)"),
        ("parallel-train", "task --optimizer adam", "(did you mean adamw?)"),
        ("parallel-train", "task --print-completion fish", "'fish' is none of bash, zsh, tcsh"),
    ],
)
def test_wrong_usage_takes_one_line_that_names_the_nearest(command, line, message, capsys):
    parser = PARSERS[command]()
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(line.split())
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.endswith(f"{message}; {parser.prog} --help lists the options\n")
    assert said.err.count("\n") == 1


def test_options_may_be_cut_short_and_words_behind_two_dashes_are_none():
    assert PARSERS["hawq-quantize"]().parse_args(["task", "--avg", "3"]).avg_bits == 3
    assert PARSERS["hawq-quantize"]().parse_args(["--", "--odd-name"]).task == "--odd-name"


def test_the_first_of_many_processes_has_time_to_speak_for_all(capsys, monkeypatch):
    waited = []
    monkeypatch.setattr("hessian.command_line.time.sleep", waited.append)
    for rank, who in (("0", ""), ("1", "rank 1: ")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            PARSERS["parallel-train"]().parse_args(["--stepps", "3"])
        assert capsys.readouterr().err.startswith(f"{who}error: there is no option --stepps (did you mean --steps?)")
    assert waited == [10.0]


@pytest.mark.parametrize("command", PARSERS)
def test_help_teaches(command):
    parser = PARSERS[command]()
    text = parser.format_help()
    assert parser.prog.startswith("python -m ")
    assert parser.prog in text
    assert "doctor" in command or "examples:" in text
