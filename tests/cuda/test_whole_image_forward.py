"""The whole-image forward kernel against the formula in float64, on the emulator."""

from __future__ import annotations

import math

import emulation
import pytest
import torch
from reference import inputs, literal, rounding_walks

DTYPES = [torch.float16, torch.bfloat16]
# (batch, heads, grid_size, head_dim): 1, 15, 16, 17, 63, 64, 65, 196, 197 and 256 tokens, every native head_dim
SHAPES = [
    (1, 2, (1, 1), 8),
    (2, 1, (3, 5), 16),
    (1, 1, (1, 16), 40),
    (1, 2, (17, 1), 24),
    (1, 1, (9, 7), 48),
    (2, 2, (8, 8), 32),
    (1, 1, (8, 8), 128),
    (1, 1, (5, 13), 64),
    (1, 1, (13, 5), 72),
    (1, 2, (14, 14), 48),
    (1, 1, (14, 14), 64),
    (1, 1, (197, 1), 32),
    (1, 1, (1, 197), 128),
    (1, 1, (16, 16), 48),
    (1, 1, (16, 16), 104),
    (1, 1, (4, 64), 56),
    (1, 1, (32, 8), 64),
    (1, 1, (1, 256), 8),
]


def assert_exact(tensors, grid_size, scale=None, **kwargs):
    """What reference.assert_as_exact_as_eager asks of `out`; and the logsumexp."""
    q, k, *_ = tensors = [t.detach() for t in tensors]
    tokens, head_dim = q.shape[2:]
    scale = head_dim**-0.5 if scale is None else scale
    got = emulation.forward(*tensors, grid_size, scale, save=True, **kwargs)
    expected = literal(*(t.double() for t in tensors), grid_size, scale)
    assert got.out.isfinite().all()
    walk = rounding_walks(tensors, torch.zeros_like(q), grid_size, scale)["out"]
    eps, summed = torch.finfo(q.dtype).eps, torch.finfo(torch.float32).eps
    allowed = (literal(*tensors, grid_size, scale).double() - expected).abs().nan_to_num(nan=math.inf).max()
    allowed += eps * expected.abs().max() + (eps + summed * math.sqrt(max(tokens, head_dim) / 2)) * walk
    assert (got.out.double() - expected).abs().max() <= allowed
    # a score of d float32 terms is off by at most d roundings of each
    scores = scale * q.double() @ k.double().mT
    bound = (head_dim + 4) * summed * (abs(scale) * q.double().abs() @ k.double().abs().mT).max()
    error = (got.logsumexp.double() - scores.logsumexp(-1)).abs().max()
    assert error <= bound + tokens * summed * (1 + math.log(tokens))
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "heads", "grid_size", "head_dim"), SHAPES, ids=str)
def test_shapes(dtype, batch, heads, grid_size, head_dim):
    tokens = grid_size[0] * grid_size[1]
    parts = 2 if tokens > 208 and head_dim > 64 else 1  # what an H100 has room for
    assert_exact(inputs(batch, heads, grid_size, head_dim, dtype), grid_size, parts=parts)


@pytest.mark.parametrize("head_dim", range(8, 129, 8))
def test_head_dims(head_dim):
    assert_exact(inputs(1, 1, (3, 4), head_dim, torch.float16), (3, 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-0.7, 0.0, 2.0])
def test_scale(dtype, scale):
    assert_exact(inputs(1, 2, (3, 6), 16, dtype), (3, 6), scale)


@pytest.mark.parametrize("logit", [100.0, 12.0, -12.0, -100.0])
def test_open_and_closed_gates(logit):
    *tensors, gate = inputs(1, 2, (3, 5), 16, torch.float16)
    assert_exact([*tensors, torch.full_like(gate, logit)], (3, 5))


@pytest.mark.parametrize("grid_size", [(3, 5), (2, 17), (17, 2)], ids=str)
@pytest.mark.parametrize("weight", [0.0, 30.0, -30.0])
def test_flat_and_steep_positions(grid_size, weight):
    q, k, v, pos_weight, gate = inputs(1, 2, grid_size, 16, torch.bfloat16)
    assert_exact([q, k, v, torch.full_like(pos_weight, weight), gate], grid_size)


@pytest.mark.parametrize("factor", [30.0, 1e3])
def test_large_scores(factor):
    q, k, *rest = inputs(1, 2, (3, 5), 16, torch.float16)
    assert_exact([q * factor**0.5, k * factor**0.5, *rest], (3, 5))


def run(tensors, grid_size, **kwargs):
    return emulation.forward(*(t.detach() for t in tensors), grid_size, tensors[0].size(-1) ** -0.5, **kwargs)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("deferred_copies", [False, True])
def test_schedules_and_copies_change_no_bit(seed, deferred_copies):
    tensors = inputs(1, 1, (9, 13), 48, torch.float16)
    expected = run(tensors, (9, 13)).out
    assert torch.equal(run(tensors, (9, 13), seed=seed, deferred_copies=deferred_copies).out, expected)


@pytest.mark.parametrize("grid_size", [(14, 14), (3, 5), (2, 33)], ids=str)
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_parts_of_the_query_rows_change_no_bit(grid_size, parts):
    tensors = inputs(2, 1, grid_size, 48, torch.bfloat16)
    one, many = run(tensors, grid_size, save=True), run(tensors, grid_size, save=True, parts=parts)
    assert torch.equal(one.out, many.out)
    assert torch.equal(one.logsumexp, many.logsumexp)


def test_any_strides():
    grid_size = (5, 7)
    tensors = [t.detach() for t in inputs(2, 3, grid_size, 40, torch.float16)]
    expected = run(tensors, grid_size).out
    packed = torch.stack([t.transpose(1, 2) for t in tensors[:3]], dim=2)  # (B, N, 3, H, D)
    views = packed.permute(2, 0, 3, 1, 4).unbind()
    assert torch.equal(run([*views, *tensors[3:]], grid_size).out, expected)
    # what surrounds a tensor in memory is neither read nor written: the emulator would stop
    memory = torch.full((2, 3, 2 * 35 + 9, 64), torch.nan, dtype=torch.float16)
    spread = [memory.clone()[:, :, 3 : 3 + 70 : 2, 8:48].copy_(t) for t in tensors[:3]]
    out = memory.clone()[:, :, 3 : 3 + 70 : 2, 8:48]
    assert torch.equal(run([*spread, *tensors[3:]], grid_size, out=out).out, expected)


def test_expanded_inputs():
    grid_size = (5, 7)
    q, k, v, *rest = (t.detach() for t in inputs(2, 3, grid_size, 48, torch.bfloat16))
    k, v = k[:, :1].expand_as(q), v[:1].expand_as(q)
    expected = run([q, k.contiguous(), v.contiguous(), *rest], grid_size).out
    assert torch.equal(run([q, k, v, *rest], grid_size).out, expected)


def test_nan_stays_where_it_belongs():
    tensors = [t.detach() for t in inputs(3, 1, (5, 13), 32, torch.float16)]
    clean = run(tensors, (5, 13)).out
    tensors[0][0, 0, 7] = torch.nan
    tensors[2][1, 0, 3, 5] = torch.nan
    out = run(tensors, (5, 13)).out
    assert out[0, 0, 7].isnan().all()
    assert out[1, 0, :, 5].isnan().all()
    for poisoned in (out[0, 0, 7:8], out[1, 0, :, 5:6]):
        poisoned.zero_()
    for position in (clean[0, 0, 7:8], clean[1, 0, :, 5:6]):
        position.zero_()
    assert torch.equal(out, clean)


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
