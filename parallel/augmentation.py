"""Changes to a batch's images, the same for an example whichever rank has it.

Random numbers are drawn for the whole batch of a step, from a generator keyed by the step, and every rank uses those of its
own examples.
"""

from dataclasses import dataclass

import numpy as np
import torch

from parallel.data_order import keyed_generator


@dataclass(frozen=True)
class Augmentation:
    """mixup: alpha of the beta distribution (Zhang et al., 2018), 0 for none; flip: mirror half of the images; shift: move by
    up to so many pixels each way, zeros coming in at the border."""

    seed: int = 0
    mixup: float = 0.0
    flip: bool = False
    shift: int = 0

    @property
    def changes_images(self) -> bool:
        """Whether inputs must be images."""
        return self.flip or self.shift > 0

    def share(self, step: int) -> float:
        """How much of each example is its own in this step; the rest is its partner's."""
        if self.mixup <= 0:
            return 1.0
        own = keyed_generator("mixup", self.seed, step)
        random = np.random.default_rng(int(torch.randint(2**62, (), generator=own)))
        return float(random.beta(self.mixup, self.mixup))

    def partners(self, step: int, indices: list[int]) -> list[int]:
        """The example that each of the step's is mixed with: the batch's own, in another order."""
        order = torch.randperm(len(indices), generator=keyed_generator("partners", self.seed, step))
        return [indices[position] for position in order.tolist()]

    def images(self, images: torch.Tensor, step: int, batch_size: int, first: int) -> torch.Tensor:
        """Images (N, C, H, W), flipped and shifted, that are numbers `first` to `first + N` of the step's batch.

        Raises ValueError for inputs that are no images, and for shifts that would leave nothing of them.
        """
        if not self.changes_images:
            return images
        if images.dim() != 4:
            raise ValueError(
                f"--flip and --shift move images (N, C, H, W), and the inputs have {images.dim()} dimensions: leave them out"
            )
        if self.shift >= min(images.shape[2:]):
            raise ValueError(f"--shift {self.shift}: the images have {images.shape[2]} x {images.shape[3]} pixels: give fewer")
        own = slice(first, first + len(images))
        random = keyed_generator("images", self.seed, step)
        mirrored = torch.randint(0, 2, (batch_size,), generator=random)[own].bool()
        moves = torch.randint(-self.shift, self.shift + 1, (batch_size, 2), generator=random)[own]
        if self.flip:
            images = torch.where(mirrored.to(images.device)[:, None, None, None], images.flip(3), images)
        return shifted(images, moves) if self.shift else images


def shifted(images: torch.Tensor, moves: torch.Tensor) -> torch.Tensor:
    """Images (N, C, H, W), each moved by its own whole (rows, columns) of `moves` (N, 2)."""
    for dim, by in ((2, moves[:, 0]), (3, moves[:, 1])):
        size = images.shape[dim]
        source = torch.arange(size) - by[:, None]  # (N, size): where each line comes from
        inside = ((source >= 0) & (source < size)).to(images.device)
        shape = (len(images), 1, size, 1) if dim == 2 else (len(images), 1, 1, size)
        index = source.clamp(0, size - 1).to(images.device).view(shape).expand_as(images)
        images = images.gather(dim, index) * inside.view(shape).to(images.dtype)
    return images
