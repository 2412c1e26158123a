r"""The alpha-beta model: what collectives cost, in seconds.

Sending m bytes takes alpha + beta m. Collectives over p ranks (Thakur et al. 2005; Gholami et al., SPAA 2018, section 2):

.. math::
   \text{all-gather: } \alpha \lceil\log_2 p\rceil + \beta m \tfrac{p-1}{p}, \qquad
   \text{all-reduce: } 2\left(\alpha \lceil\log_2 p\rceil + \beta m \tfrac{p-1}{p}\right), \qquad
   \text{all-to-all: } \alpha (p-1) + \beta m \tfrac{p-1}{p}
"""

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "halo"]


@dataclass(frozen=True)
class Collective:
    """One message among `ranks`. num_bytes: for all-gather, reduce-scatter and all-reduce those of the whole tensor, for
    all-to-all those that a rank holds, for a halo those that a rank sends to each neighbour. purpose: what is sent."""

    kind: Kind
    purpose: str
    ranks: int
    num_bytes: float

    @property
    def sent(self) -> float:
        """Bytes that a rank sends, by a bandwidth-optimal algorithm; of a halo, a rank between two others."""
        if self.kind == "halo":
            return self.num_bytes * min(self.ranks - 1, 2)
        return (2 if self.kind == "all-reduce" else 1) * self.num_bytes * (self.ranks - 1) / self.ranks


@dataclass(frozen=True)
class AlphaBeta:
    """A network: alpha, seconds a message; beta, seconds a byte.

    >>> from parallel import AlphaBeta
    >>> network = AlphaBeta(alpha=1.0, beta=0.5)
    >>> network.all_gather(8, ranks=4), network.all_reduce(8, ranks=4)  # 2 messages of latency; 6 of 8 bytes travel
    (5.0, 10.0)
    """

    alpha: float
    beta: float

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}: give seconds, at least 0")

    def seconds(self, collective: Collective) -> float:
        """What the collective takes."""
        ranks, num_bytes = collective.ranks, collective.num_bytes
        match collective.kind:
            case "all-gather":
                return self.all_gather(num_bytes, ranks)
            case "reduce-scatter":
                return self.reduce_scatter(num_bytes, ranks)
            case "all-reduce":
                return self.all_reduce(num_bytes, ranks)
            case "all-to-all":
                return self.all_to_all(num_bytes, ranks)
        return self.halo_exchange(num_bytes) if ranks > 1 else 0.0

    def all_gather(self, num_bytes: float, ranks: int) -> float:
        """Seconds until every rank has all `num_bytes`, of which each rank held an equal part."""
        _check(num_bytes, ranks)
        return self.alpha * _rounds(ranks) + self.beta * num_bytes * (ranks - 1) / ranks

    def reduce_scatter(self, num_bytes: float, ranks: int) -> float:
        """Seconds until every rank has its part of the sum of everybody's `num_bytes`: an all-gather backwards."""
        return self.all_gather(num_bytes, ranks)

    def all_reduce(self, num_bytes: float, ranks: int) -> float:
        """Seconds until every rank has the sum of everybody's `num_bytes`: reduce-scatter, then all-gather."""
        return self.reduce_scatter(num_bytes, ranks) + self.all_gather(num_bytes, ranks)

    def all_to_all(self, num_bytes: float, ranks: int) -> float:
        """Seconds until every rank has sent each other an equal part of its `num_bytes`, to one after the other."""
        _check(num_bytes, ranks)
        return self.alpha * (ranks - 1) + self.beta * num_bytes * (ranks - 1) / ranks

    def halo_exchange(self, num_bytes: float) -> float:
        """Seconds to send `num_bytes` of border to a neighbour."""
        _check(num_bytes, 1)
        return self.alpha + self.beta * num_bytes if num_bytes else 0.0


def _rounds(ranks: int) -> int:
    """ceil(log2 ranks), in integers."""
    return (ranks - 1).bit_length()


def _check(num_bytes: float, ranks: int) -> None:
    if num_bytes < 0:
        raise ValueError(f"{num_bytes} bytes: a message has at least 0")
    if ranks < 1:
        raise ValueError(f"{ranks} ranks: a group has at least 1")
