"""Handwritten digits: scikit-learn's 1,797 images at 16x16, and two convolutional networks trained on them."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.data import TensorDataset

from hessian.task import Task
from hessian.tasks.accuracy import accuracy
from hessian.tasks.mobilenet import MobileNet
from hessian.tasks.pretrained import Recipe, pretrained_weights
from hessian.tasks.resnet import ResNet20

TEST_SIZE = 360


def digits_datasets() -> tuple[TensorDataset, TensorDataset]:
    """1,437 training and 360 test pairs (image (1, 16, 16) in [-1, 1], class 0 to 9), split evenly over the classes."""
    from sklearn.datasets import load_digits  # slow to import, and needed by these tasks alone
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images = nn.functional.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
    targets = torch.tensor(digits.target, dtype=torch.int64)
    train, test = train_test_split(range(len(targets)), test_size=TEST_SIZE, stratify=digits.target, random_state=0)
    return TensorDataset(images[train], targets[train]), TensorDataset(images[test], targets[test])


def digits_resnet20(*, pretrained: bool = True, seed: int = 0) -> Task:
    """ResNet-20 (272k parameters) on digits; training takes some 10 s on two cores."""
    return _digits("digits-resnet20", partial(ResNet20, 1, 10), Recipe(epochs=15, seed=seed), pretrained)


def digits_mobilenet(*, pretrained: bool = True, seed: int = 0) -> Task:
    """A MobileNetV2 (73k parameters, depthwise 3x3) on digits; training takes some 20 s on two cores."""
    return _digits("digits-mobilenet", partial(MobileNet, 1, 10), Recipe(epochs=20, seed=seed), pretrained)


def _digits(name: str, build: Callable[[], nn.Module], recipe: Recipe, pretrained: bool) -> Task:
    train, test = digits_datasets()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = build().float()
    if pretrained:
        model.load_state_dict(pretrained_weights(name, model, train, test, recipe))
    model.eval()
    return Task(model, train, test, nn.CrossEntropyLoss(), accuracy, name)
