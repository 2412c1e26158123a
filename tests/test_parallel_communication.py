"""The cost model against its closed forms."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel import AlphaBeta


@given(st.floats(0, 1e-3), st.floats(0, 1e-8), st.integers(0, 10**12), st.integers(1, 4096))
def test_collectives(alpha, beta, num_bytes, ranks):
    network = AlphaBeta(alpha, beta)
    gather = alpha * math.ceil(math.log2(ranks)) + beta * num_bytes * (ranks - 1) / ranks
    assert network.all_gather(num_bytes, ranks) == pytest.approx(gather)
    assert network.reduce_scatter(num_bytes, ranks) == pytest.approx(gather)
    assert network.all_reduce(num_bytes, ranks) == pytest.approx(2 * gather)


def test_one_rank_sends_nothing():
    network = AlphaBeta(1e-6, 1e-9)
    assert network.all_reduce(10**9, 1) == 0
    assert network.halo_exchange(0) == 0
    assert network.halo_exchange(1000) == pytest.approx(2e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="alpha is -1"):
        AlphaBeta(-1, 0)
    with pytest.raises(ValueError, match="beta is nan"):
        AlphaBeta(0, math.nan)
    with pytest.raises(ValueError, match="0 ranks"):
        AlphaBeta(0, 0).all_gather(1, 0)
    with pytest.raises(ValueError, match="-5 bytes"):
        AlphaBeta(0, 0).halo_exchange(-5)
