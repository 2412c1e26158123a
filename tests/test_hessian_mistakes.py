"""What newcomers get wrong with a model and data of their own: one line that names the value and the remedy."""

import dataclasses
import io
import re
import sys
import types
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import hawq
import hessian
from hawq.fold import folded
from hawq.quantize import main as quantize
from hessian.__main__ import main as report
from hessian.diagnosis import DataMismatchError
from parallel.train import run
from parallel.train_options import parse
from tests.user_networks import accuracy, negative_error


@dataclasses.dataclass
class Answer:
    """What networks of Hugging Face return."""

    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Returning(nn.Module):
    """A network whose output is not one tensor."""

    def __init__(self, wrap):
        super().__init__()
        self.net, self.wrap = rows(), wrap

    def forward(self, x):
        return self.wrap(self.net(x))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = rows()

    def forward(self, x, mask):
        return self.net(x * mask)


class Once:
    """Yields its batches on the first pass alone."""

    def __init__(self, batches):
        self.left = iter(batches)

    def __iter__(self):
        return self.left


def rows(outputs=10):
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, outputs))


def pictures():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def words():
    return nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(24, 10))


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def built(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


X, Y = drawn(8, 6), torch.arange(8) + 1
IMAGES = drawn(8, 1, 8, 8)
CLASSES, SQUARES, BINARY = nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss()

GIVE = "hessian.Objective(model, loss, data, forward=lambda model, batch:"

# By mistake: the model, the inputs, and what the message says; " .* " stands for anything.
INPUTS = {
    "float64": (
        rows,
        X.double(),
        "inputs are float64 and the model's parameters float32: give inputs.float(), or model.double()",
    ),
    "float64 images": (pictures, IMAGES.double(), "inputs are float64 and the model's parameters float32: give inputs.float()"),
    "float16": (rows, X.half(), "inputs are float16 and the model's parameters float32: give inputs.float(), or model.half()"),
    "a float64 model": (lambda: rows().double(), X, "float32 and the model's parameters float64: give inputs.double()"),
    "bytes": (pictures, IMAGES.byte(), "inputs are uint8 and the model's parameters float32: give inputs.float()"),
    "arrays": (rows, X.numpy(), "inputs are a ndarray, not a tensor .* give torch.as_tensor(inputs)"),
    "float words": (words, X, "inputs are float32, and an embedding looks up whole numbers: give inputs.long()"),
    "words out of range": (words, torch.full((8, 6), 12), "inputs hold 12, and the embedding '0' has rows 0 to 9"),
    "no channel": (
        pictures,
        IMAGES[:, 0],
        "inputs of shape (8, 8, 8) do not fit the model (Given groups=1, weight of size [4, 1, 3, 3], expected input .* 1 "
        "channels, but got 8 .* takes (N, 1, height, width): give inputs.unsqueeze(1), and check model(inputs) by itself",
    ),
    "channels last": (pictures, IMAGES.movedim(1, -1), "of shape (8, 8, 8, 1) do not fit .* give inputs.movedim(-1, 1)"),
    "flat images": (pictures, IMAGES.flatten(1), "of shape (8, 64) do not fit .* give inputs.unflatten(1, (1, height, width))"),
    "larger images": (pictures, drawn(8, 1, 9, 9), "of shape (8, 1, 9, 9) do not fit .* check model(inputs)"),
    "images for rows": (lambda: nn.Linear(64, 10), IMAGES, "of shape (8, 1, 8, 8) do not fit .* give inputs.flatten(1)"),
    "wider rows": (
        rows,
        drawn(8, 7),
        "of shape (8, 7) do not fit .* the first linear layer takes rows of 6; check model(inputs)",
    ),
    "one example": (lambda: nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9)), X[:1], "of shape (1, 6) .* call model.eval()"),
    "two arguments": (TwoInputs, X, f"argument: 'mask'): say how the model is called with {GIVE}"),
    "a dict": (rows, {"x": X}, f"model(inputs) failed for a dict('x': float32 tensor (8, 6)) .* {GIVE}"),
}

