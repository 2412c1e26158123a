"""The examples of the steps to come, as a rank passes them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from hessian.batch import map_tensors
from parallel.augmentation import Augmentation
from parallel.data_order import DataOrder, micro_batches, share


@dataclass(frozen=True)
class Part:
    """This rank's examples of one pass, the batch that they are mixed with, if any, and the position in the step's batch of the
    first of them."""

    batch: Any
    partners: Any
    first: int


class StepBatches:
    """This rank's parts of batches in the order of `seed`, augmented, on its device.

    group: the rank's number among the `groups` that share a batch. workers: processes that load.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        order: DataOrder,
        augmentation: Augmentation,
        device: torch.device,
        *,
        group: int,
        groups: int,
        workers: int = 0,
    ) -> None:
        self.dataset, self.order, self.augmentation, self.device = dataset, order, augmentation, device
        self.group, self.groups, self.workers = group, groups, workers

    def steps(self, step: int, first: int, size: int, passes: int) -> Iterator[list[Part]]:
        """The passes of one step after the other, endlessly: from step `step` and position `first` on, `size` examples each."""
        loader = DataLoader(
            self.dataset,
            batch_sampler=self._chosen(step, first, size, passes),
            num_workers=self.workers,
            collate_fn=list,
            generator=torch.Generator(),
        )
        loaded = iter(loader)
        while True:
            yield [self._part(next(loaded), step, size, passes, number) for number in range(passes)]
            step += 1

    def examples(self, first: int, count: int) -> Any:
        """This rank's of `count` examples from position `first` on, as they are in the data set."""
        start, stop = share(first, first + count, self.group, self.groups)
        items = [self.dataset[index] for index in self.order.take(start, stop - start)]
        return self._moved(items)

    def _chosen(self, step: int, first: int, size: int, passes: int) -> Iterator[list[int]]:
        while True:
            batch = self.order.take(first, size)
            partners = self.augmentation.partners(step, batch) if self.augmentation.mixup else []
            for start, stop in micro_batches(0, size, passes, self.group, self.groups):
                yield batch[start:stop] + partners[start:stop]
            step, first = step + 1, first + size

    def _part(self, items: list[Any], step: int, size: int, passes: int, number: int) -> Part:
        start, stop = list(micro_batches(0, size, passes, self.group, self.groups))[number]
        halves: list[Any] = [self._moved(half) if half else None for half in (items[: stop - start], items[stop - start :])]
        for batch in halves:
            if batch is not None and self.augmentation.changes_images:
                batch[0] = self.augmentation.images(batch[0], step, size, start)
        return Part(halves[0], halves[1], start)

    def _moved(self, items: list[Any]) -> Any:
        return map_tensors(lambda tensor: tensor.to(self.device), default_collate(items))
