"""Properties that hold for any shape, layout and dtype."""

from __future__ import annotations

import torch
from fuzz import STRUCTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_as_exact_as_eager, inputs, literal

from gpsa_kernels import gpsa_attention

backends = st.sampled_from(["eager", "sdpa", "auto"])
dtypes = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
sizes = {
    "batch": st.integers(0, 3),
    "heads": st.integers(1, 4),
    "grid_size": st.tuples(st.integers(1, 7), st.integers(1, 7)),
    "head_dim": st.integers(1, 20),
}


@settings(deadline=None, max_examples=60)
@given(
    **sizes,
    dtype=dtypes,
    backend=backends,
    seed=st.integers(0, 2**31),
    structures=st.lists(st.sampled_from(list(STRUCTURES)), min_size=4, max_size=4),
    largest=st.sampled_from([1.0, 1.0, 10.0]),
)
def test_as_exact_as_eager(batch, heads, grid_size, head_dim, dtype, backend, seed, structures, largest):
    """Whatever the tokens of q, k, v and the gradient have in common, with scores of one or of thousands."""
    *tensors, pos_weight, gate = (t.detach() for t in inputs(batch, heads, grid_size, head_dim, dtype, seed))
    tensors.append(tensors[0].flip(0, 1, 2, 3))
    q, k, v, grad_out = (STRUCTURES[name](t.double()).to(dtype) for name, t in zip(structures, tensors, strict=True))
    tensors, scale = [largest * q, largest * k, v, pos_weight, gate], None if largest == 1 else 5.0
    assert_as_exact_as_eager(gpsa_attention, tensors, grid_size, scale, grad_out=grad_out, backend=backend)


@settings(deadline=None, max_examples=60)
@given(
    **sizes,
    backend=backends,
    orders=st.lists(st.permutations([0, 1, 2]), min_size=3, max_size=3),
    padding=st.integers(0, 3),
)
def test_any_strides(batch, heads, grid_size, head_dim, backend, orders, padding):
    """Batch, heads and tokens in any order in memory, with or without gaps."""
    tensors = [t.detach() for t in inputs(batch, heads, grid_size, head_dim)]
    expected = literal(*tensors, grid_size, head_dim**-0.5)
    for index, order in enumerate(orders):
        t = tensors[index]
        shape = [*(t.size(dim) for dim in order), head_dim + padding]
        memory = torch.full(shape, float("nan"), dtype=t.dtype)
        view = memory[..., padding:].permute(*(order.index(dim) for dim in range(3)), 3)
        view.copy_(t)
        tensors[index] = view
    torch.testing.assert_close(gpsa_attention(*tensors, grid_size, backend=backend), expected)


@settings(deadline=None, max_examples=30)
@given(**sizes, backend=backends, seed=st.integers(0, 100))
def test_rows_of_the_map_sum_to_one(batch, heads, grid_size, head_dim, backend, seed):
    """A constant v comes out as it went in."""
    q, k, v, pos_weight, gate = (t.detach() for t in inputs(batch, heads, grid_size, head_dim, seed=seed))
    v = torch.ones_like(v)
    torch.testing.assert_close(gpsa_attention(q, k, v, pos_weight, gate, grid_size, backend=backend), v)


@settings(deadline=None, max_examples=30)
@given(**sizes, backend=backends, seed=st.integers(0, 100))
def test_transposing_the_grid_swaps_the_axes(batch, heads, grid_size, head_dim, backend, seed):
    q, k, v, pos_weight, gate = (t.detach() for t in inputs(batch, heads, grid_size, head_dim, seed=seed))

    def transposed(t):
        return t.unflatten(2, grid_size).transpose(2, 3).flatten(2, 3)

    expected = transposed(gpsa_attention(q, k, v, pos_weight, gate, grid_size, backend=backend))
    swapped = [transposed(t) for t in (q, k, v)]
    got = gpsa_attention(*swapped, pos_weight[:, [1, 0, 2]], gate, grid_size[::-1], backend=backend)
    torch.testing.assert_close(got, expected)
