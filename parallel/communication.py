r"""The alpha-beta model: what collectives cost, in seconds.

Sending m bytes takes alpha + beta m. Collectives over p ranks (Thakur et al. 2005; Gholami et al., SPAA 2018, section 2):

.. math::
   \text{all-gather: } \alpha \lceil\log_2 p\rceil + \beta m \tfrac{p-1}{p}, \qquad
   \text{all-reduce: } 2\left(\alpha \lceil\log_2 p\rceil + \beta m \tfrac{p-1}{p}\right)
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class AlphaBeta:
    """A network: alpha, seconds a message; beta, seconds a byte."""

    alpha: float
    beta: float

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not value >= 0:
                raise ValueError(f"{name} is {value}: give seconds, at least 0")

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
