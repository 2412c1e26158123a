"""How the language model is trained: AdamW on windows drawn from the text, warm-up and cosine decay."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm


@dataclass(frozen=True)
class LanguageRecipe:
    """`context`: characters in a window. `warmup`: the share of the steps in which the learning rate rises."""

    steps: int = 1800
    seed: int = 0
    context: int = 64
    batch_size: int = 16
    learning_rate: float = 5e-3
    warmup: float = 0.1
    weight_decay: float = 0.1


def train_language_model(
    model: nn.Module, text: torch.Tensor, recipe: LanguageRecipe, *, progress: str | None = None
) -> nn.Module:
    """A copy of `model` trained to predict each next symbol of `text`, (length,) int64.

    The same recipe, machine and number of threads give the same bits.
    """
    model = copy.deepcopy(model).train()
    generator = torch.Generator().manual_seed(recipe.seed)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]  # norms and biases do not decay
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, recipe.learning_rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=recipe.warmup, cycle_momentum=False
    )
    within = torch.arange(recipe.context + 1)
    for _ in tqdm(range(recipe.steps), desc=progress, disable=progress is None, unit="step"):
        starts = torch.randint(0, len(text) - recipe.context, (recipe.batch_size, 1), generator=generator)
        windows = text[starts + within]
        loss = nn.functional.cross_entropy(model(windows[:, :-1]), windows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()