# The loss, the number of the model's outputs, the targets, and what the message says.
TARGETS = {
    "float": (
        CLASSES,
        10,
        Y.float(),
        "targets are float32 of shape (8,), and CrossEntropyLoss of outputs of shape (8, 10) takes class numbers, int64 of "
        "shape (8,) .* give targets.long()",
    ),
    "int32": (CLASSES, 10, Y.int(), "targets are int32 of shape (8,) .* give targets.long()"),
    "int32, a function": (F.cross_entropy, 10, Y.int(), "targets are int32 .* cross_entropy of outputs .* give targets.long()"),
    "a column": (CLASSES, 10, Y[:, None], "targets are int64 of shape (8, 1) .* give targets.squeeze(1)"),
    "a float column": (CLASSES, 10, Y[:, None].float(), "are float32 of shape (8, 1) .* give targets.squeeze(1).long()"),
    "one-hot numbers": (CLASSES, 10, F.one_hot(Y, 10), "are int64 of shape (8, 10) .* give targets.argmax(1)"),
    "fewer": (CLASSES, 10, Y[:5], "targets are int64 of shape (5,) .* give a class number for every output"),
    "label 10": (CLASSES, 10, Y + 2, "target 10 is out of range: the model has 10 outputs, so targets are 0 to 9"),
    "label 10, own loss": (
        lambda o, t: F.cross_entropy(o, t),
        10,
        Y + 2,
        "target 10 is out of range: the model has 10 outputs",
    ),
    "few weights": (nn.CrossEntropyLoss(torch.ones(8)), 10, Y, "targets reach from 1 to 8, and the loss has 8 class weights"),
    "weights elsewhere": (nn.CrossEntropyLoss(torch.ones(10, device="meta")), 10, Y, "on cpu .* on meta: give loss.to('cpu')"),
    "(N,) for (N, 1)": (
        SQUARES,
        1,
        X[:, 0],
        "outputs are of shape (8, 1) and targets of shape (8,), and MSELoss compares them one by one: give "
        "targets.unsqueeze(1)",
    ),
    "(N, 1, 1) for (N, 1)": (
        F.l1_loss,
        1,
        X[:, :1, None],
        "targets of shape (8, 1, 1), and l1_loss .* give targets.squeeze(2)",
    ),
    "classes for MSE": (SQUARES, 10, Y, "targets of shape (8,), and MSELoss .* of class numbers take CrossEntropyLoss"),
    "narrower for MSE": (SQUARES, 10, X, "outputs are of shape (8, 10) and targets of shape (8, 6) .* shaped like the outputs"),
    "(N,) for BCE": (
        BINARY,
        1,
        torch.ones(8),
        "outputs are of shape (8, 1) and targets of shape (8,) .* give targets.unsqueeze(1)",
    ),
    "numbers for BCE": (
        BINARY,
        1,
        Y[:, None] % 2,
        "are int64, and BCEWithLogitsLoss takes probabilities: give targets.float()",
    ),
    "BCE of logits": (
        nn.BCELoss(),
        1,
        torch.ones(8, 1),
        "outputs reach from .* probabilities from 0 to 1: use BCEWithLogitsLoss",
    ),
}

# What the model returns of its outputs, and what the message says.
OUTPUTS = {
    "a dataclass": (
        Answer,
        "the model's output is a Answer(logits: float32 tensor (8, 10), loss: NoneType), and the loss takes one tensor .* "
        f"{GIVE} model(batch[0]).logits), or a model that returns that alone",
    ),
    "a tuple": (lambda x: (x, x), "a tuple(float32 tensor (8, 10), float32 tensor (8, 10)) .* model(batch[0])[0]), or a model"),
    "a dict": (lambda x: {"y": x}, "a dict('y': float32 tensor (8, 10)) .* model(batch[0])['y']), or a model"),
}

