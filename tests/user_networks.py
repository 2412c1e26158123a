"""A user's own tasks, as the command lines meet them: copied into a folder of its own by the fixture `folder`."""

import dataclasses
import os
import time

import torch
from torch import nn
from torch.utils.data import TensorDataset

import hessian


def accuracy(outputs, targets):
    return (outputs.argmax(1) == targets).float().mean()


def negative_error(outputs, targets):
    return -(outputs - targets).abs().mean()


def build(train=None, model=None, loss=None):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 1, 8, 8, generator=generator)
    targets = (inputs.mean((1, 2, 3)) > 0).long()
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    data = TensorDataset(inputs, targets)
    return hessian.Task(model, train or data, data, loss or nn.CrossEntropyLoss(), accuracy, "small")


def task():
    return build()


def noisy():
    print("noise on standard output")
    return build()


def other_loss():
    return build(loss=nn.CrossEntropyLoss(label_smoothing=0.3))


def nan_data():
    full = build()
    inputs = full.train.tensors[0].clone()
    inputs[5, 0, 0, 0] = float("nan")
    return build(TensorDataset(inputs, full.train.tensors[1]))


def nan_weights():
    task = build()
    with torch.no_grad():
        task.model[0].weight[0, 0, 0, 0] = float("inf")
    return task


def bad_targets():
    full = build()
    return build(TensorDataset(full.train.tensors[0], full.train.tensors[1] + 1))


def nothing_to_quantize():
    return build(model=nn.Sequential(nn.Flatten(), nn.ReLU()))


def unreached():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(64, 2), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x.flatten(1))

    return build(model=Net())


def regression():
    full = build()
    data = TensorDataset(full.train.tensors[0], full.train.tensors[0].mean((1, 2, 3)))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 1), nn.Flatten(0))
    return hessian.Task(model, data, data, nn.MSELoss(), negative_error, "regression")


def without_data():
    class Nothing(torch.utils.data.Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, index):
            if index:  # the first is looked at when a task is loaded
                raise RuntimeError("the training data were read")
            return build().train[0]

    return dataclasses.replace(build(), train=Nothing())


def slow():
    class Slow(torch.utils.data.Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, index):
            if os.environ.get("SLOW"):
                time.sleep(0.03)
            return build_once.train[index]

    return dataclasses.replace(build_once, evaluation=Slow())


build_once = build()
