"""The tiled kernels' gradients against the formula in float64, on the emulator."""

from __future__ import annotations

import emulation
import pytest
import torch
from dropped import assert_exact_with_dropout
from reference import (
    assert_a_small_share_keeps_its_digits,
    assert_as_exact_as_eager,
    assert_large_gradients_stay_finite,
    inputs,
)

DTYPES = [torch.float16, torch.bfloat16]
# (batch, heads, grid_size, head_dim): one tile and several, whole and partial; every native head_dim; long axes
SHAPES = [
    (1, 2, (1, 1), 8),
    (2, 1, (3, 5), 40),
    (1, 1, (13, 5), 64),
    (1, 2, (8, 8), 128),
    (2, 1, (7, 50), 32),
    (1, 1, (257, 1), 48),
    (1, 1, (1, 300), 96),
    (1, 1, (300, 1), 64),
    (1, 1, (18, 21), 128),
    (1, 1, (24, 24), 48),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "heads", "grid_size", "head_dim"), SHAPES, ids=str)
def test_shapes(dtype, batch, heads, grid_size, head_dim):
    assert_as_exact_as_eager(emulation.tiled_attention, inputs(batch, heads, grid_size, head_dim, dtype), grid_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-0.7, 0.0, 2.0])
def test_scale(dtype, scale):
    assert_as_exact_as_eager(emulation.tiled_attention, inputs(1, 2, (5, 14), 16, dtype), (5, 14), scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_far_below_zero(dtype):
    """exp(0 - logsumexp) of a key that does not exist is infinite."""
    q, k, *rest = inputs(1, 2, (5, 14), 16, dtype)
    q, k = (t.detach().add(shift).requires_grad_() for t, shift in ((q, 9), (k, -9)))
    assert_as_exact_as_eager(emulation.tiled_attention, [q, k, *rest], (5, 14))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logit", [100.0, 12.0, -12.0, -100.0])
def test_open_and_closed_gates(dtype, logit):
    *tensors, gate = inputs(1, 2, (5, 14), 16, dtype)
    gate = torch.full_like(gate, logit).requires_grad_()
    assert_as_exact_as_eager(emulation.tiled_attention, [*tensors, gate], (5, 14))


@pytest.mark.parametrize("grid_size", [(5, 14), (67, 2)], ids=str)
@pytest.mark.parametrize("logit", [-5.0, -12.0, -100.0])
def test_large_gradients_stay_finite(grid_size, logit):
    assert_large_gradients_stay_finite(emulation.tiled_attention, grid_size, logit)


@pytest.mark.parametrize("grid_size", [(5, 14), (67, 2)], ids=str)
def test_a_small_share_keeps_its_digits(grid_size):
    assert_a_small_share_keeps_its_digits(emulation.tiled_attention, grid_size)


@pytest.mark.parametrize("grid_size", [(3, 5), (2, 67), (67, 2)], ids=str)
@pytest.mark.parametrize("weight", [0.0, 3.0, -3.0])
def test_flat_and_steep_positions(grid_size, weight):
    q, k, v, pos_weight, gate = inputs(1, 2, grid_size, 16, torch.bfloat16)
    pos_weight = torch.full_like(pos_weight, weight).requires_grad_()
    assert_as_exact_as_eager(emulation.tiled_attention, [q, k, v, pos_weight, gate], grid_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "grid_size", "head_dim", "dropout_p"),
    [
        (2, 2, (5, 14), 16, 0.5),
        (1, 2, (9, 21), 48, 0.1),
        (1, 1, (1, 70), 128, 0.9),
        (1, 1, (67, 1), 64, 0.3),
        (1, 1, (13, 24), 40, 0.2),
    ],
)
def test_dropout(dtype, batch, heads, grid_size, head_dim, dropout_p):
    tensors = inputs(batch, heads, grid_size, head_dim, dtype)
    assert_exact_with_dropout(emulation.tiled_attention, tensors, grid_size, dropout_p, seed=11)


def gradients(tensors, grid_size, grad_out=None, forward=None, **options):
    """Of a gradient of ones, unless another is given."""
    tensors = [t.detach() for t in tensors]
    scale = tensors[0].size(-1) ** -0.5
    forward = emulation.tiled_forward(*tensors, grid_size, scale, save=True, **(forward or {}))
    grad_out = torch.ones_like(tensors[0]) if grad_out is None else grad_out
    return emulation.tiled_backward(grad_out, *tensors, forward.content, forward.logsumexp, grid_size, scale, **options)