# The data, and what the message says.
DATA = {
    "a data set": (
        TensorDataset(X, Y),
        "a TensorDataset, which yields single examples: pass torch.utils.data.DataLoader(dataset",
    ),
    "a tensor": (
        X,
        f"a batch is a float32 tensor (6,), taken out of a float32 tensor (8, 6), .* {GIVE} ..., items=lambda batch:",
    ),
    "a loader of inputs": (DataLoader(TensorDataset(X), 4), f"a batch is a list(float32 tensor (4, 6)), .* {GIVE}"),
    "dicts": (
        [{"x": X, "y": Y}],
        f"a dict('x': float32 tensor (8, 6), 'y': int64 tensor (8,)), not (inputs, targets) .* {GIVE}",
    ),
    "three-tuples": (
        [(X, Y, Y)],
        f"a batch is a tuple(float32 tensor (8, 6), int64 tensor (8,), int64 tensor (8,)), .* {GIVE}",
    ),
    "three tensors": ((X, Y, Y), "a batch is a float32 tensor (8, 6), taken out of a tuple(float32 tensor (8, 6), int64"),
    "a later batch": ([(X, Y), (drawn(8, 7), Y)], "inputs of batch 1 of shape (8, 7) do not fit the model"),
    "arrays": ((X.numpy(), Y.numpy()), "a batch is a ndarray, not (inputs, targets): make tensors .* torch.as_tensor(array)"),
    "batches of arrays": ([(X.numpy(), Y.numpy())], "a tuple(ndarray, ndarray), which holds no tensor: give tensors"),
    "a generator": (((X, Y) for _ in range(2)), "a generator) and would be empty on the second pass: pass a list of batches"),
    "a function": (accuracy, "`data` is a function, which yields no batches: pass a list of batches, a DataLoader, or one"),
    "data for one pass": (
        Once([(X, Y), (X, Y)]),
        "a Once, is empty on this pass and was not before: its __iter__ must start anew",
    ),
    "no batch": ([], "the data is empty, a list(): there is no batch"),
    "an empty data set": (DataLoader(TensorDataset(X[:0], Y[:0])), "the data is empty, a DataLoader: there is no batch"),
    "fewer than a batch": (
        DataLoader(TensorDataset(X, Y), 9, drop_last=True),
        "a DataLoader with drop_last=True has none of fewer",
    ),
    "an empty batch": ((X[:0], Y[:0]), "no item of the data counts: batches are empty"),
}

MISTAKES = {
    **{f"inputs, {name}": (make, CLASSES, [(x, Y[: len(x)])], text) for name, (make, x, text) in INPUTS.items()},
    **{f"targets, {name}": (partial(rows, size), loss, (X, y), text) for name, (loss, size, y, text) in TARGETS.items()},
    **{f"outputs, {name}": (partial(Returning, wrap), CLASSES, (X, Y), text) for name, (wrap, text) in OUTPUTS.items()},
    **{f"data, {name}": (rows, CLASSES, data, text) for name, (data, text) in DATA.items()},
    "the class of a loss": (
        rows,
        nn.CrossEntropyLoss,
        (X, Y),
        "the loss is the class CrossEntropyLoss, of which one is made by",
    ),
    "the class of a model": (
        lambda: nn.Linear,
        CLASSES,
        (X, Y),
        "the model is the class Linear, of which one is made by Linear(",
    ),
    "loss and data swapped": (
        rows,
        (X, Y),
        CLASSES,
        "the loss is a tuple(float32 tensor (8, 6), int64 tensor (8,)), not a function",
    ),
    "no weights": (lambda: rows().to("meta"), CLASSES, (X, Y), "on the device 'meta', without values: model.to_empty("),
}


def pattern(message: str) -> str:
    return ".*".join(map(re.escape, message.split(" .* ")))


