"""Tasks: the built-in ones, users' own, weights from files, and everything that can be wrong with them."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import hessian
from hessian.tasks import BUILT_IN
from hessian.tasks.cache import cache_folder
from hessian.tasks.digits import digits_resnet20
from hessian.tasks.pretrained import Recipe, pretrained_weights, train_classifier

USER_MODULE = """
import dataclasses
import torch
import hessian
from torch.utils.data import TensorDataset

def task():
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(8, 4, generator=generator), torch.randint(0, 3, (8,), generator=generator))
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    return hessian.Task(model, data, data, torch.nn.CrossEntropyLoss(), lambda o, t: (o.argmax(1) == t).float().mean(), "mine")

def empty():
    nothing = TensorDataset(torch.zeros(0, 4), torch.zeros(0))
    return dataclasses.replace(task(), train=nothing, name="empty")

def not_a_task():
    return 3

number = 3
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "user_tasks.py").write_text(USER_MODULE)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "tasks.py").write_text("")
    (tmp_path / "broken_tasks.py").write_text("import no_such_package_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "user_tasks", raising=False)
    return tmp_path


def test_digits_resnet20_is_trained_and_left_in_evaluation_mode(resnet20):
    assert sum(parameter.numel() for parameter in resnet20.model.parameters()) == 272_186
    assert (len(resnet20.train), len(resnet20.evaluation)) == (1437, 360)
    assert not resnet20.model.training
    images, targets = resnet20.evaluation.tensors
    assert images.shape == (360, 1, 16, 16)
    with torch.no_grad():
        assert float(resnet20.metric(resnet20.model(images), targets)) >= 0.99


@pytest.mark.nightly
def test_digits_mobilenet_is_depthwise_and_trained(mobilenet):
    depthwise = [m for m in mobilenet.model.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1]
    assert len(depthwise) == 8
    assert all(conv.kernel_size == (3, 3) for conv in depthwise)
    images, targets = mobilenet.evaluation.tensors
    with torch.no_grad():
        assert float(mobilenet.metric(mobilenet.model(images), targets)) >= 0.99


def test_train_and_test_images_are_disjoint(resnet20):
    train = {image.numpy().tobytes() for image in resnet20.train.tensors[0]}
    test = {image.numpy().tobytes() for image in resnet20.evaluation.tensors[0]}
    assert not train & test


def test_training_is_deterministic_and_leaves_the_global_generator_alone():
    task = digits_resnet20(pretrained=False)
    state = torch.get_rng_state()
    first, second = (train_classifier(task.model, task.train, Recipe(epochs=1)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_the_cache_is_used_and_retrained_when_damaged(resnet20, monkeypatch, caplog, tmp_path):
    (whole,) = cache_folder().glob("digits-resnet20-*")
    shutil.copy(whole, tmp_path)
    monkeypatch.setenv("HESSIANWARE_CACHE", str(tmp_path))
    trainings = []
    monkeypatch.setattr(
        "hessian.tasks.pretrained.train_classifier",
        lambda *_, progress: trainings.append(progress) or resnet20.model,
    )
    arguments = ("digits-resnet20", resnet20.model, resnet20.train, resnet20.evaluation, Recipe(epochs=15))
    assert torch.equal(pretrained_weights(*arguments)["fc.bias"], resnet20.model.fc.bias)
    assert trainings == []
    (file,) = cache_folder().glob("digits-resnet20-*")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert torch.equal(pretrained_weights(*arguments)["fc.bias"], resnet20.model.fc.bias)
    assert len(trainings) == 1
    assert "is damaged" in caplog.text
    pretrained_weights(*arguments)
    assert len(trainings) == 1


def test_an_unwritable_cache_costs_time_not_the_run(resnet20, monkeypatch, caplog, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HESSIANWARE_CACHE", str(tmp_path / "file" / "folder"))
    monkeypatch.setattr("hessian.tasks.pretrained.train_classifier", lambda *_, **__: resnet20.model)
    weights = pretrained_weights("name", resnet20.model, resnet20.train, resnet20.evaluation, Recipe(epochs=1))
    assert torch.equal(weights["fc.bias"], resnet20.model.fc.bias)
    assert "cannot keep the trained network" in caplog.text


def test_a_training_that_fails_says_so(resnet20, monkeypatch, tmp_path):
    monkeypatch.setenv("HESSIANWARE_CACHE", str(tmp_path))
    untrained = digits_resnet20(pretrained=False).model
    monkeypatch.setattr("hessian.tasks.pretrained.train_classifier", lambda *_, **__: untrained)
    with pytest.raises(RuntimeError, match="below 99%"):
        pretrained_weights("name", untrained, resnet20.train, resnet20.evaluation, Recipe(epochs=1))


def test_a_users_task(user_module):
    assert user_module.is_dir()
    task = hessian.load_task("user_tasks:task")
    assert (task.name, len(task.train)) == ("mine", 8)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("digits-resnet2", ValueError, r"unknown task 'digits-resnet2' \(did you mean 'digits-resnet20'\?\)"),
        ("DIGITS-resnet20", ValueError, r"unknown task 'DIGITS-resnet20' \(did you mean 'digits-resnet20'\?\)"),
        ("no_such_module:task", ValueError, "there is no module 'no_such_module'"),
        ("user_task:task", ValueError, r"no module 'user_task' here or among the installed \(did you mean 'user_tasks'\?\)"),
        ("package.taks:task", ValueError, r"no module 'package\.taks' here .* \(did you mean 'package\.tasks'\?\)"),
        ("user_tasks.deeper:task", ValueError, "there is no module 'user_tasks.deeper'"),
        ("user_tasks:tusk", ValueError, r"no function 'tusk' \(did you mean 'task'\?\)"),
        ("user_tasks:number", ValueError, "'number' is a int, not a function"),
        ("./user_tasks:task", ValueError, "'./user_tasks' is no name of a module"),
        (":task", ValueError, "'' is no name of a module"),
        ("user_tasks:not_a_task", TypeError, "returned a int, not a hessian.Task"),
        ("user_tasks:empty", ValueError, "the train dataset is empty"),
        ("broken_tasks:task", ModuleNotFoundError, "no_such_package_anywhere"),
    ],
)
def test_tasks_that_do_not_load(user_module, text, error, message):
    assert user_module.is_dir()
    with pytest.raises(error, match=message):
        hessian.load_task(text)


def test_weights_from_files(user_module):
    state = hessian.load_task("user_tasks:task").model.state_dict()
    changed = {name: tensor + 1 for name, tensor in state.items()}
    safetensors.torch.save_file(changed, user_module / "w.safetensors")
    torch.save(changed, user_module / "w.pt")
    torch.save({"state_dict": changed, "epoch": 3}, user_module / "nested.pt")
    for name in ("w.safetensors", "w.pt", "nested.pt"):
        task = hessian.load_task("user_tasks:task", weights=user_module / name)
        assert all(torch.equal(tensor, changed[key]) for key, tensor in task.model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w/modle.pt", r"weights file 'w/modle\.pt' does not exist \(did you mean 'w/model\.pt'\?\)"),
        ("w/Model.safetensors", r"does not exist \(did you mean 'w/model\.safetensors'\?\)"),
        ("w/quite-another.bin", r"weights file 'w/quite-another\.bin' does not exist$"),
        ("v/model.pt", "weights file 'v/model.pt' does not exist: there is no folder 'v'"),
        ("w", "weights file 'w' is a folder: name a file in it"),
    ],
)
def test_weights_that_are_not_there_are_missed_before_the_task_is_built(user_module, monkeypatch, name, message):
    (user_module / "w").mkdir()
    for file in ("model.pt", "model.safetensors"):
        (user_module / "w" / file).touch()
    monkeypatch.setattr("hessian.task._call", lambda _: pytest.fail("built"))
    with pytest.raises(ValueError, match=message):
        hessian.load_task("user_tasks:task", weights=name)


def test_weights_of_a_built_in_task_are_read_instead_of_trained(resnet20, tmp_path, monkeypatch):
    torch.save(resnet20.model.state_dict(), tmp_path / "w.pt")
    monkeypatch.setattr("hessian.tasks.digits.pretrained_weights", lambda *_: pytest.fail("trained"))
    task = hessian.load_task("digits-resnet20", weights=tmp_path / "w.pt")
    assert torch.equal(task.model.fc.bias, resnet20.model.fc.bias)


def test_weights_that_do_not_fit_name_the_first_three(user_module):
    state = hessian.load_task("user_tasks:task").model.state_dict()
    wrong = {"0.weight": torch.zeros(2, 2), "2.weight": state["2.weight"], "a": torch.zeros(1), "b": torch.zeros(1)}
    torch.save(wrong, user_module / "w.pt")
    expected = r"0\.bias is missing; 2\.bias is missing; 0\.weight has shape \(2, 2\), the model's is \(5, 4\) \(and 2 more\)"
    with pytest.raises(ValueError, match=expected):
        hessian.load_task("user_tasks:task", weights=user_module / "w.pt")


def test_weights_that_are_not_finite(user_module):
    state = hessian.load_task("user_tasks:task").model.state_dict()
    state["2.bias"][1] = float("nan")
    torch.save(state, user_module / "w.pt")
    with pytest.raises(ValueError, match=r"weight '2\.bias' .* holds NaN or Inf"):
        hessian.load_task("user_tasks:task", weights=user_module / "w.pt")


class _Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_damaged_and_malicious_files(user_module):
    safetensors.torch.save_file({"a": torch.zeros(100)}, user_module / "w.safetensors")
    content = (user_module / "w.safetensors").read_bytes()
    (user_module / "short.safetensors").write_bytes(content[:-10])
    (user_module / "short.pt").write_bytes(b"PK\x03\x04 not a zip")
    (user_module / "bad.pt").write_bytes(pickle.dumps({"0.weight": _Malicious()}))
    torch.save({"weight": _Malicious()}, user_module / "zip.pt")
    torch.save([1, 2, 3], user_module / "list.pt")
    for name, message in (
        ("missing.pt", "does not exist"),
        ("short.safetensors", "is damaged or is no safetensors file"),
        ("short.pt", "is damaged"),
        ("bad.pt", r"would have to run code to be read \(nothing was run\)"),
        ("zip.pt", "would have to run code"),
        ("list.pt", "holds a list, not a state dict"),
    ):
        with pytest.raises(ValueError, match=message):
            hessian.load_task("user_tasks:task", weights=user_module / name)
    assert not (user_module / "executed").exists()


def test_importing_prints_nothing_and_configures_no_logging():
    program = "import logging, hessian, hawq, parallel; print(logging.getLogger().handlers, end='')"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("[]", "")


def test_built_in_names():
    assert list(BUILT_IN) == ["digits-resnet20", "digits-mobilenet", "text-transformer", "minilm", "efficientnet-lite1"]
