"""The whole-image backward kernel behind the forward kernel, against the formula in float64, on the emulator."""

from __future__ import annotations

import emulation
import pytest
import torch
from reference import (
    assert_a_small_share_keeps_its_digits,
    assert_as_exact_as_eager,
    assert_large_gradients_stay_finite,
    inputs,
)

DTYPES = [torch.float16, torch.bfloat16]
# (batch, heads, grid_size, head_dim): 1, 15, 16, 17, 63, 64, 65, 196, 197 and 256 tokens; axes longer than 16 on
# either side; every native head_dim, and less
SHAPES = [
    (1, 2, (1, 1), 8),
    (2, 1, (3, 5), 16),
    (1, 1, (1, 16), 40),
    (1, 2, (17, 1), 24),
    (1, 1, (9, 7), 48),
    (2, 2, (8, 8), 32),
    (1, 1, (5, 13), 64),
    (1, 2, (14, 14), 48),
    (1, 1, (197, 1), 32),
    (1, 1, (16, 16), 64),
    (1, 1, (4, 64), 56),
    (1, 1, (32, 8), 48),
    (1, 1, (1, 256), 8),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "heads", "grid_size", "head_dim"), SHAPES, ids=str)
def test_shapes(dtype, batch, heads, grid_size, head_dim):
    assert_as_exact_as_eager(emulation.attention, inputs(batch, heads, grid_size, head_dim, dtype), grid_size)


@pytest.mark.parametrize("head_dim", range(8, 65, 8))
def test_head_dims(head_dim):
    assert_as_exact_as_eager(emulation.attention, inputs(1, 1, (3, 6), head_dim, torch.float16), (3, 6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-0.7, 0.0, 2.0])
def test_scale(dtype, scale):
    assert_as_exact_as_eager(emulation.attention, inputs(1, 2, (3, 6), 16, dtype), (3, 6), scale)


@pytest.mark.parametrize("logit", [100.0, 12.0, -12.0, -100.0])
def test_open_and_closed_gates(logit):
    *tensors, gate = inputs(1, 2, (3, 6), 16, torch.float16)
    assert_as_exact_as_eager(emulation.attention, [*tensors, torch.full_like(gate, logit)], (3, 6))


@pytest.mark.parametrize("grid_size", [(3, 6), (18, 2)], ids=str)
@pytest.mark.parametrize("logit", [-5.0, -12.0, -100.0])
def test_large_gradients_stay_finite(grid_size, logit):
    assert_large_gradients_stay_finite(emulation.attention, grid_size, logit)


@pytest.mark.parametrize("grid_size", [(3, 6), (18, 2)], ids=str)
def test_a_small_share_keeps_its_digits(grid_size):
    assert_a_small_share_keeps_its_digits(emulation.attention, grid_size)


@pytest.mark.parametrize("grid_size", [(3, 6), (2, 17), (17, 2)], ids=str)
@pytest.mark.parametrize("weight", [0.0, 30.0, -30.0])
def test_flat_and_steep_positions(grid_size, weight):
    q, k, v, pos_weight, gate = inputs(1, 2, grid_size, 16, torch.bfloat16)
    assert_as_exact_as_eager(emulation.attention, [q, k, v, torch.full_like(pos_weight, weight), gate], grid_size)


@pytest.mark.parametrize("factor", [30.0, 1e3])
def test_large_scores(factor):
    q, k, *rest = inputs(1, 2, (3, 6), 16, torch.float16)
    assert_as_exact_as_eager(emulation.attention, [q * factor**0.5, k * factor**0.5, *rest], (3, 6))


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


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("deferred_copies", [False, True])
def test_schedules_and_copies_change_no_bit(seed, deferred_copies):
    tensors = inputs(1, 1, (7, 9), 48, torch.float16)
    assert_equal(run(tensors, (7, 9), seed=seed, deferred_copies=deferred_copies), run(tensors, (7, 9)))