def product(model, loss, data, kind=hessian.Hessian):
    operator = kind(model, loss, data)
    return operator @ torch.ones(operator.shape[0], dtype=operator.dtype)


def refused(compute, *arguments) -> Exception:
    with pytest.raises((ValueError, TypeError)) as caught:
        compute(*arguments)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(("model", "loss", "data", "message"), MISTAKES.values(), ids=MISTAKES)
def test_one_line_names_the_value_and_the_remedy(model, loss, data, message):
    assert re.search(pattern(message), str(refused(product, built(model), loss, data)))


ELSEWHERE = {
    "Gauss-Newton": lambda *arguments: product(*arguments, hessian.GaussNewton),
    "Fisher": lambda *arguments: product(*arguments, hessian.Fisher),
    "K-FAC": lambda *arguments: product(*arguments, hessian.KFAC),
    "trace": lambda *arguments: hessian.trace(hessian.Hessian(*arguments)),
    "layers": hessian.layer_report,
    "activations": hessian.activation_report,
    "landscape": lambda *arguments: hessian.landscape.line(
        hessian.Objective(*arguments), direction=torch.ones(sum(one.numel() for one in arguments[0].parameters())), num_points=3
    ),
    "sensitivity": hawq.sensitivity,
}


@pytest.mark.parametrize("compute", ELSEWHERE.values(), ids=ELSEWHERE)
@pytest.mark.parametrize(
    "name", ["inputs, float64", "inputs, no channel", "targets, a column", "targets, label 10", "targets, (N,) for (N, 1)"]
)
def test_every_estimator_says_the_same(compute, name):
    model, loss, data, message = MISTAKES[name]
    assert re.search(pattern(message), str(refused(compute, built(model), loss, data)))


@pytest.mark.parametrize(
    "name",
    ["inputs, float64", "inputs, no channel", "inputs, words out of range", "data, a later batch", "outputs, a dataclass"],
)
def test_what_quantization_says_of_inputs(name):
    model, _, data, message = MISTAKES[name]
    network = built(model)
    layers = [path for path, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    error = refused(hawq.quantize_model, network, hawq.Allocation(dict.fromkeys(layers, 4)), data)
    beginning = message.replace("(8, 8, 8)", "(2, 8, 8)").split(" (Given")[0].split(" .*")[0].split("(logits")[0]
    assert beginning in str(error)


def test_inputs_on_another_device_than_the_model():
    message = r"inputs are on meta and the model's parameters on cpu: give inputs\.to\('cpu'\)"
    with pytest.raises(DataMismatchError, match=message):
        folded(rows(), X.to("meta"))


def test_the_original_error_is_chained_and_other_errors_are_left_alone():
    error = refused(product, built(rows), CLASSES, (X.double(), Y))
    assert isinstance(error, DataMismatchError)
    assert "same dtype" in str(error.__cause__)

    class OwnError(RuntimeError):
        pass

    for own in (OwnError("shape"), KeyError("y"), torch.OutOfMemoryError("size"), KeyboardInterrupt(), RuntimeError("no more")):

        def fail(*_, own=own):
            raise own

        for model, loss in ((built(rows), fail), (Returning(fail), CLASSES)):
            with pytest.raises(type(own)) as caught:
                product(model, loss, (X, Y))
            assert caught.value is own


LEGAL = {
    "classes in bytes": (rows, CLASSES, (X, Y.byte())),
    "weighted classes in bytes": (lambda: rows(8), nn.CrossEntropyLoss(torch.arange(8.0)), (X, Y.byte() - 1)),
    "probabilities in float64": (rows, CLASSES, (X, F.one_hot(Y, 10).double())),
    "whole numbers for MSE": (lambda: rows(1), SQUARES, (X, Y[:, None])),
    "float64 for MSE": (lambda: rows(1), SQUARES, (X, X[:, :1].double())),
    "own comparison, all with all": (lambda: rows(1), lambda o, t: (o - t).square().mean(), (X, X[:, 0])),
}


@pytest.mark.parametrize(("model", "loss", "data"), LEGAL.values(), ids=LEGAL)
def test_what_works_is_not_forbidden(model, loss, data):
    network = built(model)
    targets = data[1].long() if data[1].dtype == torch.uint8 else data[1]
    expected = torch.autograd.grad(loss(network(data[0]), targets), list(network.parameters()))
    found = hessian.Hessian(network, loss, [data, data]).gradient()
    torch.testing.assert_close(found, torch.cat([part.flatten() for part in expected]))


def test_a_stream_of_batches_is_no_data_set_of_examples():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(X, Y)])

    model = built(rows)
    assert torch.equal(product(model, CLASSES, Stream()), product(model, CLASSES, (X, Y)))


