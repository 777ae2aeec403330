"""What only the emulator shows of the whole-image backward kernels: schedules, traffic, bank conflicts; and digits."""

from __future__ import annotations

import emulation
import pytest
import torch
from reference import inputs

DTYPES = [torch.float16, torch.bfloat16]


def run(tensors, grid_size, grad_out=None, **kwargs):
    """One backward pass, whose logsumexp is the formula's."""
    q, k, *_ = tensors = [t.detach() for t in tensors]
    scale = q.size(-1) ** -0.5
    if grad_out is None:
        grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype)
    logsumexp = (scale * q.double() @ k.double().mT).logsumexp(-1).float()
    return emulation.backward(grad_out, *tensors, logsumexp, grid_size, scale, **kwargs)


def assert_equal(a, b):
    for name in ("q", "k", "v", "sums"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("schedule", range(4))
@pytest.mark.parametrize("deferred_copies", [False, True])
def test_schedules_and_copies_change_no_bit(schedule, deferred_copies):
    tensors = inputs(1, 1, (7, 9), 48, torch.float16)
    assert_equal(run(tensors, (7, 9), schedule=schedule, deferred_copies=deferred_copies), run(tensors, (7, 9)))


def test_outputs_of_any_strides():
    tensors = inputs(2, 3, (3, 6), 40, torch.float16)
    around = torch.full((3, 2, 3, 2 * 18 + 9, 64), torch.nan, dtype=torch.float16)
    outputs = [t[:, :, 3 : 3 + 36 : 2, 8:48] for t in around]
    assert_equal(run(tensors, (3, 6), outputs=outputs), run(tensors, (3, 6)))


def test_a_closed_gate_leaves_the_content_its_digits():
    """At 1 - g = 2e-6, which fp16 eager knows as 0, dQ and dK are off by one rounding of dS and one of the result."""
    q, k, v, pos_weight, gate = (t.detach() for t in inputs(1, 1, (3, 6), 48, torch.float16))
    gate, scale, eps = torch.full_like(gate, 13.0), 48**-0.5, torch.finfo(torch.float16).eps
    subnormal = torch.finfo(torch.float16).smallest_normal * eps
    grad_out = 1024 * torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).half()
    got = run([q, k, v, pos_weight, gate], (3, 6), grad_out)
    content = (scale * q.double() @ k.double().mT).softmax(-1)
    along = grad_out.double() @ v.double().mT
    grad_scores = content * (along - (content * along).sum(-1, keepdim=True))
    share = scale * torch.sigmoid(-gate.double())
    for ours, left, right in ((got.q, grad_scores, k.double()), (got.k, grad_scores.mT, q.double())):
        expected = share * left @ right
        allowed = eps * (share * left.abs() @ right.abs() + expected.abs()) + subnormal
        assert eps * expected.abs().max() > subnormal
        assert ((ours.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_budgets_at_the_size_that_matters(dtype):
    tokens, head_dim, side = 196, 48, 14
    counts = run(inputs(1, 1, (side, side), head_dim, dtype), (side, side)).counts
    floor = 7 * tokens * head_dim * 2
    assert floor <= counts["global_read"] + counts["global_written"] <= 1.15 * floor
    products = 6 * tokens * tokens + 5 * tokens * side  # dP twice; 3 mixes, 2 gradients of A
    unpadded = products * head_dim / (16 * 8 * 16)
    assert unpadded <= counts["mma"] <= 1.25 * unpadded
    for kind in ("ldmatrix", "copy", "load", "store"):
        assert counts[kind] > 0
        along_y = kind in ("ldmatrix", "store")  # tokens of a line along y are far apart
        assert counts[f"{kind}_conflicts"] <= (0.3 * counts[kind] if along_y else 0)


@pytest.mark.parametrize("head_dim", [32, 48, 64])
def test_no_bank_conflicts_but_of_lines_along_y(head_dim):
    """A grid of one column has no other lines; along y the tokens of a wide one are far apart."""
    counts = run(inputs(1, 1, (16, 1), head_dim, torch.float16), (16, 1)).counts
    for kind in ("ldmatrix", "copy", "store"):
        assert counts[f"{kind}_conflicts"] == 0
