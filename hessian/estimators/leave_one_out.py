r"""Estimates from a basis of which every probe is left out in turn.

The basis Q spans the products A omega_1, ..., A omega_m of all probes. Leaving probe i out means a basis with one direction
less, and that direction is known without another product: with A Omega = Q R it is Q s_i, where s_i is the normalised i-th
column of R^-T, the one vector orthogonal to all columns of R but the i-th (Epperly, Tropp & Webber 2024, section 2.4).
"""

from math import hypot
from typing import NamedTuple

import torch

from hessian.estimators.sampling import Products, blocks, rounding_error, standard_error, student_factor
from hessian.space import VectorSpace

_LOST = 20.0  # what is left of a product counts as rounding below this many times epsilon, relative to the product

_PARALLEL = 1e-12  # squared sine of an angle below which rounding decides on it


class RangeBasis:
    """Orthonormal rows Q that span all vectors given to `extend`, in blocks of a few."""

    def __init__(self, space: VectorSpace) -> None:
        self.space = space
        self.blocks: list[torch.Tensor] = []

    @property
    def rank(self) -> int:
        return sum(len(block) for block in self.blocks)

    def coordinates(self, rows: torch.Tensor) -> torch.Tensor:
        """The inner products with the basis, (rank, K), float64 on the CPU."""
        found = [self.space.gram(block, rows) for block in self.blocks]
        return torch.cat(found) if found else torch.zeros(0, len(rows), dtype=torch.float64)

    def without_projection(self, rows: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
        """rows - coordinates . Q, a new (K, P)."""
        rest = rows.clone()
        for block, piece in zip(self.blocks, coordinates.split([len(block) for block in self.blocks]), strict=True):
            rest.addmm_(piece.T.to(rest), block, alpha=-1)
        return rest

    def extend(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add to the basis what (K, P) rows have outside it: the new rows (n, P), all coordinates (rank, K).

        Block Gram-Schmidt in two passes; the older rows stay as they are, and so do products with them. What is left of
        a row and may be rounding is dropped: n < K says that the rows are numerically dependent.
        """
        norms = self.space.norms(rows)
        first = self.coordinates(rows)
        new, inner = _orthonormalise(self.space, self.without_projection(rows, first), norms)
        again = self.coordinates(new)
        new, inner_again = _orthonormalise(self.space, self.without_projection(new, again), torch.ones(len(new)))
        if len(new):
            self.blocks.append(new)
        return new, torch.cat([first + again @ inner, inner_again @ inner])


def _orthonormalise(space: VectorSpace, rows: torch.Tensor, norms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal rows (n, P) in place of (K, P), and the factor (n, K); without what is negligible beside `norms` (K,)."""
    factor = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    rank = 0
    for index in range(len(rows)):
        rest = rows[index : index + 1]
        for _ in range(2 if rank else 0):
            coefficients = space.gram(rows[:rank], rest)
            factor[:rank, index] += coefficients[:, 0]
            rest = rest - coefficients.T.to(rest) @ rows[:rank]
        length = float(space.norms(rest))
        if length > _LOST * torch.finfo(rows.dtype).eps * float(norms[index]):
            factor[rank, index] = length
            rows[rank] = rest[0] / length
            rank += 1
    return rows[:rank], factor[:rank]


def left_out(triangle: torch.Tensor) -> torch.Tensor:
    """From the coordinates R (k, m) of m products: column i is the direction s_i that is lost without product i, (k, m).

    Zeros if k < m: dependent products mean that the basis holds the matrix's whole range, which it does without any one of
    them, too.
    """
    rank, count = triangle.shape
    if rank < count:
        return torch.zeros_like(triangle)
    identity = torch.eye(rank, dtype=triangle.dtype)
    directions = torch.linalg.solve_triangular(triangle.triu(), identity, upper=True).T
    return directions / directions.norm(dim=0)


def pair_weights(directions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of unit columns (k, m) the cosines c (m, m) of their angles, and 1 / (1 - c^2), 0 on the diagonal."""
    cosines = directions.T @ directions
    apart = 1 - torch.eye(len(cosines), dtype=cosines.dtype)
    return cosines, apart / (1 - cosines.square()).clamp_min(_PARALLEL)


class Probed(NamedTuple):
    """What is known of m probes omega beside a basis Q, float64 on the CPU.

    coordinates: Q^T omega, (rank, m). images: Q^T A omega, (rank, m). raw: omega . A omega, (m,). squares: |omega|^2, (m,).
    """

    coordinates: torch.Tensor
    images: torch.Tensor
    raw: torch.Tensor
    squares: torch.Tensor


class TraceSketch:
    """A basis Q with Q^T A Q, and probes that are kept so that the basis may grow after them."""

    def __init__(self, products: Products) -> None:
        self.products, self.space = products, products.space
        self.basis = RangeBasis(self.space)
        self.is_complete = False  # whether the basis holds the matrix's whole range, to rounding
        nothing, no_numbers = torch.zeros(0, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
        self.projection = nothing  # Q^T A Q, float64 on the CPU
        self.probed = Probed(nothing, nothing, no_numbers, no_numbers)
        self._probes: list[torch.Tensor] = []

    @property
    def num_probes(self) -> int:
        return len(self.probed.raw)

    def widen(self, images: torch.Tensor) -> torch.Tensor:
        """Add the span of products (K, P) to the basis, at as many products again; their coordinates (rank, K)."""
        new, coordinates = self.basis.extend(images)
        self.is_complete |= len(new) < len(images)
        if len(new):
            new_images = self.products.rows(new)
            old, inner = self.basis.coordinates(new_images).split([self.basis.rank - len(new), len(new)])
            upper = torch.cat([self.projection, old], dim=1)
            self.projection = torch.cat([upper, torch.cat([old.T, (inner + inner.T) / 2], dim=1)])
            both = torch.cat([new, new_images])
            empty = torch.zeros(len(both), 0, dtype=torch.float64)
            grams = torch.cat([empty, *(self.space.gram(both, probes) for probes in self._probes)], dim=1)
            of_probes, of_images = grams.split(len(new))
            known = self.probed
            self.probed = known._replace(
                coordinates=torch.cat([known.coordinates, of_probes]), images=torch.cat([known.images, of_images])
            )
        return coordinates

    def probe(self, probes: torch.Tensor, images: torch.Tensor, image_coordinates: torch.Tensor) -> Probed:
        """The numbers of probes (K, P) with their products (K, P) and the products' coordinates (rank, K)."""
        raw, squares = self.space.inner(probes, images), self.space.inner(probes, probes)
        return Probed(self.basis.coordinates(probes), image_coordinates, raw, squares)

    def keep(self, probes: torch.Tensor, images: torch.Tensor, image_coordinates: torch.Tensor) -> None:
        """Keep probes and their numbers, as `probe` takes them."""
        new = self.probe(probes, images, image_coordinates)
        self._probes.append(probes)
        self.probed = Probed(*(torch.cat([known, more], dim=-1) for known, more in zip(self.probed, new, strict=True)))

    def grow(self, num_probes: int, generator: torch.Generator | None) -> None:
        """Draw probes until there are `num_probes`, each of them kept and its product in the basis: two products each."""
        for count in blocks(num_probes - self.num_probes):
            probes = self.space.random(count, "sphere", generator)
            images = self.products.rows(probes)
            self.keep(probes, images, self.widen(images))

    def samples(self, probed: Probed, lost: torch.Tensor | None = None) -> torch.Tensor:
        r"""A sample of the trace for each probe, (m,), by the basis without column i of `lost` (rank, m) for probe i.

        .. math:: t = \mathrm{tr}\, Q^\top A Q + \frac{P - \mathrm{rank}}{\|\mu\|^2} \mu^\top A \mu, \qquad
            \mu = (I - Q Q^\top)\, \omega

        mu is uniform in direction if omega is, so that t is unbiased for any Q that is independent of omega.
        """
        H, W = self.projection, probed.coordinates
        lost = torch.zeros_like(W) if lost is None else lost
        X = W - lost * (lost * W).sum(0)
        inside = H.trace() - (lost * (H @ lost)).sum(0)
        rest = probed.raw - 2 * (X * probed.images).sum(0) + (X * (H @ X)).sum(0)
        return self._sample(inside, (lost * lost).sum(0), rest, probed.squares - (X * X).sum(0))

    def _sample(self, inside: torch.Tensor, lost: torch.Tensor, rest: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
        """From the trace inside, the number of directions lost, mu . A mu and |mu|^2."""
        outside = self.space.size - self.basis.rank + lost
        return inside + torch.where(outside > 0.5, outside * rest / room.clamp_min(torch.finfo(torch.float64).tiny), 0.0)

    def fresh_samples(self, count: int, generator: torch.Generator | None) -> torch.Tensor:
        """Independent samples of the trace, (count,), by probes that are not kept: one product each."""
        probes = self.space.random(count, "sphere", generator)
        images = self.products.rows(probes)
        return self.samples(self.probe(probes, images, self.basis.coordinates(images)))

    def rounding(self, samples: torch.Tensor) -> float:
        """The standard error that rounding alone makes, from samples of either kind."""
        return rounding_error(self.space, torch.cat([samples, self.probed.raw]), self.basis.rank)

    def mean(self, samples: torch.Tensor) -> tuple[float, float]:
        """The mean of independent samples, and its standard error."""
        return float(samples.mean()), hypot(standard_error(samples), self.rounding(samples))

    def left_out_samples(self) -> torch.Tensor:
        """XTrace's samples, (m,): that of a probe is by the basis of all others. They are not independent."""
        return self.samples(self.probed, left_out(self.probed.images))

    def xtrace(self) -> tuple[float, float]:
        r"""XTrace, the mean of the left-out samples, and its standard error by the jackknife.

        .. math:: \hat\sigma^2 = \sum_i \Bigl(S_{(i)} - \tfrac1m \sum_j S_{(j)}\Bigr)^2

        with S_(i) the whole estimator without probe i, at no further product: its samples leave out a second probe each.
        The samples' own scatter, s / sqrt(m), which the paper proposes, takes them for independent; but each pair shares
        m - 2 probes, and +- 1.96 of it covers the truth in 82% to 92% of runs. The jackknife makes no such assumption:
        for every symmetric function of independent probes its mean is at least the variance for m - 1 probes (Efron &
        Stein 1981, The jackknife estimate of variance). It is conservative, on decaying spectra by a factor of 2 to 4 in
        stderr, which the next doubling makes up for. Student's t with m - 1 degrees comes on top.
        """
        count = self.num_probes
        value = self.left_out_samples().mean()
        pairs = self._left_out_pairs()
        replicates = (pairs.sum(1) - pairs.diagonal()) / (count - 1)
        stderr = student_factor(count - 1) * float((replicates.var(correction=0) * count).sqrt())
        return float(value), hypot(stderr, self.rounding(self.probed.raw))

    def _left_out_pairs(self) -> torch.Tensor:
        r"""For probes i and j the sample of j by the basis without both, (m, m); the diagonal means nothing.

        The basis then lacks s_i and what s_j has outside it, (s_j - c s_i) sqrt(a), where c = s_i . s_j and a = 1 / (1 - c^2).
        With w = Q^T omega_j, the coordinates of omega_j in what remains are

        .. math:: x = w - \alpha s_i - \beta s_j, \qquad \beta = a\, (s_j \cdot w - c\, s_i \cdot w), \qquad
            \alpha = s_i \cdot w - c\, \beta .
        """
        W, H, S = self.probed.coordinates, self.projection, left_out(self.probed.images)
        c, a = pair_weights(S)
        h, b, f = S.T @ H @ S, S.T @ W, S.T @ H @ W
        struck, own = h.diagonal()[:, None], h.diagonal()
        beta = a * (b.diagonal() - c * b)
        alpha = b - c * beta
        inside = H.trace() - struck - a * (own - 2 * c * h + c * c * struck)
        along = (W * self.probed.images).sum(0) - beta * (S * self.probed.images).sum(0)  # x . Q^T A omega_j
        curved = (W * (H @ W)).sum(0) - 2 * (alpha * f + beta * f.diagonal())
        curved += alpha**2 * struck + 2 * alpha * beta * h + beta**2 * own  # x . Q^T A Q x
        room = self.probed.squares - (W * W).sum(0) + b**2 + beta * (b.diagonal() - c * b)
        return self._sample(inside, 2 * (S * S).sum(0), self.probed.raw - 2 * along + curved, room)
