"""Properties that hold for any shape, layout and dtype."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_as_exact_as_eager, inputs, literal, with_gradients

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
@given(**sizes, dtype=dtypes, backend=backends, seed=st.integers(0, 2**31))
def test_as_exact_as_eager(batch, heads, grid_size, head_dim, dtype, backend, seed):
    tensors = inputs(batch, heads, grid_size, head_dim, dtype, seed)
    assert_as_exact_as_eager(gpsa_attention, tensors, grid_size, backend=backend)


def laid_out(t, order, padding):
    """The same numbers with batch, heads and tokens in another order in memory, and NaN between the channels."""
    shape = [*(t.size(dim) for dim in order), t.size(3) + padding]
    memory = torch.full(shape, float("nan"), dtype=t.dtype)
    return memory[..., padding:].permute(*(order.index(dim) for dim in range(3)), 3).copy_(t)


@settings(deadline=None, max_examples=60)
@given(
    **sizes,
    backend=backends,
    orders=st.lists(st.permutations([0, 1, 2]), min_size=4, max_size=4),
    padding=st.integers(0, 3),
)
def test_any_strides(batch, heads, grid_size, head_dim, backend, orders, padding):
    """Of q, k, v and of the output's gradient; in the result and in all gradients."""
    tensors = [t.detach() for t in inputs(batch, heads, grid_size, head_dim)]
    grad_out = torch.randn_like(tensors[0])
    expected = with_gradients(literal, tensors, grad_out, grid_size, head_dim**-0.5)
    *qkv, grad_out = (laid_out(t, order, padding) for t, order in zip((*tensors[:3], grad_out), orders, strict=True))
    leaves = [t.requires_grad_() for t in (*qkv, *tensors[3:])]
    out = gpsa_attention(*leaves, grid_size, backend=backend)
    torch.testing.assert_close([out, *torch.autograd.grad(out, leaves, grad_out)], expected)
