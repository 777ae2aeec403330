"""What only the emulator shows of the tiled backward kernels: schedules, traffic, instructions, bank conflicts."""

from __future__ import annotations

import emulation
import pytest
import torch
from reference import inputs


def gradients(tensors, grid_size, forward=None, **options):
    """Of a gradient of ones."""
    tensors = [t.detach() for t in tensors]
    scale = tensors[0].size(-1) ** -0.5
    forward = emulation.tiled_forward(*tensors, grid_size, scale, save=True, **(forward or {}))
    options["content"] = forward.content
    return emulation.backward(torch.ones_like(tensors[0]), *tensors, forward.logsumexp, grid_size, scale, **options)


def assert_equal(got, expected):
    for name in ("q", "k", "v", "sums"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize("deferred_copies", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_schedules_and_copies_change_no_bit(schedule, deferred_copies, dropout_p):
    tensors = inputs(1, 1, (9, 21), 48, torch.float16)
    dropout = {"dropout_p": dropout_p}
    expected = gradients(tensors, (9, 21), forward=dropout, **dropout)
    got = gradients(tensors, (9, 21), forward=dropout, **dropout, schedule=schedule, deferred_copies=deferred_copies)
    assert_equal(got, expected)


def test_outputs_of_any_strides():
    tensors = inputs(2, 3, (5, 14), 40, torch.float16)
    memory = torch.full((3, 2, 3, 2 * 70 + 9, 64), torch.nan, dtype=torch.float16)
    outputs = [t[:, :, 3:143:2, 8:48] for t in memory]
    assert_equal(gradients(tensors, (5, 14), outputs=outputs), gradients(tensors, (5, 14)))


@pytest.fixture(scope="module")
def large_counts():
    """(24, 24) tokens of 48 channels: what the budgets are asserted for."""
    return gradients(inputs(1, 1, (24, 24), 48, torch.float16), (24, 24)).counts


def test_budgets_of_traffic(large_counts):
    tokens, row, query_blocks, key_blocks = 576, 48 * 2, 9, 5
    # position: V for T, dO and T, dT and V; dQ: K and V by each of 9 blocks, Q, dO and the content once; dK and dV: Q
    # and dO by each of 5, K, V and the position's part once; logsumexp: once for dQ, and with delta by each of 5
    rows = 1 + 2 + 2 + (2 * query_blocks + 3) + (2 * key_blocks + 3)
    read = tokens * row * rows + tokens * 4 * (1 + 2 * key_blocks)
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
