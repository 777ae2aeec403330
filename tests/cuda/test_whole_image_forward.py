"""What only the emulator shows of the whole-image forward kernels: schedules, row blocks, traffic, bank conflicts."""

from __future__ import annotations

import emulation
import pytest
import torch
from reference import inputs

DTYPES = [torch.float16, torch.bfloat16]


def run(tensors, grid_size, **kwargs):
    return emulation.forward(*(t.detach() for t in tensors), grid_size, tensors[0].size(-1) ** -0.5, **kwargs)


@pytest.mark.parametrize("schedule", range(5))
@pytest.mark.parametrize("deferred_copies", [False, True])
def test_schedules_and_copies_change_no_bit(schedule, deferred_copies):
    tensors = inputs(1, 1, (9, 13), 48, torch.float16)
    expected = run(tensors, (9, 13)).out
    assert torch.equal(run(tensors, (9, 13), schedule=schedule, deferred_copies=deferred_copies).out, expected)


@pytest.mark.parametrize("grid_size", [(14, 14), (3, 5), (2, 33)], ids=str)
@pytest.mark.parametrize("row_blocks", [2, 3, 4])
def test_row_blocks_change_no_bit(grid_size, row_blocks):
    tensors = inputs(2, 1, grid_size, 48, torch.bfloat16)
    one, many = run(tensors, grid_size, save=True), run(tensors, grid_size, save=True, row_blocks=row_blocks)
    assert torch.equal(one.out, many.out)
    assert torch.equal(one.logsumexp, many.logsumexp)


def test_an_output_of_any_strides():
    tensors = inputs(2, 3, (5, 7), 40, torch.float16)
    out = torch.full((2, 3, 2 * 35 + 9, 64), torch.nan, dtype=torch.float16)[:, :, 3 : 3 + 70 : 2, 8:48]
    assert torch.equal(run(tensors, (5, 7), out=out).out, run(tensors, (5, 7)).out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_budgets_at_the_size_that_matters(dtype):
    tokens, head_dim, side = 196, 48, 14
    counts = run(inputs(1, 1, (side, side), head_dim, dtype), (side, side)).counts
    floor = 4 * tokens * head_dim * 2
    assert floor <= counts["global_read"] + counts["global_written"] <= 1.05 * floor
    unpadded = (2 * tokens * tokens + tokens * 2 * side) * head_dim / (16 * 8 * 16)
    assert unpadded <= counts["mma"] <= 1.2 * unpadded
    for kind in ("ldmatrix", "copy"):  # all that the main loop and the loads do in shared memory
        assert counts[kind] > 0
        assert counts[f"{kind}_conflicts"] == 0


@pytest.mark.parametrize("head_dim", [32, 48, 64, 128])
def test_no_bank_conflicts_for_any_native_head_dim(head_dim):
    counts = run(inputs(1, 1, (14, 14), head_dim, torch.float16), (14, 14)).counts
    assert counts["ldmatrix_conflicts"] == 0
    assert counts["copy_conflicts"] == 0


def test_the_division_by_the_columns_of_a_grid_is_exact():
    row_of_token = emulation.kernels().row_of_token
    for columns in range(1, 257):
        tokens = range(256 // columns * columns)
        assert [row_of_token(columns, token) for token in tokens] == [token // columns for token in tokens]
