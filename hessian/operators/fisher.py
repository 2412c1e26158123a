"""Fisher matrices: second moments of per-item gradients."""

from typing import Any, Literal, Self

import torch
from torch import nn
from torch.nn import functional as F

from hessian.draws import fingerprint
from hessian.item_losses import item_losses
from hessian.objective import Data, LossFunction, Objective
from hessian.operators.curvature import as_objective
from hessian.operators.gauss_newton import Inner, OuterProductOperator, check_loss_of_outputs
from hessian.output_loss import leaf_copy
from hessian.parameters import Selection
from hessian.torch_losses import is_classification, loss_setting


class Fisher(OuterProductOperator):
    r"""The empirical Fisher matrix, or the one of labels drawn from the model's own predictions.

    .. math:: F = \sum_i s_i \, \nabla \ell_i \nabla \ell_i^\top

    over the items i of the data set with the shares s_i that they have in its loss. `empirical` takes the given targets.
    `sampled` draws one target an item from the distribution that the loss is the negative logarithm of (softmax for
    cross-entropy, Bernoulli for BCEWithLogits, normal for MSE), once, when the operator is made: its expectation is the
    true Fisher matrix (Kunstner et al., 2019), which is the Gauss-Newton matrix of these losses.

    `generator` (of the CPU) draws the targets; None takes the global one. ValueError for a loss without such a
    distribution, and for one that is not a mean over items.
    """

    def __init__(
        self,
        model: nn.Module | Objective,
        loss: LossFunction | None = None,
        data: Data | None = None,
        params: Selection = None,
        *,
        kind: Literal["empirical", "sampled"] = "empirical",
        micro_batch: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if kind not in ("empirical", "sampled"):
            raise ValueError(f"kind {kind!r} is none of 'empirical', 'sampled'")
        objective = as_objective(model, loss, data, micro_batch)
        super().__init__(objective, params=params)
        self.kind = kind
        self._seed = 0
        if kind == "sampled":
            _check_has_distribution(objective.loss)
            self._seed = int(torch.randint(2**62, (), generator=generator))

    def _with(self, params: Selection, objective: Objective | None = None) -> Self:
        other = type(self)(objective or self.objective, params=params)
        other.kind, other._seed = self.kind, self._seed
        return other

    def _inner(self, outputs: Any, batch: Any) -> Inner:
        leaves, copied = leaf_copy(outputs, None)
        targets = self.objective.targets(batch)
        if self.kind == "sampled":
            generator = torch.Generator().manual_seed(self._seed ^ fingerprint(batch))
            losses, shares = _drawn_losses(self.objective, copied, targets, generator)
        else:
            losses, shares = item_losses(self.objective, copied, targets)
        check_loss_of_outputs(losses.sum(), leaves, dict(self.objective.model.named_parameters()))
        dummy = torch.zeros_like(losses, requires_grad=True)
        pulled = torch.autograd.grad(
            losses, leaves, grad_outputs=dummy, create_graph=True, allow_unused=True, materialize_grads=True
        )
        known = [index for index, part in enumerate(pulled) if part.requires_grad]

        def multiply(directions: list[torch.Tensor]) -> list[torch.Tensor]:
            (slopes,) = torch.autograd.grad(
                [pulled[index] for index in known],
                dummy,
                grad_outputs=[directions[index] for index in known],
                retain_graph=True,
            )
            return list(
                torch.autograd.grad(
                    losses, leaves, grad_outputs=shares * slopes, retain_graph=True, allow_unused=True, materialize_grads=True
                )
            )

        return multiply


def _check_has_distribution(loss: LossFunction) -> None:
    smoothed = isinstance(loss, nn.CrossEntropyLoss) and loss.label_smoothing > 0
    known = isinstance(loss, nn.CrossEntropyLoss | nn.BCEWithLogitsLoss | nn.MSELoss) or loss in (
        F.cross_entropy,
        F.binary_cross_entropy_with_logits,
        F.mse_loss,
    )
    weighted = isinstance(loss, nn.BCEWithLogitsLoss) and (loss.pos_weight is not None or loss.weight is not None)
    if weighted:
        raise ValueError("a weighted binary cross-entropy is the negative logarithm of no distribution: use kind='empirical'")
    if not known or smoothed:
        name = f"{type(loss).__name__} with label smoothing" if smoothed else getattr(loss, "__name__", type(loss).__name__)
        raise ValueError(
            f"{name} is the negative logarithm of no distribution known here, so no targets can be drawn: use "
            "kind='empirical', or GaussNewton"
        )


def _drawn_losses(
    objective: Objective, outputs: Any, targets: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of drawn targets, with the shares that the given ones have in the batch's loss, both (M,)."""
    drawn = _draw(objective.loss, outputs, targets, generator)
    weight = loss_setting(objective.loss, "weight", None)
    if not is_classification(objective.loss) or weight is None:
        return item_losses(objective, outputs, drawn)
    valid = (targets != loss_setting(objective.loss, "ignore_index", -100)).reshape(-1)
    losses = F.cross_entropy(outputs, drawn.where(valid.view(drawn.shape), 0), reduction="none").reshape(-1)[valid]
    weights = weight.to(losses)[targets.reshape(-1)[valid].long()]
    return losses, weights if objective.is_sum else weights / weights.sum()


def _draw(loss: LossFunction, outputs: Any, targets: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Targets from the model's own distribution, shaped like the given ones; ignored positions stay ignored."""
    if not isinstance(outputs, torch.Tensor):
        raise ValueError(f"targets are drawn for outputs that are one tensor, not a {type(outputs).__name__}")
    outputs = outputs.detach().double()
    if isinstance(loss, nn.CrossEntropyLoss) or loss is F.cross_entropy:
        if targets.is_floating_point():
            raise ValueError("targets are class probabilities: to draw labels, pass classes as integers")
        probabilities = outputs.softmax(1).movedim(1, -1).cpu()
        drawn = torch.multinomial(probabilities.reshape(-1, probabilities.shape[-1]), 1, generator=generator)
        return drawn.view(targets.shape).to(targets).where(targets != loss_setting(loss, "ignore_index", -100), targets)
    if isinstance(loss, nn.BCEWithLogitsLoss) or loss is F.binary_cross_entropy_with_logits:
        return torch.bernoulli(outputs.sigmoid().cpu(), generator=generator).to(targets)
    # |f - y|^2 / D is the negative logarithm of a normal density in y with variance D / 2, D outputs an example
    noise = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype).to(outputs.device)
    width = 1 if getattr(loss, "reduction", "mean") == "sum" else outputs[0].numel()
    return (outputs + (width / 2) ** 0.5 * noise).to(targets)
