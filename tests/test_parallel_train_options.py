"""The options of a training run: read from a command line or a file, refused where they cannot be, shown in the report."""

from pathlib import Path

import pytest

from hessian.processes import joined
from parallel.train import train
from parallel.train_options import Config, parse, read_toml
from parallel.train_report import settings
from parallel.trainer import Trainer
from tests.training_tasks import small


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 30}, "--batch-size 30: the training data has 29 examples"),
        ({"batch_size": 0}, "--batch-size 0: give a positive number"),
        ({"accumulate": 3, "batch_size": 14}, "--accumulate 3 does not divide --batch-size 14"),
        ({"momentum": 1.0}, "--momentum 1.0: give a number from 0 to below 1"),
        ({"steps": 1, "epochs": 1.0}, "give one of them"),
        ({"optimizer": "sdg"}, "choose one of sgd, adamw"),
    ],
)
def test_bad_options(options, message, tmp_path):
    with joined() as processes, pytest.raises(ValueError, match=message):
        train(Config("tests.training_tasks:small", tmp_path, **options), processes)


def test_command_line_and_file_say_the_same(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('task = "digits-resnet20"\nbatch-size = 32\nema = 0.9\nflip = true\nepochs = 2\nout = "x"\n')
    config = parse(["--config", str(file), "--batch-size", "16", "--no-flip"])
    assert config == Config("digits-resnet20", Path("x"), batch_size=16, ema=0.9, flip=False, epochs=2.0)
    with pytest.raises(ValueError, match=r"run\.tml' does not exist \(did you mean .*run\.toml'\?\)"):
        read_toml(tmp_path / "run.tml")
    file.write_text("batch-sizes = 3")
    with pytest.raises(ValueError, match=r"there is no option 'batch-sizes' \(did you mean 'batch_size'\?\)"):
        read_toml(file)
    file.write_text('seed = "three"')
    with pytest.raises(ValueError, match="seed = 'three' is not of type int"):
        read_toml(file)


def test_a_report_shows_the_options_that_were_chosen_before_the_others():
    config = Config("any", batch_size=32, learning_rate=0.1, shard=True)
    chosen, defaults = settings(config.to_dict())
    assert chosen == {"--batch-size": "32", "--learning-rate": "0.1", "--shard": "yes"}
    assert (defaults["--epochs"], defaults["--resume"], defaults["--momentum"]) == ("not given", "no", "0.9")
    assert len(chosen) + len(defaults) == len(config.to_dict()) - 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--epochs 0", "--epochs 0.0: give a positive number"),
        ("--steps -1", "--steps -1: give a number of at least 0"),
        ("--steps 1.5", "--steps: invalid int value: '1.5'"),
        ("--learning-rate nan", "--learning-rate nan: give a positive number"),
        ("--seed -1", "--seed -1: give a number of at least 0"),
        (f"--seed {2**63}", f"--seed {2**63}: give a number of at most {2**63 - 1}"),
        ("--timeout 1e30", "--timeout 1e+30: give a number of at most 1000000000.0"),
        ("--beta nan", "--beta nan: give a number of at least 0"),
        ("--steps 1 --epochs 2", "--steps 1 and --epochs 2: give one of them"),
    ],
)
def test_values_that_cannot_be_are_refused_before_ranks_meet(line, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["small", *line.split()])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {message}; python -m parallel.train --help lists the options\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": 6}, r"--shift 6: the images have 6 x 6 pixels: give fewer"),
        ({"curvature_examples": 30}, r"--curvature-examples 30: the training data has 29 examples"),
    ],
)
def test_values_that_the_data_cannot_have(options, message):
    with joined() as processes, pytest.raises(ValueError, match=message):
        next(Trainer(small(), Config("small", batch_size=14, steps=1, **options), processes).train())
