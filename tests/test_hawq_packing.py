"""Bit planes: round trips for every width and length, and a byte-level example."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hawq.affine import signed_range
from hawq.packing import pack, packed_size, unpack


@st.composite
def codes(draw):
    bits = draw(st.integers(1, 8))
    qmin, qmax = signed_range(bits)
    values = draw(st.lists(st.integers(qmin, qmax), max_size=70))
    return bits, torch.tensor(values, dtype=torch.int8)


@given(codes())
def test_round_trip(case):
    bits, values = case
    planes = pack(values, bits)
    assert planes.numel() == packed_size(len(values), bits)
    assert torch.equal(unpack(planes, bits, (len(values),)), values)


@pytest.mark.parametrize("bits", range(1, 9))
def test_round_trip_of_every_code_in_a_shape(bits):
    qmin, qmax = signed_range(bits)
    values = torch.arange(qmin, qmax + 1, dtype=torch.int8).repeat(3).view(3, 1, -1)
    assert torch.equal(unpack(pack(values, bits), bits, tuple(values.shape)), values)


def test_layout():
    """Codes -2, -1, 0, 1 are 0, 1, 2, 3 unsigned: low bits 0101, high bits 0011, first code in the lowest bit."""
    assert pack(torch.tensor([-2, -1, 0, 1]), 2).tolist() == [[0b1010], [0b1100]]


def test_bad_input():
    with pytest.raises(ValueError, match="codes from -3 to 1 do not fit 2 bits: -2 to 1"):
        pack(torch.tensor([-3, 1]), 2)
    with pytest.raises(ValueError, match="a width of 9 bits"):
        pack(torch.tensor([0]), 9)
    with pytest.raises(ValueError, match=r"expected \(3, 2\)"):
        unpack(torch.zeros(3, 1, dtype=torch.uint8), 3, (9,))
