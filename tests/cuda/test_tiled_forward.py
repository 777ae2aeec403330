"""What only the emulator shows of the tiled forward kernels: schedules, traffic, instructions, bank conflicts."""

from __future__ import annotations

import emulation
import pytest
import torch
from reference import inputs

DTYPES = [torch.float16, torch.bfloat16]


def run(tensors, grid_size, **kwargs):
    return emulation.tiled_forward(*(t.detach() for t in tensors), grid_size, tensors[0].size(-1) ** -0.5, **kwargs)


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize("deferred_copies", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_schedules_and_copies_change_no_bit(schedule, deferred_copies, dropout_p):
    tensors = inputs(1, 1, (9, 21), 48, torch.float16)
    expected = run(tensors, (9, 21), dropout_p=dropout_p).out
    got = run(tensors, (9, 21), dropout_p=dropout_p, schedule=schedule, deferred_copies=deferred_copies)
    assert torch.equal(got.out, expected)


def test_an_output_of_any_strides():
    tensors = inputs(2, 3, (5, 14), 40, torch.float16)
    out = torch.full((2, 3, 2 * 70 + 9, 64), torch.nan, dtype=torch.float16)[:, :, 3:143:2, 8:48]
    assert torch.equal(run(tensors, (5, 14), out=out).out, run(tensors, (5, 14)).out)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def large(request):
    """(24, 24) tokens of 48 channels: what the budgets are asserted for."""
    return run(inputs(1, 1, (24, 24), 48, request.param), (24, 24), save=True)


def test_budgets_of_traffic(large):
    tokens, row, blocks = 576, 48 * 2, 5
    counts = large.counts
    # attention: K and V by each of 5 blocks, Q once, the position's rows once; position: V and then T once
    read = tokens * row * (2 * blocks + 2) + 2 * tokens * row
    written = tokens * row * (1 + 1 + 2) + 4 * tokens  # out, content; T and the position; logsumexp
    assert read <= counts["global_read"] <= 1.1 * read
    assert written <= counts["global_written"] <= 1.01 * written


def test_budgets_of_instructions(large):
    tokens, dim, side = 576, 48, 24
    unpadded = (2 * tokens * tokens + tokens * 2 * side) * dim / (16 * 8 * 16)
    assert unpadded <= large.counts["mma"] <= 1.2 * unpadded
    queries = 5 * 128  # of all blocks; some keys' weights are formed twice, as the largest score grows
    assert tokens * tokens <= large.counts["exp2"] <= 1.1 * queries * tokens


def test_no_bank_conflicts(large):
    for kind in ("ldmatrix", "copy"):
        assert large.counts[kind] > 0
        assert large.counts[f"{kind}_conflicts"] == 0


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_no_bank_conflicts_for_any_native_head_dim(head_dim):
    counts = run(inputs(1, 1, (5, 14), head_dim, torch.float16), (5, 14)).counts
    assert counts["ldmatrix_conflicts"] == 0
    assert counts["copy_conflicts"] == 0
