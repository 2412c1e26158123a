"""How the image classifiers are trained: SGD with Nesterov momentum to 99% accuracy, then kept in the cache."""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from hessian.tasks.accuracy import require_accuracy
from hessian.tasks.cache import cached_weights, shapes

REQUIRED_ACCURACY = 0.99


@dataclass(frozen=True)
class Recipe:
    """How a built-in network is trained: SGD with Nesterov momentum, one learning-rate cycle, shifts by one pixel."""

    epochs: int
    seed: int = 0
    batch_size: int = 64
    learning_rate: float = 0.1
    weight_decay: float = 5e-4


def pretrained_weights(
    name: str, model: nn.Module, train: TensorDataset, test: TensorDataset, recipe: Recipe
) -> dict[str, torch.Tensor]:
    """The trained state dict, from the cache if it is there and whole, else by training (and caching).

    Raises RuntimeError if training ends below 99% test accuracy.
    """

    def trained() -> nn.Module:
        classifier = train_classifier(model, train, recipe, progress=f"training {name}")
        require_accuracy(name, classifier, test, REQUIRED_ACCURACY)
        return classifier

    return cached_weights(f"{name}-seed{recipe.seed}", f"{sorted(asdict(recipe).items())}{shapes(model)}", trained)


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
