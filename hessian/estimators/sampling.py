"""What estimators by random probes share: counted products, when to look at the error, and standard errors that hold."""

from collections.abc import Iterator, Sequence
from math import sqrt

import torch
from scipy.special import ndtri, stdtrit
from tqdm.auto import tqdm

from hessian.memory import available_bytes
from hessian.operators.base import LinearOperator
from hessian.space import VectorSpace

NORMAL_QUANTILE = float(ndtri(0.975))  # 1.96: an estimate +- this many standard errors is a 95% interval
NOT_FINITE = "the curvature is not finite: the loss has no second derivative here, or overflows"
VECTORS_AT_ONCE = 8  # one pass over the data serves so many
_FEW = 32  # products that are no reason to sample
_MOST_BYTES = 4 * 2**30  # of vectors kept unasked


class Products:
    """The operator's products with rows, a few at a time, counted against a budget of `limit` products."""

    def __init__(self, operator: LinearOperator, limit: int, bar: "tqdm | None" = None) -> None:
        self.operator, self.space = operator, operator.space
        self.limit, self.count = limit, 0
        self._bar = bar

    @property
    def left(self) -> int:
        return self.limit - self.count

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """(K, P) to (K, P) for at most a block of rows; ValueError if the products are not finite."""
        assert 0 < len(rows) <= VECTORS_AT_ONCE
        products = self.operator.rows(rows)
        if not torch.isfinite(self.space.norms(products)).all():
            raise ValueError(NOT_FINITE)
        self.count += len(rows)
        if self._bar is not None:
            self._bar.update(len(rows))
        return products

    def can_multiply_identity(self) -> bool:
        """Whether the budget has room for P products, and this process holds whole vectors."""
        return self.space.size <= self.left and self.space.local_size == self.space.size

    def diagonal(self) -> torch.Tensor:
        """The diagonal, (P,), exactly: P products with the rows of the identity."""
        size, space = self.space.size, self.space
        assert space.local_size == size
        diagonal = torch.empty(size, dtype=space.dtype, device=space.device)
        for start in range(0, size, VECTORS_AT_ONCE):
            stop = min(start + VECTORS_AT_ONCE, size)
            rows = torch.zeros(stop - start, size, dtype=space.dtype, device=space.device)
            rows.diagonal(start).fill_(1)
            diagonal[start:stop] = self.rows(rows).diagonal(start)
        return diagonal


def check_request(operator: object, rtol: float, method: str, choices: Sequence[str]) -> None:
    """TypeError for what is no operator, ValueError for a tolerance or a method that there is not."""
    if not isinstance(operator, LinearOperator):
        raise TypeError(f"a {type(operator).__name__} is no LinearOperator: wrap a matrix in hessian.operators.base.Dense")
    if not rtol >= 0:
        raise ValueError(f"rtol={rtol}: give a relative tolerance of at least 0")
    if method not in choices:
        raise ValueError(f"method {method!r} is none of {', '.join(map(repr, choices))}")


def identity_is_due(products: Products, method: str, first: int, reason: str) -> bool:
    """Whether to multiply by the identity rather than sample, whose first look costs `first` products.

    ValueError where the budget allows neither, or where `exact` was asked for and the identity is out of reach; `reason`
    is why the operator itself offers nothing exact.
    """
    space, limit = products.space, products.limit
    if method == "exact" and space.local_size < space.size:
        raise ValueError(f"nothing exact: {reason}, and no process holds whole vectors; sample with method='auto'")
    if method == "exact" and space.size > limit:
        raise ValueError(
            f"nothing exact: {reason}, and the identity takes {space.size:,} products, more than max_matvecs={limit:,}; "
            "raise max_matvecs or sample with method='auto'"
        )
    if products.can_multiply_identity() and (method == "exact" or space.size <= max(first, _FEW if method == "auto" else 0)):
        return True
    if limit < first:
        least = min(first, space.size)
        raise ValueError(f"max_matvecs={limit}: method {method!r} takes at least {least} products to know its own error")
    return False


