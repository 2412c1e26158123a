"""How a linear head is trained on embeddings that do not change: to the optimum, by L-BFGS."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import TensorDataset


@dataclass(frozen=True)
class HeadRecipe:
    """Minimised is the mean cross-entropy plus `penalty` |W|^2 / 2; the seed is of the weights to begin with."""

    seed: int = 0
    penalty: float = 1e-3
    max_iterations: int = 200


def train_head(head: nn.Linear, train: TensorDataset, recipe: HeadRecipe) -> nn.Linear:
    """A trained copy of `head`, for pairs of embeddings (width,) and classes; same recipe and machine, same bits."""
    head = copy.deepcopy(head)
    embeddings, targets = train.tensors
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=recipe.max_iterations, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(head(embeddings), targets) + recipe.penalty / 2 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return head
