"""Attention dropout in the whole-image kernels, on the emulator."""

from __future__ import annotations

import emulation
import pytest
import torch
from dropped import assert_exact_with_dropout
from reference import inputs

DTYPES = [torch.float16, torch.bfloat16]
# every native head_dim with short, middle and long rows of scores
SHAPES = [
    (1, 1, (1, 1), 8),
    (2, 2, (3, 6), 16),
    (1, 1, (1, 17), 40),
    (1, 1, (17, 3), 64),
    (1, 2, (14, 14), 48),
    (1, 1, (32, 8), 32),
    (1, 1, (9, 13), 24),
    (1, 1, (13, 9), 64),
    (1, 1, (16, 14), 48),
    (1, 1, (15, 17), 56),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "heads", "grid_size", "head_dim"), SHAPES, ids=str)
def test_shapes(dtype, batch, heads, grid_size, head_dim):
    tensors = inputs(batch, heads, grid_size, head_dim, dtype)
    assert_exact_with_dropout(emulation.attention, tensors, grid_size, 0.3, seed=5)


@pytest.mark.parametrize("dropout_p", [1e-6, 0.01, 0.9, 0.99])
def test_probabilities(dropout_p):
    tensors = inputs(1, 2, (3, 7), 32, torch.float16)
    assert_exact_with_dropout(emulation.attention, tensors, (3, 7), dropout_p, seed=-1)


@pytest.mark.parametrize("logit", [12.0, -12.0])
def test_open_and_closed_gates(logit):
    *tensors, gate = inputs(1, 2, (3, 6), 16, torch.float16)
    assert_exact_with_dropout(emulation.attention, [*tensors, torch.full_like(gate, logit)], (3, 6), 0.3, seed=5)


@pytest.mark.parametrize("weight", [0.0, 30.0, -30.0])
def test_flat_and_steep_positions(weight):
    q, k, v, pos_weight, gate = inputs(1, 2, (2, 17), 16, torch.bfloat16)
    tensors = [q, k, v, torch.full_like(pos_weight, weight), gate]
    assert_exact_with_dropout(emulation.attention, tensors, (2, 17), 0.3, seed=5)


def forward(grid_size=(5, 9), head_dim=48, dropout_p=0.3, **kwargs):
    tensors = [t.detach() for t in inputs(1, 2, grid_size, head_dim, torch.float16)]
    return emulation.forward(*tensors, grid_size, head_dim**-0.5, dropout_p=dropout_p, dropout_seed=5, **kwargs)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("deferred_copies", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_neither_parts_nor_schedules_change_a_bit_of_the_output(parts, deferred_copies, seed):
    kwargs = {"parts": parts, "deferred_copies": deferred_copies, "seed": seed}
    assert torch.equal(forward(**kwargs).out, forward().out)


def test_where_nothing_is_kept_the_output_is_zero():
    out = forward(dropout_p=1.0).out
    assert torch.equal(out, torch.zeros_like(out))


def test_traffic_and_bank_conflicts_of_the_forward_kernel():
    counts = forward((14, 14)).counts
    floor = 2 * 4 * 196 * 48 * 2
    assert floor <= counts["global_read"] + counts["global_written"] <= 1.05 * floor
    assert counts["ldmatrix_conflicts"] == counts["copy_conflicts"] == 0


def run(grid_size=(5, 9), head_dim=48, dropout_p=0.3, dropout_seed=5, **kwargs):
    q, k, *_ = tensors = [t.detach() for t in inputs(1, 2, grid_size, head_dim, torch.float16)]
    grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).half()
    logsumexp = (head_dim**-0.5 * q.double() @ k.double().mT).logsumexp(-1).float()
    settings = grid_size, head_dim**-0.5
    kwargs |= {"dropout_p": dropout_p, "dropout_seed": dropout_seed}
    return emulation.backward(grad_out, *tensors, logsumexp, *settings, **kwargs)


def equal(a, b):
    return [torch.equal(getattr(a, name), getattr(b, name)) for name in ("q", "k", "v", "sums")]


def test_a_seed_gives_the_same_bits_under_every_schedule():
    expected = run()
    for seed in range(3):
        for deferred in (False, True):
            assert all(equal(run(seed=seed, deferred_copies=deferred), expected))
    assert not any(equal(run(dropout_seed=6), expected))
    assert not any(equal(run(dropout_seed=5 + (1 << 32)), expected))


def test_where_nothing_is_kept_nothing_has_a_gradient():
    got = run(dropout_p=1.0)
    for t in (got.q, got.k, got.v, got.sums):
        assert torch.equal(t, torch.zeros_like(t))


def test_no_bank_conflicts_and_no_more_traffic():
    counts = run((14, 14)).counts
    floor = 2 * 7 * 196 * 48 * 2
    assert floor <= counts["global_read"] + counts["global_written"] <= 1.15 * floor
    assert counts["ldmatrix_conflicts"] == counts["copy_conflicts"] == counts["store_conflicts"] == 0
