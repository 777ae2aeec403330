"""The positional softmax is a product of two tables: exactly, for any weights and any grid."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpsa_kernels.formula import relative_offsets
from gpsa_kernels.separable import axis_factors, axis_factors_backward, separable_product

grids = st.tuples(st.integers(1, 7), st.integers(1, 7))
weights = st.floats(-20, 20, width=32)


def dense_map(pos_weight, grid_size):
    offsets = relative_offsets(grid_size, dtype=torch.float64)
    return torch.einsum("ijc,hc->hij", offsets, pos_weight).softmax(-1)


@settings(deadline=None)
@given(grids, st.lists(st.tuples(weights, weights, weights), min_size=1, max_size=3))
def test_the_factors_multiply_to_the_map(grid_size, rows_of_weights):
    pos_weight = torch.tensor(rows_of_weights, dtype=torch.float64)
    ax, ay = axis_factors(pos_weight, grid_size)
    product = torch.einsum("hyz,hxw->hyxzw", ay, ax).flatten(3, 4).flatten(1, 2)
    torch.testing.assert_close(product, dense_map(pos_weight, grid_size))


@pytest.mark.parametrize("grid_size", [(1, 1), (1, 6), (6, 1), (3, 5), (5, 3)])
def test_the_product_is_the_map_times_v(grid_size):
    pos_weight = torch.randn(2, 3, dtype=torch.float64)
    v = torch.randn(3, 2, grid_size[0] * grid_size[1], 4, dtype=torch.float64)
    ax, ay = axis_factors(pos_weight, grid_size)
    torch.testing.assert_close(separable_product(ax, ay, v, grid_size), dense_map(pos_weight, grid_size) @ v)


@pytest.mark.parametrize("grid_size", [(1, 1), (1, 6), (3, 5)])
def test_the_gradient_of_the_factors(grid_size):
    pos_weight = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    ax, ay = axis_factors(pos_weight, grid_size)
    grads = torch.randn_like(ax), torch.randn_like(ay)
    (expected,) = torch.autograd.grad((ax, ay), pos_weight, grads)
    torch.testing.assert_close(axis_factors_backward(ax.detach(), ay.detach(), *grads), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_factors_of_16_bit_weights_are_float32(dtype):
    ax, ay = axis_factors(torch.randn(2, 3).to(dtype), (14, 14))
    assert ax.dtype == ay.dtype == torch.float32


def test_offsets_are_key_minus_query():
    offsets = relative_offsets((2, 3))
    assert offsets.shape == (6, 6, 3)
    assert offsets[0, 5].tolist() == [2, 1, 5]  # from the first corner to the last
    assert offsets[5, 0].tolist() == [-2, -1, 5]
