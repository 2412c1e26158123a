"""Which examples a step sees: one endless order for every number of ranks.

Permutations of the data set follow each other without a gap, and a step takes the next `batch_size` of them: every batch is
full, and every example comes once in each epoch. Random numbers are keyed by what they are for, not by how many were drawn
before, so a run can begin anywhere and on any number of ranks.
"""

import hashlib
from collections.abc import Iterator
from functools import lru_cache

import torch


def keyed_generator(*key: int | str) -> torch.Generator:
    """Random numbers that depend on `key` alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)


class DataOrder:
    """The order of `size` examples by `seed`."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._permutation = lru_cache(2)(self._of_epoch)

    def take(self, start: int, count: int) -> list[int]:
        """The examples at positions `start` to `start + count` of the endless order."""
        found: list[int] = []
        while len(found) < count:
            epoch, first = divmod(start + len(found), self.size)
            found += self._permutation(epoch)[first : first + count - len(found)]
        return found

    def _of_epoch(self, epoch: int) -> list[int]:
        return torch.randperm(self.size, generator=keyed_generator("order", self.seed, epoch)).tolist()


def share(start: int, stop: int, rank: int, ranks: int) -> tuple[int, int]:
    """The part of positions `start` to `stop` that is this rank's: parts follow each other and differ by one at most.

    >>> [share(0, 7, rank, 3) for rank in range(3)]
    [(0, 2), (2, 4), (4, 7)]
    """
    count = stop - start
    return start + count * rank // ranks, start + count * (rank + 1) // ranks


def micro_batches(first: int, batch_size: int, accumulate: int, rank: int, ranks: int) -> Iterator[tuple[int, int]]:
    """This rank's positions in each of the `accumulate` equal parts of the batch that begins at position `first`."""
    size = batch_size // accumulate
    for start in range(first, first + batch_size, size):
        yield share(start, start + size, rank, ranks)
