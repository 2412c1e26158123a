"""Slow, obvious answers that fast code is checked against."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

from hawq.allocate import Budget


def dense_hessian(model: nn.Module, scalar_loss: Callable[[nn.Module], torch.Tensor], names: Sequence[str]) -> torch.Tensor:
    """The Hessian of scalar_loss(model) in the named parameters, one second derivative after the other."""
    parameters = [dict(model.named_parameters())[name] for name in names]
    gradients = torch.autograd.grad(scalar_loss(model), parameters, create_graph=True, allow_unused=True)
    rows = []
    for gradient, parameter in zip(gradients, parameters, strict=True):
        for index in range(parameter.numel()):
            if gradient is None or not gradient.requires_grad:
                rows.append(torch.cat([torch.zeros(p.numel(), dtype=p.dtype) for p in parameters]))
                continue
            row = torch.autograd.grad(gradient.reshape(-1)[index], parameters, retain_graph=True, allow_unused=True)
            pieces = zip(row, parameters, strict=True)
            rows.append(torch.cat([(torch.zeros_like(p) if r is None else r).reshape(-1) for r, p in pieces]).detach())
    return torch.stack(rows)


def jacobian(model: nn.Module, values: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """The derivatives of every entry of `values` in the named parameters, (entries, P), one backward pass each."""
    parameters = [dict(model.named_parameters())[name] for name in names]
    rows = []
    for value in values.reshape(-1):
        row = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        pieces = zip(row, parameters, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if r is None else r).reshape(-1) for r, p in pieces]))
    return torch.stack(rows)


def dense_gauss_newton(
    model: nn.Module, loss: Callable[..., torch.Tensor], data: Sequence[torch.Tensor], names: Sequence[str]
) -> torch.Tensor:
    """J^T A J with A the dense Hessian of the loss in all outputs."""
    outputs = model(data[0])
    inner = torch.autograd.functional.hessian(
        lambda flat: loss(flat.view(outputs.shape), data[1]), outputs.detach().reshape(-1)
    )
    factor = jacobian(model, outputs, names)
    return factor.T @ inner @ factor


def block_traces(matrix: torch.Tensor, sizes: Mapping[str, int]) -> dict[str, float]:
    """The traces of the diagonal blocks of those sizes."""
    pieces = matrix.diagonal().split(list(sizes.values()))
    return {name: float(piece.sum()) for name, piece in zip(sizes, pieces, strict=True)}


def true_traces(
    model: nn.Module, loss: Callable[..., torch.Tensor], data: Sequence[torch.Tensor], names: Iterable[str]
) -> dict[str, float]:
    """The traces of the named parameters' diagonal blocks, from the dense matrix."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if name in set(names)}
    return block_traces(dense_hessian(model, lambda m: loss(m(data[0]), data[1]), list(sizes)), sizes)


def best_allocation(
    table: Mapping[str, Mapping[int, float]], budgets: Sequence[Budget], ties: Sequence[Sequence[str]]
) -> float | None:
    """The least objective over all assignments; None if no assignment keeps the budgets."""
    names = list(table)
    best = None
    for widths in itertools.product(*(table[name] for name in names)):
        bits = dict(zip(names, widths, strict=True))
        if any(len({bits[name] for name in tie}) > 1 for tie in ties):
            continue
        if any(_spent(budget, bits) > budget.limit for budget in budgets):
            continue
        objective = sum(table[name][bits[name]] for name in names)
        best = objective if best is None else min(best, objective)
    return best


def _spent(budget: Budget, bits: Mapping[str, int]) -> float:
    alone = sum(row[bits[name]] for name, row in budget.costs.items())
    return alone + sum(costs[bits[one], bits[other]] for (one, other), costs in budget.products.items())


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything of a model that a library must leave as it was."""
    state = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return {
        "state": state,
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()],
        "hooks": [(len(module._forward_hooks), len(module._backward_hooks)) for module in model.modules()],
    }


def assert_unchanged(model: nn.Module, before: Mapping[str, object]) -> None:
    after = snapshot(model)
    for name in ("training", "requires_grad", "hooks"):
        assert after[name] == before[name], name
    old, new = before["state"], after["state"]
    assert isinstance(old, dict)
    assert isinstance(new, dict)
    assert list(old) == list(new)
    assert all(torch.equal(old[name], new[name]) for name in old)
    for one, other in zip(before["grads"], after["grads"], strict=True):  # type: ignore[call-overload]
        assert (one is None and other is None) or torch.equal(one, other)


CLASS_WEIGHTS = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)


def names_of(model):
    return [name for name, _ in model.named_parameters()]


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


def in_batches(data, split):
    return list(zip(data[0].split(split), data[1].split(split), strict=True))


def empirical_fisher(model, losses, shares, names):
    """sum_i s_i g_i g_i^T from one backward pass an item."""
    gradients = jacobian(model, losses, names)
    return gradients.T @ (shares[:, None] * gradients)
