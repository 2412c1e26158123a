"""The first examples of a data set, for what is estimated from few."""

from typing import Any

import torch

from hessian.objective import Objective


def first_examples(objective: Objective, count: int, batch_size: int) -> list[tuple[Any, ...]]:
    """The first `count` examples of all data in small batches; a batch whose targets are not one tensor with a row for each
    stays whole."""
    batches: list[tuple[Any, ...]] = []
    left = count
    for batch in objective.whole_batches():
        if left <= 0:
            break
        size = len(batch[0])
        if all(isinstance(part, torch.Tensor) and part.dim() and len(part) == size for part in batch):
            batches += zip(*(part[:left].split(batch_size) for part in batch), strict=True)
        else:
            batches.append(tuple(batch))
        left -= size
    return batches
