r"""Inputs that a network gets wrong though they are close to ones that it gets right.

Each attack moves the inputs of a batch by at most `epsilon` in the largest entry (or, for the trust-region attack, by as little
as it can), and leaves the model as it was: mode, gradients, buffers.
"""

from collections.abc import Callable

import torch
from torch import nn

from hessian.draws import ExampleDraws
from parallel.evaluation_mode import in_evaluation_mode

ATTACKS = ("fgsm", "pgd", "trust-region")

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def attacked(
    name: str, model: nn.Module, loss: Loss, inputs: torch.Tensor, targets: torch.Tensor, epsilon: float, seed: int
) -> torch.Tensor:
    """The inputs as one of `ATTACKS` moves them; the trust-region attack as far as it must, whatever `epsilon` is."""
    match name:
        case "fgsm":
            return fgsm(model, loss, inputs, targets, epsilon)
        case "pgd":
            return pgd(model, loss, inputs, targets, epsilon, seed=seed)
    return trust_region(model, inputs, targets)


def fgsm(model: nn.Module, loss: Loss, inputs: torch.Tensor, targets: torch.Tensor, epsilon: float) -> torch.Tensor:
    r"""The fast gradient sign method, :math:`x + \epsilon \operatorname{sign} \nabla_x \ell(f(x), y)` (Goodfellow et al. 2015,
    section 4)."""
    _check(inputs, epsilon)
    return (inputs + epsilon * _input_gradient(model, loss, inputs, targets).sign()).detach()


def pgd(
    model: nn.Module,
    loss: Loss,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    epsilon: float,
    *,
    steps: int = 10,
    step_size: float | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """Projected gradient ascent of the loss from a random point of the box of half-width `epsilon` (Madry et al. 2018, section
    2.1), drawn for each example by its values and `seed`; step_size: by default 2.5 epsilon / steps."""
    _check(inputs, epsilon)
    if steps < 1:
        raise ValueError(f"steps={steps}: give at least 1")
    step_size = 2.5 * epsilon / steps if step_size is None else step_size
    draws = ExampleDraws((inputs, targets), seed).uniform(inputs.shape)
    found = inputs + epsilon * (2 * draws.to(inputs) - 1)
    for _ in range(steps):
        found = found + step_size * _input_gradient(model, loss, found, targets).sign()
        found = (inputs + (found - inputs).clamp(-epsilon, epsilon)).detach()
    return found


def trust_region(
    model: nn.Module,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    *,
    steps: int = 100,
    radius: float = 0.05,
    candidates: int = 3,
) -> torch.Tensor:
    r"""Small perturbations, in the Euclidean norm, that change the class (Yao et al. 2019, algorithm 1, first order).

    Each step moves along :math:`\nabla_x (z_j - z_y)` to the class j, of the `candidates` most probable others, whose boundary
    is the nearest by the linear model, by at most a radius of its own for each example: it grows by half where at least 0.9 of
    the change that the model foretold came, and shrinks by a third where less than half did. radius: the first, as a share of
    the norm of an example's inputs. Examples that are wrong stay as they are; some may still be right after `steps`.
    """
    if steps < 1 or radius <= 0 or candidates < 1:
        raise ValueError(f"steps={steps}, radius={radius}, candidates={candidates}: give positive numbers")
    found = inputs.detach().clone()
    radii = radius * inputs.flatten(1).norm(dim=1)
    with in_evaluation_mode(model):
        for _ in range(steps):
            margins, direction = _nearest_boundary(model, found, targets, candidates)
            active = margins > 0
            if not bool(active.any()):
                break
            slope = direction.flatten(1).norm(dim=1).clamp(min=1e-30)
            length = torch.minimum(radii, 1.02 * margins / slope) * active
            moved = found + (length / slope).view(-1, *[1] * (inputs.dim() - 1)) * direction
            with torch.no_grad():
                change = margins - _margins(model(moved), targets)
            agreement = change / (length * slope).clamp(min=1e-30)
            radii = torch.where(agreement > 0.9, 1.5 * radii, torch.where(agreement < 0.5, radii / 1.5, radii))
            better = active & (change > 0)
            found = torch.where(better.view(-1, *[1] * (inputs.dim() - 1)), moved, found)
    return found.detach()


def _nearest_boundary(
    model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, candidates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each example's margin to the class whose boundary is nearest, and the gradient of that class's lead."""
    x = inputs.detach().requires_grad_()
    with torch.enable_grad():
        scores = model(x)
        own = scores.gather(1, targets[:, None])
        others = scores.detach().scatter(1, targets[:, None], -torch.inf)
        classes = others.topk(min(candidates, scores.shape[1] - 1), dim=1).indices
        leads = scores.gather(1, classes) - own
        gradients = [torch.autograd.grad(lead.sum(), x, retain_graph=True)[0] for lead in leads.T]
    directions = torch.stack(gradients, 1)
    margins = -leads.detach()
    distances = margins / directions.flatten(2).norm(dim=2).clamp(min=1e-30)
    nearest = distances.argmin(1)
    rows = torch.arange(len(nearest), device=nearest.device)
    wrong = (margins <= 0).any(1)
    return torch.where(wrong, margins.min(1).values, margins[rows, nearest]), directions[rows, nearest]


def _margins(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    own = scores.gather(1, targets[:, None])
    return (own - scores.scatter(1, targets[:, None], -torch.inf).max(1, keepdim=True).values).squeeze(1)


def _input_gradient(model: nn.Module, loss: Loss, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    x = inputs.detach().requires_grad_()
    with in_evaluation_mode(model), torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss(model(x), targets), x)
    return gradient


def _check(inputs: torch.Tensor, epsilon: float) -> None:
    if not inputs.is_floating_point():
        raise ValueError(f"inputs are {inputs.dtype}: an attack moves floating-point numbers")
    if epsilon < 0:
        raise ValueError(f"epsilon={epsilon}: give at least 0")
