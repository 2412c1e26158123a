"""Layers as matrix products, against the operations themselves."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hawq.patches import MatrixForm

aten = torch.ops.aten
CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
TRANSPOSED = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}


def assert_is_a_product(operation, weight, x, settings):
    form = MatrixForm(operation, tuple(settings), weight.shape)
    outputs = operation(x, weight, None, *settings)
    products = form.rows(weight) @ form.columns(x).transpose(1, 2)  # (groups, channels, positions)
    dim = outputs.dim() - 1 if operation is aten.linear.default else 1
    wanted = outputs.movedim(dim, 0).reshape(form.groups, -1, form.num_positions(x))
    torch.testing.assert_close(products, wanted)
    assert torch.equal(form.weight(form.rows(weight)), weight)
    some = torch.tensor([0, form.num_positions(x) - 1])
    assert torch.equal(form.columns(x, some), form.columns(x)[:, some])


@given(
    dims=st.sampled_from([1, 2, 3]),
    groups=st.sampled_from([1, 2, 4]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 1),
    dilation=st.integers(1, 2),
    seed=st.integers(0, 9),
)
def test_convolutions(dims, groups, kernel, stride, padding, dilation, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = [7, 6, 5][:dims]
    x = torch.randn(2, 4, *sizes, dtype=torch.float64, generator=generator)
    weight = torch.randn(8, 4 // groups, *[kernel] * dims, dtype=torch.float64, generator=generator)
    settings = ([stride] * dims, [padding] * dims, [dilation] * dims, groups)
    assert_is_a_product(CONVOLUTIONS[dims], weight, x, settings)
    back = torch.randn(4, 8 // groups, *[kernel] * dims, dtype=torch.float64, generator=generator)
    extra = [min(stride, dilation) - 1] * dims
    if padding <= dilation * (kernel - 1):
        assert_is_a_product(TRANSPOSED[dims], back, x, ([stride] * dims, [padding] * dims, extra, groups, [dilation] * dims))


@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_same_padding(kernel):
    x, weight = torch.randn(2, 3, 9, 8), torch.randn(4, 3, kernel, kernel)
    assert_is_a_product(aten.conv2d.padding, weight, x, ([1, 1], "same", [2, 2]))
    assert_is_a_product(aten.conv2d.padding, weight, x, ([2, 1], "valid"))


def test_linear_over_any_leading_dimensions():
    for shape in ((5, 6), (2, 3, 6), (2, 3, 4, 6)):
        assert_is_a_product(aten.linear.default, torch.randn(4, 6), torch.randn(shape), ())


def test_an_even_kernel_with_uneven_settings():
    x, weight = torch.randn(3, 2, 11, 10), torch.randn(6, 2, 2, 5)
    assert_is_a_product(aten.conv2d.default, weight, x, ([2, 1], [1, 3], [3, 1]))
