"""Small tasks for the trainer, named on command lines as tests.training_tasks:NAME."""

import os
import signal
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import hessian


def accuracy(outputs, targets):
    return (outputs.argmax(1) == targets).double().mean()


def images(examples=40):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, 2, 6, 6, generator=generator, dtype=torch.float64)
    return x, (x.mean((1, 2, 3)) * 12).round().long().clamp(-1, 1) + 1


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return x + torch.relu(self.norm(self.conv(x)))


def network(dropout=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, bias=False),  # of a bias, batch norm leaves rounding, which AdamW scales up
            nn.BatchNorm2d(4),
            nn.Sequential(Block(), Block()),
            nn.Dropout(dropout),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 3),
        ).double()


def small(dropout=0.0):
    x, y = images()
    return hessian.Task(
        network(dropout), TensorDataset(x[:29], y[:29]), TensorDataset(x[29:], y[29:]), nn.CrossEntropyLoss(), accuracy, "small"
    )


def with_dropout():
    return small(0.2)


class _Troubled(Dataset):
    """The same examples; the first time that the 70th is read on rank 1, `trouble` happens (a file in FOLDER remembers it)."""

    def __init__(self, dataset, trouble):
        self.dataset, self.trouble, self.read = dataset, trouble, 0

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.read += 1
        marker = Path(os.environ["TROUBLE_MARKER"])
        if self.read == 70 and os.environ.get("RANK") == "1" and not marker.exists():
            marker.touch()
            self.trouble()
        return self.dataset[index]


def killed_once():
    task = with_dropout()
    return hessian.Task(
        task.model,
        _Troubled(task.train, lambda: os.kill(os.getpid(), signal.SIGKILL)),
        task.evaluation,
        task.loss,
        task.metric,
        "small",
    )


def hanging():
    task = small()
    return hessian.Task(
        task.model, _Troubled(task.train, lambda: time.sleep(20)), task.evaluation, task.loss, task.metric, "small"
    )


def small_in_float32():
    task = small()
    sets = [TensorDataset(data.tensors[0].float(), data.tensors[1]) for data in (task.train, task.evaluation)]
    return hessian.Task(task.model.float(), *sets, task.loss, task.metric, "small <float32>")
