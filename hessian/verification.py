"""Can the numbers of this operator be trusted? Checks that every report runs."""

import contextlib
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from hessian.batch import count_examples
from hessian.operators.base import LinearOperator
from hessian.operators.curvature import CurvatureOperator
from hessian.operators.hessian import Hessian
from hessian.space import VectorSpace
from hessian.tables import Table

_ROUNDINGS = 1e3  # how many times epsilon exact identities may be off
_DIFFERENCE = {torch.float64: 1e-2}  # relative error of a finite difference that still speaks for a derivative
_COARSE_DIFFERENCE = 0.5  # in lower precision, whose steps are long enough to cross many kinks of ReLUs


@dataclass(frozen=True)
class Check:
    """One property. value: how far it is off, relative. allowed: how far it may be. detail: what to do about it."""

    name: str
    passed: bool
    value: float
    allowed: float
    detail: str = ""


@dataclass(frozen=True, repr=False)
class Verification(Table):
    """The checks of one operator."""

    checks: list[Check]

    @property
    def ok(self) -> bool:
        """Whether all passed."""
        return all(check.passed for check in self.checks)

    def raise_if_failed(self) -> None:
        """ValueError with every check that failed."""
        failed = [f"{check.name} is off by {check.value:.1e}: {check.detail}" for check in self.checks if not check.passed]
        if failed:
            raise ValueError("; ".join(failed))

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks]}

    def header(self) -> list[str]:
        return ["check", "passed", "off by", "allowed", "detail"]

    def cells(self) -> list[list[str]]:
        return [
            [check.name, "yes" if check.passed else "NO", f"{check.value:.1e}", f"{check.allowed:.1e}", check.detail]
            for check in self.checks
        ]


def verify(A: LinearOperator, *, generator: torch.Generator | None = None) -> Verification:
    """Check an operator: symmetry, linearity and determinism; a curvature operator also for what its data and model do.

    `determinism` names dropout, data that change between passes and batch norm in training mode where it can find them;
    `finite differences` (Hessian only) compares products with differences of gradients; `batch invariance` compares the loss
    and the gradient of the data with those of the same data cut into smaller batches. About eight products.

    >>> import torch, hessian
    >>> hessian.verify(hessian.Dense(torch.eye(3))).ok
    True
    """
    space = A.space
    vectors = space.random(2, "normal", generator)
    products = A.rows(vectors)
    exact = _ROUNDINGS * torch.finfo(A.dtype).eps
    if isinstance(A, CurvatureOperator) and A.method == "finite differences":
        exact = 1e-2 if A.dtype == torch.float32 else 1e-4
    scale = float(space.norms(products).max()) * float(space.norms(vectors).max())
    gram = space.gram(vectors, products)
    asymmetry = float((gram[0, 1] - gram[1, 0]).abs()) / scale if scale else 0.0
    mixed = A.rows((vectors[0] + 2 * vectors[1]).unsqueeze(0))[0]
    again = _under_other_random_numbers(A, vectors)
    culprits = _culprits(A)
    checks = [
        _check("symmetry", asymmetry, exact, "u . A v and v . A u differ: the operator is not a symmetric matrix" + culprits),
        _check(
            "linearity",
            _distance(space, mixed, products[0] + 2 * products[1]),
            exact,
            "A (u + 2 v) is not A u + 2 A v" + culprits,
        ),
        _check(
            "determinism",
            _distance(space, again[0], products[0]),
            exact,
            "the same product twice differs" + (culprits or ": data or model change from pass to pass"),
        ),
    ]
    if isinstance(A, CurvatureOperator):
        if isinstance(A, Hessian):
            checks.append(_finite_differences(A, vectors[0], products[0]))
        checks.append(_batch_invariance(A))
        checks.append(_modes(A.objective.model))
    return Verification(checks)


def _check(name: str, value: float, allowed: float, remedy: str) -> Check:
    passed = value <= allowed  # which NaN is not
    return Check(name, passed, value, allowed, "" if passed else remedy)


