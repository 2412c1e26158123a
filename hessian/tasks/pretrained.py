"""Weights of the built-in tasks: trained once, deterministically, and kept in the user's cache with a checksum."""

import copy
import hashlib
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from hessian.files import read_checked, write_checked

logger = logging.getLogger(__name__)

REQUIRED_ACCURACY = 0.99


@dataclass(frozen=True)
class Recipe:
    """How a built-in network is trained: SGD with Nesterov momentum, one learning-rate cycle, shifts by one pixel."""

    epochs: int
    seed: int = 0
    batch_size: int = 64
    learning_rate: float = 0.1
    weight_decay: float = 5e-4


def cache_folder() -> Path:
    """$HESSIANWARE_CACHE, or the folder `hessianware` where this system keeps caches."""
    if os.environ.get("HESSIANWARE_CACHE"):
        return Path(os.environ["HESSIANWARE_CACHE"]).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "hessianware"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "hessianware"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hessianware"


def pretrained_weights(
    name: str, model: nn.Module, train: TensorDataset, test: TensorDataset, recipe: Recipe
) -> dict[str, torch.Tensor]:
    """The trained state dict, from the cache if it is there and whole, else by training (and caching).

    Raises RuntimeError if training ends below 99% test accuracy.
    """
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    described = hashlib.sha256(f"{sorted(asdict(recipe).items())}{shapes}".encode()).hexdigest()[:8]
    path = cache_folder() / f"{name}-seed{recipe.seed}-{described}"
    content = read_checked(path)
    if content is None:
        with torch.inference_mode(False), torch.enable_grad():
            trained = train_classifier(model, train, recipe, progress=f"training {name}")
        accuracy = _accuracy(trained, test)
        if accuracy < REQUIRED_ACCURACY:
            raise RuntimeError(f"training {name} ended at {accuracy:.2%} test accuracy, below {REQUIRED_ACCURACY:.0%}")
        content = safetensors.torch.save({key: value.contiguous() for key, value in trained.state_dict().items()})
        try:
            write_checked(path, content)
        except OSError as error:
            logger.warning("cannot keep the trained network in %s (%s): next time it is trained anew", path.parent, error)
    return safetensors.torch.load(content)


def train_classifier(model: nn.Module, train: TensorDataset, recipe: Recipe, *, progress: str | None = None) -> nn.Module:
    """A trained copy of `model`; same recipe, machine and number of threads give the same bits."""
    model = copy.deepcopy(model).train()
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.learning_rate, momentum=0.9, weight_decay=recipe.weight_decay, nesterov=True
    )
    steps = recipe.epochs * (len(train) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps, pct_start=0.2)
    batches = _shifted_batches(train, recipe, generator)
    for inputs, targets in tqdm(batches, desc=progress, total=steps, disable=progress is None, unit="step"):
        loss = nn.functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def _shifted_batches(
    train: TensorDataset, recipe: Recipe, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    images, targets = train.tensors
    padded = nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)
    height, width = images.shape[2:]
    for _ in range(recipe.epochs):
        order = torch.randperm(len(images), generator=generator)
        for start in range(0, len(order) - recipe.batch_size + 1, recipe.batch_size):
            chosen = order[start : start + recipe.batch_size]
            top, left = torch.randint(0, 3, (2,), generator=generator).tolist()
            yield padded[chosen, :, top : top + height, left : left + width], targets[chosen]


@torch.no_grad()
def _accuracy(model: nn.Module, test: TensorDataset) -> float:
    images, targets = test.tensors
    return (model(images).argmax(dim=1) == targets).float().mean().item()