def task(model=pictures, train=(IMAGES, Y), evaluation=None, loss=CLASSES, metric=accuracy):
    sets = [one if isinstance(one, DataLoader | list) else TensorDataset(*one) for one in (train, evaluation or train)]
    return hessian.Task(built(model), *sets, loss, metric, "mine")


UNLOADABLE = {
    "a loader": (
        lambda: task(train=DataLoader(TensorDataset(IMAGES, Y))),
        "task 'mine': train is a DataLoader, and a task has data sets, of which batches are made here: give loader.dataset, a "
        "TensorDataset",
    ),
    "a loader to evaluate": (
        lambda: task(evaluation=DataLoader(TensorDataset(IMAGES, Y))),
        "evaluation is a DataLoader, .* give loader.dataset",
    ),
    "dicts": (lambda: task(train=[{"x": X, "y": Y}]), "an item of train is a dict('x': float32 tensor (8, 6), .* __getitem__"),
    "the class of a loss": (lambda: task(loss=nn.CrossEntropyLoss), "loss is the class CrossEntropyLoss"),
    "no example": (lambda: task(train=(IMAGES[:0], Y[:0])), "the train dataset is empty"),
}

UNFIT = {
    "float64 images": (
        lambda: task(train=(IMAGES.double(), Y)),
        "float64 and the model's parameters float32: give inputs.float()",
    ),
    "no channel": (lambda: task(train=(IMAGES[:, 0], Y)), "give inputs.unsqueeze(1)"),
    "int32 targets": (lambda: task(train=(IMAGES, Y.int())), "give targets.long()"),
    "label 10": (lambda: task(train=(IMAGES, Y + 2)), "target 10 is out of range: the model has 10 outputs"),
    "(N,) for (N, 1)": (
        lambda: task(lambda: rows(1), (X, X[:, 0]), None, SQUARES, negative_error),
        "give targets.unsqueeze(1)",
    ),
    "a dataclass": (lambda: task(lambda: Returning(Answer), (X, Y)), "or a model that returns that alone"),
}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's, whose function `task` is to be given."""
    module = types.ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)
    monkeypatch.chdir(tmp_path)
    return module


@pytest.mark.parametrize(("make", "message"), UNLOADABLE.values(), ids=UNLOADABLE)
def test_tasks_of_other_things(mine, make, message):
    mine.task = make
    assert re.search(pattern(message), str(refused(hessian.load_task, "mine:task")))


COMMANDS = {
    "hessian": lambda *arguments: report([*arguments, "--examples", "8"]),
    "hawq.quantize": lambda *arguments: quantize(list(arguments)),
    "parallel.train": lambda *arguments: run(parse([*arguments, "--batch-size", "4", "--steps", "1"]), io.StringIO()),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize(("make", "message"), UNFIT.values(), ids=UNFIT)
def test_command_lines_say_it_in_one_line(mine, command, make, message, capfd):
    mine.task = make
    assert command("mine:task", "--out", "o") != 0
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(pattern(message), line)
