r"""Batch norm with the moments of all ranks' examples, as one process has them.

.. math:: y = w \frac{x - \mu}{\sqrt{v + \epsilon}} + b, \qquad
   \frac{\partial L}{\partial x} = \frac{w}{\sqrt{v + \epsilon}} \left(g - \overline{g} - \hat x \, \overline{g \hat x}\right)

with :math:`\mu, v` and the bars means over all examples and positions of all ranks, whose parts may differ in size: one message
forward (each rank's count, mean and variance, combined as Chan, Golub & LeVeque do, 1979), one backward.
"""

from typing import Any

import torch
from torch import distributed, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from parallel.layouts.replicated import summed, used_in_parts


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A torch batch norm of any number of dimensions whose batches are divided among the ranks of `group`."""

    group: ProcessGroup | None = None

    def _check_input_dim(self, input: torch.Tensor) -> None:  # noqa: A002  # torch's name for it
        if input.dim() < 2:
            raise ValueError(f"batch norm of a tensor of {input.dim()} dimensions: it needs (N, C, ...)")

    @property
    def takes_moments(self) -> bool:
        """Whether it normalises by the moments of what it is given, not by those that it remembers."""
        return self.training or self.running_mean is None

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # torch's name for it
        self._check_input_dim(input)
        if not self.takes_moments:
            return super().forward(input)
        result, mean, variance, count = _GlobalBatchNorm.apply(input, self.weight, self.bias, self.eps, self.group)
        if self.training and self.track_running_stats and self.running_mean is not None:
            self._remember(mean, variance, float(count))
        return result

    @torch.no_grad()
    def _remember(self, mean: torch.Tensor, variance: torch.Tensor, count: float) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        batches = self.num_batches_tracked
        if batches is not None:
            batches.add_(1)
        momentum = self.momentum
        if momentum is None:
            assert batches is not None
            momentum = 1 / float(batches)
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_((variance * count / max(count - 1, 1)).to(self.running_var), momentum)


def globalize(model: nn.Module, group: ProcessGroup | None) -> None:
    """Let every batch norm in `model` take its moments over all ranks of `group`, in place: parameters, buffers and hooks stay.

    ValueError for a batch norm that does more than torch's, which would be lost.
    """
    for name, module in model.named_modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, GlobalBatchNorm):
            module.__class__ = GlobalBatchNorm
            module.group = group
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{name!r} is a {type(module).__name__}, not one of torch's batch norms, and cannot take moments over ranks: "
                "use --batch-norm local, or torch's own"
            )


class _GlobalBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        group: ProcessGroup | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, variance, count = _moments(x, group)
        ctx.save_for_backward(x, weight, bias, mean, variance, count)
        ctx.eps, ctx.group = eps, group
        ctx.mark_non_differentiable(mean, variance, count)
        ctx.set_materialize_grads(False)
        kind = x if weight is None else weight
        y = F.batch_norm(x, mean.to(kind), variance.to(kind), weight, bias, False, 0.0, eps)
        return y, mean, variance, count

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        x, weight, bias, mean, variance, count = ctx.saved_tensors
        if torch.is_grad_enabled():  # it is differentiated again: by formulas that autograd sees
            present = [tensor for tensor in (x, weight, bias) if tensor is not None and tensor.requires_grad]
            y = _by_formula(x, weight, bias, ctx.eps, ctx.group)
            found = iter(torch.autograd.grad(y, present, gradient, create_graph=True))
            parts = [next(found) if one is not None and one.requires_grad else None for one in (x, weight, bias)]
            return (*parts, None, None)
        shape = (1, -1) + (1,) * (x.dim() - 2)
        others = [0, *range(2, x.dim())]
        scale = torch.rsqrt(variance + ctx.eps)
        normal = (x.to(mean) - mean.view(shape)) * scale.view(shape)
        of_bias, of_weight = gradient.sum(others, dtype=mean.dtype), (gradient * normal).sum(others)
        sums = torch.cat([of_bias, of_weight])
        distributed.all_reduce(sums, group=ctx.group)
        mean_gradient, mean_product = (sums / count).chunk(2)
        of_x = gradient - mean_gradient.view(shape) - normal * mean_product.view(shape)
        of_x *= (scale if weight is None else scale * weight).view(shape)
        own = (of_weight.to(weight) if weight is not None else None, of_bias.to(bias) if bias is not None else None)
        return of_x.to(x), *own, None, None


def _moments(x: torch.Tensor, group: ProcessGroup | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean (C,), biased variance (C,) and count () over the parts of all ranks, in float32 at least."""
    precision = torch.promote_types(x.dtype, torch.float32)
    count = x.numel() // x.shape[1]
    variance, mean = torch.var_mean(x.to(precision), [0, *range(2, x.dim())], correction=0)
    own = torch.cat([mean, variance, mean.new_tensor([count])])
    if count == 0:
        own = torch.zeros_like(own)
    parts = [torch.empty_like(own) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, own, group=group)
    everybody = torch.stack(parts)
    means, variances = everybody[:, :-1].chunk(2, dim=1)
    counts = everybody[:, -1:]
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    variance = (counts * (variances + (means - mean).square())).sum(0) / total
    return mean, variance, total


def _by_formula(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, group: ProcessGroup | None
) -> torch.Tensor:
    """The same, of operations that can be differentiated any number of times."""
    shape = (1, -1) + (1,) * (x.dim() - 2)
    others = [0, *range(2, x.dim())]
    count = x.new_tensor(float(x.numel() // x.shape[1]))
    distributed.all_reduce(count, group=group)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return (used_in_parts(summed(values.sum(others), group), group) / count).view(shape)

    centred = x - mean(x)
    result = centred * (mean(centred.square()) + eps).rsqrt()
    result = result if weight is None else result * weight.view(shape)
    return result if bias is None else result + bias.view(shape)