def _distance(space: VectorSpace, found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|, (P,) both; 0 where both are zero."""
    difference, size = space.norms(torch.stack([found - expected, expected])).tolist()
    return difference / size if size else float(difference > 0)


def _under_other_random_numbers(A: LinearOperator, vectors: torch.Tensor) -> torch.Tensor:
    """The product again, from a new graph and another state of the global generators: what draws from them shows."""
    operator = A.anew() if isinstance(A, CurvatureOperator) else A
    with torch.random.fork_rng([A.device] if A.device.type == "cuda" else []):
        torch.manual_seed(torch.initial_seed() + 1)
        return operator.rows(vectors)


def _finite_differences(A: Hessian, vector: torch.Tensor, product: torch.Tensor) -> Check:
    """Directional derivative of the gradient along the product's own direction, where it is largest: the nearest of differences
    over shorter and shorter steps. A kink of a ReLU within a step makes that one wrong; wrong products make all of them so."""
    length = float(A.space.norms(product.unsqueeze(0))[0])
    direction = product / length if length else vector
    expected, allowed, nearest = A @ direction, _DIFFERENCE.get(A.dtype, _COARSE_DIFFERENCE), float("inf")
    with contextlib.closing(A.difference_products(direction)) as differences:
        for found in differences:
            nearest = min(nearest, _distance(A.space, found, expected))
            if nearest <= allowed:
                break
    return _check(
        "finite differences",
        nearest,
        allowed,
        "products are not the derivative of the gradient: a custom autograd function whose backward cannot be differentiated, "
        "or a loss with kinks at this point",
    )


def _batch_invariance(A: CurvatureOperator) -> Check:
    """The loss and gradient of the data against those of the same data in batches of about half the size."""
    objective = A.objective
    name, remedy = "batch invariance", "the loss of the data depends on how they are cut into batches"
    largest = max(objective.gathered(lambda: max(map(count_examples, objective.batches()), default=0)))
    if largest < 2:
        return Check(name, True, 0.0, 0.0, "one example a batch: nothing to cut")
    try:
        value, gradient = A.loss_and_gradient()
        other_value, other = A.anew(objective.over(objective.data, -(-largest // 2))).loss_and_gradient()
    except (RuntimeError, ValueError) as error:
        return Check(name, False, float("nan"), 0.0, f"a smaller batch fails: {str(error).splitlines()[0]}")
    training = [name for name, module in objective.model.named_modules() if _is_batch_norm(module) and module.training]
    if training:
        remedy += f": batch norm {training[0]!r} is in training mode; call model.eval()"
    else:
        remedy += ": it is no mean over examples; count what it averages over with Objective(..., items=...)"
    size = max(float(A.space.norms(torch.stack([gradient, other])).max()), torch.finfo(A.dtype).tiny)
    off = float(A.space.norms((gradient - other).unsqueeze(0))[0]) / size
    off_value = abs(value - other_value) / abs(value) if value else abs(other_value)
    return _check(name, max(off, off_value), 10 * _ROUNDINGS * torch.finfo(A.dtype).eps, remedy)


def _modes(model: nn.Module) -> Check:
    """Dropout and batch norm in training mode are legal, and seldom meant."""
    names = [
        name for name, module in model.named_modules() if module.training and (_is_dropout(module) or _is_batch_norm(module))
    ]
    if not names:
        return Check("evaluation mode", True, 0.0, 0.0)
    shown = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return Check(
        "evaluation mode",
        False,
        float(len(names)),
        0.0,
        f"{shown} in training mode: the curvature is that of one random draw "
        "or of batch statistics; call model.eval() unless that is meant",
    )


def _culprits(A: LinearOperator) -> str:
    """Modules that make products random, as the end of a sentence."""
    if not isinstance(A, CurvatureOperator):
        return ""
    dropout = [name for name, module in A.objective.model.named_modules() if module.training and _is_dropout(module)]
    return f": dropout {dropout[0]!r} is on; call model.eval()" if dropout else ""


def _is_dropout(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
