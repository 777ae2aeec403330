"""The positional softmax is a product of two tables: exactly, for any weights and any grid."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import offsets

from gpsa_kernels.separable import axis_factors

weights = st.floats(-20, 20, width=32)


@settings(deadline=None)
@given(
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.lists(st.tuples(weights, weights, weights), min_size=1, max_size=3),
)
def test_the_factors_multiply_to_the_map(grid_size, rows_of_weights):
    pos_weight = torch.tensor(rows_of_weights, dtype=torch.float64)
    ax, ay = axis_factors(pos_weight, grid_size)
    product = torch.einsum("hyz,hxw->hyxzw", ay, ax).flatten(3, 4).flatten(1, 2)
    expected = (offsets(grid_size).double() @ pos_weight.T).permute(2, 0, 1).softmax(-1)
    torch.testing.assert_close(product, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_factors_of_16_bit_weights_are_float32(dtype):
    assert {t.dtype for t in axis_factors(torch.randn(2, 3).to(dtype), (14, 14))} == {torch.float32}