def test_any_strides():
    grid_size = (3, 6)
    tensors = [t.detach() for t in inputs(2, 3, grid_size, 40, torch.float16)]
    grad_out = torch.randn(2, 3, 18, 40, generator=torch.Generator().manual_seed(1)).half()
    expected = run(tensors, grid_size, grad_out)
    packed = torch.stack([t.transpose(1, 2) for t in tensors[:3]], dim=2)  # (B, N, 3, H, D)
    views = packed.permute(2, 0, 3, 1, 4).unbind()
    memory = torch.full((2, 18, 3, 40), torch.nan, dtype=torch.float16).transpose(1, 2)
    assert_equal(run([*views, *tensors[3:]], grid_size, memory.copy_(grad_out)), expected)
    # what surrounds a tensor in memory is neither read nor written: the emulator would stop
    around = torch.full((2, 3, 2 * 18 + 9, 64), torch.nan, dtype=torch.float16)
    spread = [around.clone()[:, :, 3 : 3 + 36 : 2, 8:48].copy_(t) for t in (grad_out, *tensors[:3])]
    outputs = [around.clone()[:, :, 3 : 3 + 36 : 2, 8:48] for _ in range(3)]
    assert_equal(run([*spread[1:], *tensors[3:]], grid_size, spread[0], outputs=outputs), expected)


def test_expanded_tensors():
    grid_size = (3, 6)
    q, k, v, *rest = (t.detach() for t in inputs(2, 3, grid_size, 48, torch.bfloat16))
    k, v, grad_out = k[:, :1].expand_as(q), v[:1].expand_as(q), q[:1, :1, :1].expand_as(q)
    expected = run([q, k.contiguous(), v.contiguous(), *rest], grid_size, grad_out.contiguous())
    assert_equal(run([q, k, v, *rest], grid_size, grad_out), expected)


def test_nan_stays_in_its_image():
    tensors = [t.detach() for t in inputs(5, 1, (3, 6), 32, torch.float16)]
    grad_out = torch.randn(5, 1, 18, 32, generator=torch.Generator().manual_seed(1)).half()
    clean = run(tensors, (3, 6), grad_out)
    for image, t in enumerate((*tensors[:3], grad_out)):
        t[image, 0, 17, 5] = torch.nan
    got = run(tensors, (3, 6), grad_out)
    for name in ("q", "k", "v", "sums"):
        assert torch.equal(getattr(got, name)[4], getattr(clean, name)[4])
    assert got.q[:2].isnan().any((-1, -2)).all()
    assert got.q[2].isnan().all()  # a value is in every query's delta
    assert got.q[3, 0, 17].isnan().all()
    assert got.q[3, 0, :17].isfinite().all()
    assert got.v[3, 0, :, 5].isnan().all()
    assert got.sums[:4].isnan().any(-1).all()


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
    unpadded = 5 * (tokens * tokens + tokens * side) * head_dim / (16 * 8 * 16)  # 5 products; 3 mixes, 2 gradients of A
    assert unpadded <= counts["mma"] <= 1.2 * unpadded
    for kind in ("ldmatrix", "copy", "load", "store"):
        assert counts[kind] > 0
        assert counts[f"{kind}_conflicts"] == 0


@pytest.mark.parametrize(("side", "head_dim"), [(14, 32), (14, 64), (16, 48), (8, 32)])
def test_no_bank_conflicts_of_matrices(side, head_dim):
    counts = run(inputs(1, 1, (side, side), head_dim, torch.float16), (side, side)).counts
    assert counts["ldmatrix_conflicts"] == 0
    assert counts["copy_conflicts"] == 0


@pytest.mark.parametrize(
    ("grid_size", "head_dim", "kibibytes", "fits"),
    [
        ((14, 14), 48, 99, True),  # of consumer GPUs, compute capability 8.6, 8.9 and 12.0
        ((14, 14), 64, 99, False),
        ((16, 16), 64, 163, True),  # of an A100
        ((8, 8), 72, 227, False),
        ((1, 257), 8, 227, False),
        ((1 << 16, 1 << 16), 8, 227, False),
    ],
)
def test_which_problems_it_serves(grid_size, head_dim, kibibytes, fits):
    q = torch.empty(1, 1, 0, head_dim, dtype=torch.float16)
    assert emulation.backward_fits(q, grid_size, kibibytes * 1024) == fits