def blocks(count: int) -> Iterator[int]:
    """Sizes of the blocks in which `count` vectors are multiplied."""
    for start in range(0, count, VECTORS_AT_ONCE):
        yield min(VECTORS_AT_ONCE, count - start)


def looks(first: int, last: int) -> Iterator[int]:
    """Numbers of probes at which to judge the error: doubling from `first`, and `last` in any case.

    An interval loses coverage with every look at which one may stop. Looks that double are few, and the intervals of
    consecutive looks share only half of their samples.
    """
    count = first
    while count < last:
        yield count
        count *= 2
    yield last


def student_factor(degrees: int) -> float:
    """Student's 97.5% quantile over the normal one: stderr times this makes +- 1.96 stderr a 95% interval."""
    return float(stdtrit(degrees, 0.975)) / NORMAL_QUANTILE


def standard_error(samples: torch.Tensor) -> float:
    r"""The standard error of the mean of independent samples (n,), widened until +- 1.96 of it is a 95% interval.

    .. math:: \frac{s}{\sqrt n} \cdot \frac{t_{0.975, n-1}}{1.96} \cdot
        \Bigl(1 + \frac{1.08\, \hat\gamma^2}{n} \bigl(1 + \tfrac{27}{n}\bigr) \Bigr)

    Samples omega . A omega of a matrix with outliers are about chi-squared: a mean that is too small comes with an s that is
    too small, which Student's t does not allow for. The second-order term for two-sided intervals is, at x = 1.96, the squared
    skewness times (x^4 + 2 x^2 - 3) / 18 = 1.08 (Hall 1992, The Bootstrap and Edgeworth Expansion). 1 + 27/n is how far
    the squared sample skewness of chi-squared samples falls short of 8 (by 2.7, 1.8, 1.4 at n = 16, 32, 64). Measured
    coverage of a rank-one matrix's samples by Student's t alone is 89%, 91%, 93% at these n, and 94%, 95%, 95% so.
    """
    count = len(samples)
    spread = samples.std()
    if spread == 0:
        return 0.0
    if count < 3:  # too few for a skewness
        return float(spread) / sqrt(count) * student_factor(count - 1)
    scores = (samples - samples.mean()) / (spread * sqrt((count - 1) / count))
    skewness = float(scores.pow(3).mean()) * sqrt(count * (count - 1)) / (count - 2)
    return float(spread) / sqrt(count) * student_factor(count - 1) * (1 + 1.08 * skewness**2 / count * (1 + 27 / count))


class Moments:
    """Mean and variance of vectors, entry by entry, without keeping them (Chan, Golub & LeVeque 1983)."""

    mean: torch.Tensor
    _squares: torch.Tensor

    def __init__(self) -> None:
        self.count = 0

    def add(self, rows: torch.Tensor) -> None:
        """Take in samples (K, P)."""
        mean = rows.mean(0)
        squares = (rows - mean).square().sum(0)
        if self.count:
            total = self.count + len(rows)
            shift = mean - self.mean
            squares += self._squares + shift.square() * (self.count * len(rows) / total)
            mean = self.mean + shift * (len(rows) / total)
        self.mean, self._squares = mean, squares
        self.count += len(rows)

    def stderr(self, count: int) -> torch.Tensor:
        """The standard errors (P,), by Student's t, that a mean of `count` such samples has; rounding at the least."""
        spread = (self._squares / (self.count - 1) / count).sqrt() * student_factor(count - 1)
        return torch.hypot(spread, torch.finfo(spread.dtype).eps * self.mean.abs())


def rounding_error(space: VectorSpace, samples: torch.Tensor, rank: int = 0) -> float:
    """What rounding alone does to the mean of inner products `samples` (n,) after orthogonalisation against `rank` rows."""
    return torch.finfo(space.dtype).eps * sqrt(rank + 1) * float(samples.square().mean().sqrt())


def affordable_vectors(space: VectorSpace) -> int:
    """How many vectors an estimator may keep unasked: 4 GiB of them, or a quarter of the free memory if that is less."""
    free = available_bytes(space.device)
    room = _MOST_BYTES if free is None else min(_MOST_BYTES, free // 4)
    return int(space.least(room / max(1, space.local_size * space.dtype.itemsize)))
