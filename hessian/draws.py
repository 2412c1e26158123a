"""Random numbers that belong to examples: the same however the data is cut into batches, and whichever process has the part."""

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hessian.batch import count_examples, map_tensors, take_examples, tensors_of


class ExampleDraws:
    """Draws for one batch, each example's from a generator that its values and `seed` seed; they advance with every call.

    The first dimension of a shape counts rows, as many for each example; elsewhere one generator draws for the whole batch.
    """

    def __init__(self, batch: Any, seed: int) -> None:
        self.batch, self.seed = batch, seed

    def uniform(self, shape: Sequence[int]) -> torch.Tensor:
        """Uniform numbers in [0, 1), in float64, on the CPU."""
        return self._rows(shape, lambda part, own: torch.rand(part, generator=own, dtype=torch.float64))

    def signs(self, shape: Sequence[int]) -> torch.Tensor:
        """-1 or 1, as integers, on the CPU."""
        return self._rows(shape, lambda part, own: torch.randint(0, 2, part, generator=own) * 2 - 1)

    def _rows(self, shape: Sequence[int], draw: Callable[[tuple[int, ...], torch.Generator], torch.Tensor]) -> torch.Tensor:
        each = self._by_example if self._by_example and shape[0] % len(self._by_example) == 0 else [self._of_batch]
        part = (shape[0] // len(each), *shape[1:])
        return torch.cat([draw(part, own) for own in each])

    @functools.cached_property
    def _by_example(self) -> list[torch.Generator]:
        batch = map_tensors(lambda tensor: tensor.detach().cpu(), self.batch)
        return [self._seeded(take_examples(batch, slice(row, row + 1))) for row in range(count_examples(batch))]

    @functools.cached_property
    def _of_batch(self) -> torch.Generator:
        return self._seeded(self.batch)

    def _seeded(self, values: Any) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed ^ fingerprint(values))


def fingerprint(batch: Any) -> int:
    """A number that tells batches apart, so that every pass over the data draws the same for the same batch."""
    value = 0
    for tensor in tensors_of(batch):
        value = zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), value)
    return value
