"""The diagonal of a matrix known by its products, with an honest standard error for every entry."""

from dataclasses import dataclass, replace
from math import inf, isfinite, isnan, log2, nan, sqrt
from typing import Literal, get_args

import torch

from hessian.estimators.leave_one_out import RangeBasis, left_out, pair_weights
from hessian.estimators.sampling import (
    NOT_FINITE,
    Moments,
    Products,
    affordable_vectors,
    blocks,
    check_request,
    identity_is_due,
    looks,
    student_factor,
)
from hessian.operators.base import LinearOperator, NotExactError
from hessian.progress import up_to
from hessian.space import VectorSpace

DiagonalMethod = Literal["auto", "exact", "xdiag", "hutchinson"]

_FIRST_PRODUCTS = {"hutchinson": 8, "xdiag": 16, "auto": 16}  # before the first look at the error
_DEFAULT_PRODUCTS = {"exact": 4096, "hutchinson": 1024, "xdiag": 256, "auto": 1024}
_MAX_PROBES = 128  # that `auto` keeps, however small the vectors
_VECTORS_A_PROBE = 2.25  # in the operator's precision, the signs being 8-bit integers
_CHUNK = 2**22  # numbers, of XDiag's samples, at a time
_FINEST = 1e-6  # relative tolerance to plan for where a finer one is asked for
_SLOWEST = 0.125  # power of the number of products by which an error falls, below which there is no planning by it


@dataclass(frozen=True, eq=False)
class Diagonal:
    """A diagonal and how well each entry is known.

    value: (P,), in the matrix's units. stderr: (P,), value +- 1.96 stderr is a 95% interval for each entry by itself; 0
    when exact. num_matvecs: products spent. method: the estimator that gave the value. converged: whether the root of the
    summed squared stderr is at most rtol times the norm of value.
    """

    value: torch.Tensor
    stderr: torch.Tensor
    num_matvecs: int
    method: str
    converged: bool

    def _repr_html_(self) -> str:
        cells = [f"{len(self.value):,}", f"{float(self.value.sum(dtype=torch.float64)):.6g}"]
        cells += [f"{float(self.value.min()):.4g} to {float(self.value.max()):.4g}"]
        cells += [f"{float(self.stderr.norm()):.2g} of {float(self.value.norm()):.4g}"]
        cells += [f"{self.num_matvecs:,}", self.method, "yes" if self.converged else "NO"]
        names = ("entries", "sum", "range", "norm of errors and of values", "products", "method", "converged")
        head, body = "".join(f"<th>{name}</th>" for name in names), "".join(f"<td>{cell}</td>" for cell in cells)
        return f"<table><thead><tr>{head}</tr></thead><tbody><tr>{body}</tr></tbody></table>"


