"""Batch norm with the moments of small parts of a batch, as a small batch would have them (Hoffer, Hubara & Soudry, 2017)."""

import torch
from torch import distributed, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F


class GhostBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A torch batch norm whose batches are normalised `ghost_size` examples at a time.

    The running moments take one step a batch, to the mean of its ghosts' moments, those of all ranks of `group`, which have as
    many examples each.
    """

    ghost_size: int
    group: ProcessGroup | None = None

    def _check_input_dim(self, input: torch.Tensor) -> None:  # noqa: A002  # torch's name for it
        if input.dim() < 2:
            raise ValueError(f"batch norm of a tensor of {input.dim()} dimensions: it needs (N, C, ...)")

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # torch's name for it
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        ghosts = input.split(self.ghost_size)
        if self.training and self.track_running_stats:
            self._remember(ghosts)
        return torch.cat([F.batch_norm(ghost, None, None, self.weight, self.bias, True, 0.0, self.eps) for ghost in ghosts])

    @torch.no_grad()
    def _remember(self, ghosts: tuple[torch.Tensor, ...]) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        others = [0, *range(2, ghosts[0].dim())]
        found = torch.stack([torch.stack(torch.var_mean(ghost.to(self.running_mean), others)) for ghost in ghosts]).mean(0)
        if distributed.is_initialized():
            distributed.all_reduce(found, group=self.group)
            found /= distributed.get_world_size(self.group)
        batches, momentum = self.num_batches_tracked, self.momentum
        if batches is not None:
            batches.add_(1)
        if momentum is None:
            assert batches is not None
            momentum = 1 / float(batches)
        self.running_mean.lerp_(found[1], momentum)
        self.running_var.lerp_(found[0], momentum)


def use_ghosts(model: nn.Module, size: int, group: ProcessGroup | None) -> None:
    """Let every batch norm in `model` normalise `size` examples at a time, in place: parameters, buffers and hooks stay.

    ValueError for a batch norm that does more than torch's, which would be lost.
    """
    for name, module in model.named_modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            module.__class__ = GhostBatchNorm
            module.ghost_size, module.group = size, group
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"{name!r} is a {type(module).__name__}, not one of torch's batch norms: leave out --ghost-batch")
