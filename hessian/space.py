"""The space that a matrix's vectors live in: inner products, norms, random probes.

Estimators touch the entries of long vectors through this file alone. An operator whose vectors are spread over
processes brings a space of its own, in which a local block of rows is this process's part and the numbers below are sums
over all parts.
"""

from typing import Literal

import torch

Distribution = Literal["rademacher", "normal", "sphere"]

_CHUNK = 2**22  # entries converted to another precision at a time


class VectorSpace:
    """Vectors of `size` real numbers, handled in blocks (K, P), one vector a row."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size, self.dtype, self.device = size, dtype, device

    @property
    def local_size(self) -> int:
        """How many of a vector's entries this process holds."""
        return self.size

    def gram(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """All inner products of rows, (m, n), float64 on the CPU; computed in the rows' own precision, float32 at least."""
        if left.dtype == right.dtype and left.dtype in (torch.float32, torch.float64):
            return self.reduce((left @ right.to(left.device).T).to("cpu", torch.float64))
        width = max(1, _CHUNK // max(len(left), len(right)))
        total = torch.zeros(len(left), len(right), dtype=torch.float64)
        common = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
        for start in range(0, left.shape[1], width):
            piece = right[:, start : start + width].to(left.device, common)
            total += (left[:, start : start + width].to(common) @ piece.T).to("cpu", torch.float64)
        return self.reduce(total)

    def inner(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """The inner product of each row of `left` with the same row of `right`, (K,), summed in float64, on the CPU."""
        rows = [(one.double() * other.double()).sum() for one, other in zip(left, right, strict=True)]
        return self.reduce(torch.stack(rows).cpu())

    def norms(self, rows: torch.Tensor) -> torch.Tensor:
        """Euclidean norms of the rows, (K,), summed in float64, on the CPU."""
        return self.inner(rows, rows).sqrt()

    def random(
        self, count: int, distribution: Distribution = "rademacher", generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """`count` random rows with identity covariance: signs, normal numbers, or uniform on the sphere of radius sqrt(P).

        `generator=None` draws from the global generator of the space's device.
        """
        device = self.device if generator is None else generator.device
        shape = (count, self.local_size)
        if distribution == "rademacher":
            signs = torch.randint(0, 2, shape, generator=generator, device=device, dtype=torch.int8)
            return signs.to(self.device, self.dtype).mul_(2).sub_(1)
        rows = torch.randn(shape, generator=generator, device=device, dtype=self.dtype).to(self.device)
        if distribution == "sphere":
            scale = self.size**0.5 / self.norms(rows)
            rows *= scale.to(rows)[:, None]
        return rows

    def least(self, number: float) -> float:
        """The least of all processes' numbers, where they must decide alike."""
        return number

    def part(self, rows: torch.Tensor) -> torch.Tensor:
        """This process's entries of whole rows, (K, P) to (K, local_size)."""
        return rows

    def whole(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of `part`; every process that holds parts must call it."""
        return rows

    def reduce(self, numbers: torch.Tensor) -> torch.Tensor:
        """Sums over all processes that hold parts of the vectors; here there is one."""
        return numbers