def assert_equal(got, expected):
    for name in ("q", "k", "v", "sums"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("deferred_copies", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_schedules_and_copies_change_no_bit(seed, deferred_copies, dropout_p):
    tensors = inputs(1, 1, (9, 21), 48, torch.float16)
    dropout = {"dropout_p": dropout_p}
    expected = gradients(tensors, (9, 21), forward=dropout, **dropout)
    got = gradients(tensors, (9, 21), forward=dropout, **dropout, seed=seed, deferred_copies=deferred_copies)
    assert_equal(got, expected)


def test_everything_dropped_out():
    dropout = {"dropout_p": 1.0}
    got = gradients(inputs(1, 1, (5, 14), 16, torch.float16), (5, 14), forward=dropout, **dropout)
    for name in ("q", "k", "v", "sums"):
        assert torch.equal(getattr(got, name), torch.zeros_like(getattr(got, name))), name


def test_any_strides():
    grid_size = (5, 14)
    tensors = [t.detach() for t in inputs(2, 3, grid_size, 40, torch.float16)]
    grad_out = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(2)).half()
    expected = gradients(tensors, grid_size, grad_out)
    packed = torch.stack([t.transpose(1, 2) for t in tensors[:3]], dim=2)  # (B, N, 3, H, D)
    views = packed.permute(2, 0, 3, 1, 4).unbind()
    assert_equal(gradients([*views, *tensors[3:]], grid_size, grad_out), expected)
    # what surrounds a tensor in memory is neither read nor written: the emulator would stop
    memory = torch.full((2, 3, 2 * 70 + 9, 64), torch.nan, dtype=torch.float16)
    spread = [memory.clone()[:, :, 3:143:2, 8:48].copy_(t) for t in (*tensors[:3], grad_out)]
    outputs = [memory.clone()[:, :, 3:143:2, 8:48] for _ in range(3)]
    assert_equal(gradients([*spread[:3], *tensors[3:]], grid_size, spread[3], outputs=outputs), expected)


def test_an_expanded_gradient():
    tensors = inputs(2, 2, (5, 14), 32, torch.bfloat16)
    ones = torch.ones(1, 1, 1, 32, dtype=torch.bfloat16).expand(2, 2, 70, 32)  # of out.sum(), rows aligned
    assert_equal(gradients(tensors, (5, 14), ones), gradients(tensors, (5, 14)))


def test_nan_stays_in_its_image():
    tensors = [t.detach() for t in inputs(2, 2, (5, 14), 32, torch.float16)]
    grad_out = torch.ones_like(tensors[0])
    clean = gradients(tensors, (5, 14), grad_out)
    grad_out[0, 1, 7, 3] = torch.nan
    got = gradients(tensors, (5, 14), grad_out)
    for name in ("q", "k", "v", "sums"):
        result, expected = getattr(got, name), getattr(clean, name)
        assert result[0, 1].isnan().any(), name
        for b, h in ((0, 0), (1, 0), (1, 1)):
            assert torch.equal(result[b, h], expected[b, h]), name


@pytest.fixture(scope="module")
def large_counts():
    """(24, 24) tokens of 48 channels: what the budgets are asserted for."""
    return gradients(inputs(1, 1, (24, 24), 48, torch.float16), (24, 24)).counts


def test_budgets_of_traffic(large_counts):
    tokens, row, tiles = 576, 48 * 2, 9
    # position: V for T, dO and T, dT and V; dQ: K and V by each of 9 blocks, Q, dO and the content once; dK and dV: Q
    # and dO by each, K, V and the position's part once; logsumexp: once for dQ, and with delta by each block of keys
    read = tokens * row * (1 + 2 + 2 + (2 * tiles + 3) + (2 * tiles + 3)) + tokens * 4 * (1 + 2 * tiles)
    written = tokens * row * (1 + 1 + 1 + 1 + 2) + tokens * 4
    assert read <= large_counts["global_read"] <= 1.1 * read
    assert written <= large_counts["global_written"] <= 1.01 * written


def test_budgets_of_instructions(large_counts):
    tokens, dim, side = 576, 48, 24
    # Q K^T and dO V^T twice, dQ, dK and dV; V mixed along x, both backward passes and both tables' gradients
    unpadded = (7 * tokens * tokens + tokens * 5 * side) * dim / (16 * 8 * 16)
    assert unpadded <= large_counts["mma"] <= 1.2 * unpadded
    assert 2 * tokens * tokens <= large_counts["exp2"] <= 1.2 * 2 * tokens * tokens


@pytest.mark.parametrize("head_dim", [32, 48, 64, 128])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_no_bank_conflicts_for_any_native_head_dim(head_dim, dropout_p):
    dropout = {"dropout_p": dropout_p}
    counts = gradients(inputs(1, 1, (5, 14), head_dim, torch.float16), (5, 14), forward=dropout, **dropout).counts
    for kind in ("ldmatrix", "copy"):
        assert counts[kind] > 0
        assert counts[f"{kind}_conflicts"] == 0