def diagonal(
    A: LinearOperator,
    rtol: float = 0.1,
    method: DiagonalMethod = "auto",
    *,
    max_matvecs: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Diagonal:
    r"""The diagonal of a symmetric (P, P) operator, definite or not, by as many products as the tolerance needs.

    .. math:: \mathrm{diag}\, A = \mathrm{diag}(Q Q^\top A) + \mathbb E\, \omega \circ (I - Q Q^\top) A\, \omega

    for vectors omega of random signs, and any Q with orthonormal columns that is independent of omega.

    - `exact`: the operator's own exact diagonal if it offers one, else P products with the identity; stderr is 0.
    - `hutchinson` (Bekas, Kokiopoulou & Saad 2007): the mean of omega * A omega, without Q. One product a probe, no memory.
    - `xdiag` (Epperly, Tropp & Webber 2024): Q spans all products but that of omega itself. Two products a probe; keeps
      1.125 `max_matvecs` vectors. Far better where eigenvalues decay, worse where they do not.
    - `auto`: exact where that is offered, or costs no more than sampling would. Else XDiag, unless at its rate of convergence
      so far `hutchinson`, whose error the same probes tell, will take fewer products. Once memory is used up (288 vectors,
      4 GiB, or a quarter of the free memory), Q stays and fresh probes, one product each, sample the rest: `diag++` (Baston &
      Nakatsukasa 2022).

    The probes double until the root of the summed squared stderr is at most `rtol` times the norm of value, or `max_matvecs`
    products are spent (default: 1024; 256 for `xdiag`; 4096 for `exact`); `converged` says which. Where P is at most the
    products before the first look (8 for `hutchinson`, 16 for `xdiag`, 32 for `auto`) all methods multiply by the identity.

    `stderr` includes Student's t. XDiag's is the jackknife's (`DiagonalSketch.xdiag`), which errs on the large side. Measured
    over all entries and many seeds, the intervals cover the truth for 94% to 100% of the entries.

    Raises ValueError for an unknown method, a tolerance that is negative or NaN, too small a budget, an exact diagonal that
    is not to be had, and products that are not finite. TypeError for what is no operator.

    >>> import torch, hessian
    >>> hessian.diagonal(hessian.Dense(torch.tensor([[2.0, 1.0], [1.0, 3.0]]))).value
    tensor([2., 3.])
    """
    check_request(A, rtol, method, get_args(DiagonalMethod))
    reason = ""
    if method in ("auto", "exact"):
        try:
            return _exact(A.space, A.exact_diagonal(), 0)
        except NotExactError as error:
            reason = str(error)
    limit = _DEFAULT_PRODUCTS[method] if max_matvecs is None else max_matvecs
    with up_to(limit, "diagonal", "product", progress=progress) as bar:
        products = Products(A, limit, bar)
        if identity_is_due(products, method, _FIRST_PRODUCTS.get(method, 0), reason):
            return _exact(products.space, products.diagonal(), products.count)
        if method == "hutchinson":
            return _sample(products, Moments(), None, rtol, generator)
        return _xdiag(products, rtol, generator, may_change=method == "auto")


def _exact(space: VectorSpace, value: torch.Tensor, num_matvecs: int) -> Diagonal:
    if not isfinite(_norm(space, value)):
        raise ValueError(NOT_FINITE)
    return Diagonal(value, torch.zeros_like(value), num_matvecs, "exact", True)


def _norm(space: VectorSpace, vector: torch.Tensor) -> float:
    return float(space.norms(vector.unsqueeze(0)))


def _sampled(products: Products, rtol: float, method: str, value: torch.Tensor, stderr: torch.Tensor) -> Diagonal:
    space = products.space
    return Diagonal(value, stderr, products.count, method, _norm(space, stderr) <= rtol * _norm(space, value))


def _xdiag(products: Products, rtol: float, generator: torch.Generator | None, may_change: bool) -> Diagonal:
    """XDiag; if it may change, to something cheaper as soon as there is."""
    sketch, space = DiagonalSketch(products), products.space
    most = products.limit // 2
    if may_change:
        most = min(most, _MAX_PROBES, int(affordable_vectors(space) / _VECTORS_A_PROBE))
    first = _FIRST_PRODUCTS["xdiag"] // 2
    before = nan
    for target in looks(first, max(most, first)):
        sketch.grow(target, generator)
        result = _sampled(products, rtol, "xdiag", *sketch.xdiag())
        if result.converged or sketch.is_complete:
            return result
        if may_change:
            error = _norm(space, result.stderr)
            goal = max(rtol, _FINEST) * (_norm(space, result.value) or error)
            plain = target * ((_norm(space, sketch.moments.stderr(target)) / goal) ** 2 - 1)
            error /= student_factor(target - 1)
            grown = _products_to_go(2 * target, before, error, goal)
            if products.can_multiply_identity() and min(plain, grown) >= space.size:
                return _exact(products.space, products.diagonal(), products.count)
            if plain < grown:
                return _sample(products, sketch.moments, None, rtol, generator, result)
            before = error
    if may_change and products.left >= _FIRST_PRODUCTS["hutchinson"]:
        return _sample(products, Moments(), sketch, rtol, generator, result)
    return result


def _products_to_go(num_matvecs: int, before: float, error: float, goal: float) -> float:
    """How many products more bring the error down to the goal, if it falls on as it did while their number doubled.

    inf where it hardly fell. Where it is not known `before`, NaN, another doubling is all that one can tell.
    """
    if isnan(before):
        return float(num_matvecs)
    rate = log2(before / error)
    return num_matvecs * ((error / goal) ** (1 / rate) - 1) if rate > _SLOWEST else inf


def _sample(
    products: Products,
    moments: Moments,
    sketch: "DiagonalSketch | None",
    rtol: float,
    generator: torch.Generator | None,
    known: Diagonal | None = None,
) -> Diagonal:
    """Hutchinson's estimator, going on from `moments`, of what the sketch's basis leaves over (None: of everything).

    With a diagonal that is `known` so far, stops once the identity is cheaper, and gives that one back if it stays the better.
    """
    space = products.space
    method, inside, basis = "hutchinson", None, RangeBasis(space)
    if sketch is not None:
        method, inside, basis = "diag++", sketch.inside(), sketch.basis
    result = known
    for target in looks(max(_FIRST_PRODUCTS["hutchinson"], 2 * moments.count), moments.count + products.left):
        for count in blocks(target - moments.count):
            probes = space.random(count, "rademacher", generator)
            images = products.rows(probes)
            moments.add(probes * basis.without_projection(images, basis.coordinates(images)))
        value = moments.mean if inside is None else inside + moments.mean
        result = _sampled(products, rtol, method, value, moments.stderr(target))
        if result.converged:
            return result
        if known is not None and products.can_multiply_identity():
            tolerance = rtol * _norm(space, value)
            needed = target * (_norm(space, result.stderr) / tolerance) ** 2 if tolerance else inf
            if needed - target >= space.size:
                return _exact(products.space, products.diagonal(), products.count)
    assert result is not None
    if known is not None and _norm(space, known.stderr) < _norm(space, result.stderr):
        return replace(known, num_matvecs=products.count)
    return result


class DiagonalSketch:
    """A basis Q of all products A omega, with A Q, and the probes omega, random signs."""

    def __init__(self, products: Products) -> None:
        self.products, self.space = products, products.space
        self.basis = RangeBasis(self.space)
        self.moments = Moments()  # of omega * A omega
        self.is_complete = False  # whether the basis holds the matrix's whole range, to rounding
        self._triangle = torch.zeros(0, 0, dtype=torch.float64)  # Q^T A omega, (rank, probes)
        self._images: list[torch.Tensor] = []  # A Q
        self._signs: list[torch.Tensor] = []

    def grow(self, num_probes: int, generator: torch.Generator | None) -> None:
        """Draw probes until there are `num_probes`: two products each."""
        for count in blocks(num_probes - self.moments.count):
            probes = self.space.random(count, "rademacher", generator)
            images = self.products.rows(probes)
            self.moments.add(probes * images)
            self._signs.append(probes.to(torch.int8))
            new, coordinates = self.basis.extend(images)
            below = torch.zeros(len(new), self._triangle.shape[1], dtype=torch.float64)
            self._triangle = torch.cat([torch.cat([self._triangle, below]), coordinates], dim=1)
            self.is_complete |= len(new) < count
            if len(new):
                self._images.append(self.products.rows(new))

    def inside(self) -> torch.Tensor:
        """The diagonal of Q Q^T A, (P,)."""
        total = torch.zeros_like(self.moments.mean)
        for rows, images in zip(self.basis.blocks, self._images, strict=True):
            total += (rows * images).sum(0)
        return total

    def xdiag(self) -> tuple[torch.Tensor, torch.Tensor]:
        r"""XDiag, the mean of the samples below, and its standard errors by the jackknife, both (P,).

        .. math:: d_j = \mathrm{diag}(Q_{(j)} Q_{(j)}^\top A) + \omega_j \circ (I - Q_{(j)} Q_{(j)}^\top) A\, \omega_j

        Q_(j), the basis without product j, is Q without the direction s_j. With u = Q s and v = A Q s for that and r_jj =
        s_j . R e_j, the sample is diag(Q Q^T A) - u_j * v_j + r_jj omega_j * u_j. Without probe i as well, the second direction
        lost is s_j less its part along s_i, normalised; with c = s_i . s_j and a = 1 / (1 - c^2),

        .. math:: d_{ij} = \mathrm{diag}(Q Q^\top A) - u_i v_i - a (u_j - c\, u_i)(v_j - c\, v_i)
            + a\, r_{jj}\, \omega_j (u_j - c\, u_i),

        and the jackknife's replicate S_(i) is the mean over j. Why the jackknife: see `TraceSketch.xtrace`.
        """
        count = self.moments.count
        S = left_out(self._triangle)
        cosines, weights = pair_weights(S)
        numbers = [S, weights, cosines, (S * self._triangle).sum(0)]
        on_device = [number.to(self.space.device) for number in numbers]
        pieces = []
        for start in range(0, self.space.local_size, max(1, _CHUNK // count)):
            chosen = slice(start, start + max(1, _CHUNK // count))
            Q, Z = self._columns(self.basis.blocks, chosen), self._columns(self._images, chosen)
            pieces.append(_xdiag_entries(Q, Z, self._columns(self._signs, chosen), *on_device))
        value, stderr, size = torch.cat(pieces, dim=1)
        rounding = torch.finfo(self.space.dtype).eps * sqrt(self.basis.rank + 1) * size
        stderr = torch.hypot(stderr * student_factor(count - 1), rounding)
        return value.to(self.space.dtype), stderr.to(self.space.dtype)

    def _columns(self, rows: list[torch.Tensor], chosen: slice) -> torch.Tensor:
        """Some entries of all rows, float64."""
        empty = torch.zeros(0, self.space.local_size, device=self.space.device, dtype=torch.float64)[:, chosen]
        return torch.cat([empty, *(block[:, chosen].double() for block in rows)])


def _xdiag_entries(
    Q: torch.Tensor,
    Z: torch.Tensor,
    signs: torch.Tensor,
    S: torch.Tensor,
    weights: torch.Tensor,
    cosines: torch.Tensor,
    scales: torch.Tensor,
) -> torch.Tensor:
    """For some entries, by the formulas of `DiagonalSketch.xdiag`: XDiag, the jackknife's error, the size of what is summed."""
    count = len(signs)
    U, V = S.T @ Q, S.T @ Z
    UV, outside = U * V, scales[:, None] * signs * U
    inside = (Q * Z).sum(0)
    mixed = weights * cosines
    pairs = weights @ (outside - UV) + V * (mixed @ U) + U * (mixed @ (V - scales[:, None] * signs))
    pairs -= (mixed * cosines).sum(1)[:, None] * UV
    replicates = inside - UV + pairs / (count - 1)
    stderr = (replicates.var(0, correction=0) * count).sqrt()
    return torch.stack([inside + (outside - UV).mean(0), stderr, (Q * Z).abs().sum(0)])
