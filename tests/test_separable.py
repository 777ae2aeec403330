"""The positional softmax is a product of two tables: exactly, for any weights and any grid."""

import itertools

import pytest
import torch
from reference import offsets

from gpsa_kernels.separable import axis_factors


@pytest.mark.parametrize("grid_size", itertools.product(range(1, 8), repeat=2), ids=str)
def test_the_factors_multiply_to_the_map(grid_size):
    pos_weight = torch.empty(100, 3, dtype=torch.float64).uniform_(-20, 20)
    ax, ay = axis_factors(pos_weight, grid_size)
    product = torch.einsum("hyz,hxw->hyxzw", ay, ax).flatten(3, 4).flatten(1, 2)
    expected = (offsets(grid_size).double() @ pos_weight.T).permute(2, 0, 1).softmax(-1)
    torch.testing.assert_close(product, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_factors_of_16_bit_weights_are_float32(dtype):
    assert {t.dtype for t in axis_factors(torch.randn(2, 3).to(dtype), (14, 14))} == {torch.float32}
