"""The tiled forward kernels against the formula in float64, on the emulator."""

from __future__ import annotations

import math

import dropped
import emulation
import pytest
import torch
from reference import inputs, literal, rounding_walks

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
]


def walk_of(tensors, grid_size, scale):
    return rounding_walks(tensors, torch.zeros_like(tensors[0]), grid_size, scale)["out"]


def allowed_error(eager, expected, walk, dtype, terms):
    """What reference.assert_as_exact_as_eager allows."""
    eps, summed = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    allowed = (eager.double() - expected).abs().nan_to_num(nan=math.inf).max()
    return allowed + eps * expected.abs().max() + (eps + summed * math.sqrt(terms / 2)) * walk


def assert_exact(tensors, grid_size, scale=None, **kwargs):
    """`out`, the content branch's own output, and the logsumexp."""
    q, k, v, pos_weight, gate = tensors = [t.detach() for t in tensors]
    tokens, head_dim = q.shape[2:]
    scale = head_dim**-0.5 if scale is None else scale
    got = emulation.tiled_forward(*tensors, grid_size, scale, save=True, **kwargs)
    closed = torch.full_like(gate, -math.inf)
    for result, logit in ((got.out, gate), (got.content, closed)):
        branch = [q, k, v, pos_weight, logit]
        expected = literal(*(t.double() for t in branch), grid_size, scale)
        eager = literal(*branch, grid_size, scale)
        walk = walk_of(branch, grid_size, scale)
        assert result.isfinite().all()
        error = (result.double() - expected).abs().max()
        assert error <= allowed_error(eager, expected, walk, q.dtype, max(tokens, head_dim))
    # a score of d float32 terms is off by at most d roundings of each
    summed = torch.finfo(torch.float32).eps
    scores = scale * q.double() @ k.double().mT
    bound = (head_dim + 4) * summed * (abs(scale) * q.double().abs() @ k.double().abs().mT).max()
    error = (got.logsumexp.double() - scores.logsumexp(-1)).abs().max()
    assert error <= bound + tokens * summed * (1 + math.log(tokens))
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "heads", "grid_size", "head_dim"), SHAPES, ids=str)
def test_shapes(dtype, batch, heads, grid_size, head_dim):
    assert_exact(inputs(batch, heads, grid_size, head_dim, dtype), grid_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-0.7, 0.0, 2.0])
def test_scale(dtype, scale):
    assert_exact(inputs(1, 2, (5, 14), 16, dtype), (5, 14), scale)


@pytest.mark.parametrize("logit", [100.0, 12.0, -12.0, -100.0])
def test_open_and_closed_gates(logit):
    *tensors, gate = inputs(1, 2, (5, 14), 16, torch.float16)
    assert_exact([*tensors, torch.full_like(gate, logit)], (5, 14))


@pytest.mark.parametrize("grid_size", [(3, 5), (2, 67), (67, 2)], ids=str)
@pytest.mark.parametrize("weight", [0.0, 30.0, -30.0])
def test_flat_and_steep_positions(grid_size, weight):
    q, k, v, pos_weight, gate = inputs(1, 2, grid_size, 16, torch.bfloat16)
    assert_exact([q, k, v, torch.full_like(pos_weight, weight), gate], grid_size)


@pytest.mark.parametrize("factor", [30.0, 1e3])
def test_large_scores(factor):
    q, k, *rest = inputs(1, 2, (5, 14), 16, torch.float16)
    assert_exact([q * factor**0.5, k * factor**0.5, *rest], (5, 14))


def test_a_first_tile_of_scores_of_minus_infinity():
    q, k, *rest = [t.detach() for t in inputs(1, 1, (5, 26), 16, torch.float16)]
    q, k = q.abs() + 1, k.clone()
    k[:, :, :64] = -torch.inf
    got = emulation.tiled_forward(q, k, *rest, (5, 26), 0.25)
    expected = literal(*(t.double() for t in (q, k, *rest)), (5, 26), 0.25)
    assert (got.out.double() - expected).abs().max() <= 4 * torch.finfo(torch.float16).eps * expected.abs().max()


def run(tensors, grid_size, **kwargs):
    return emulation.tiled_forward(*(t.detach() for t in tensors), grid_size, tensors[0].size(-1) ** -0.5, **kwargs)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("deferred_copies", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_schedules_and_copies_change_no_bit(seed, deferred_copies, dropout_p):
    tensors = inputs(1, 1, (9, 21), 48, torch.float16)
    expected = run(tensors, (9, 21), dropout_p=dropout_p).out
    got = run(tensors, (9, 21), dropout_p=dropout_p, seed=seed, deferred_copies=deferred_copies)
    assert torch.equal(got.out, expected)


def test_any_strides():
    grid_size = (5, 14)
    tensors = [t.detach() for t in inputs(2, 3, grid_size, 40, torch.float16)]
    expected = run(tensors, grid_size).out
    packed = torch.stack([t.transpose(1, 2) for t in tensors[:3]], dim=2)  # (B, N, 3, H, D)
    views = packed.permute(2, 0, 3, 1, 4).unbind()
    assert torch.equal(run([*views, *tensors[3:]], grid_size).out, expected)
    # what surrounds a tensor in memory is neither read nor written: the emulator would stop
    memory = torch.full((2, 3, 2 * 70 + 9, 64), torch.nan, dtype=torch.float16)
    spread = [memory.clone()[:, :, 3:143:2, 8:48].copy_(t) for t in tensors[:3]]
    out = memory.clone()[:, :, 3:143:2, 8:48]
    assert torch.equal(run([*spread, *tensors[3:]], grid_size, out=out).out, expected)
    q, k, v, *rest = tensors
    k, v = k[:, :1].expand_as(q), v[:1].expand_as(q)
    expected = run([q, k.contiguous(), v.contiguous(), *rest], grid_size).out
    assert torch.equal(run([q, k, v, *rest], grid_size).out, expected)


def test_nan_stays_where_it_belongs():
    tensors = [t.detach() for t in inputs(3, 1, (5, 14), 32, torch.float16)]
    clean = run(tensors, (5, 14)).out
    tensors[0][0, 0, 7] = torch.nan
    tensors[2][1, 0, 3, 5] = torch.nan
    out = run(tensors, (5, 14)).out
    assert out[0, 0, 7].isnan().all()
    assert out[1, 0, :, 5].isnan().all()
    for result in (out, clean):
        result[0, 0, 7] = result[1, 0, :, 5] = 0
    assert torch.equal(out, clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_content_that_dropout_leaves(dtype):
    """What backward reads; `out` itself is checked with the gradients."""
    *tensors, gate = (t.detach() for t in inputs(2, 2, (9, 21), 48, dtype))
    tensors.append(torch.full_like(gate, -math.inf))
    scale, masks = 48**-0.5, dropped.masks(gate.new_empty(2, 2), (9, 21), 0.3, 11)
    got = emulation.tiled_forward(*tensors, (9, 21), scale, dropout_p=0.3, dropout_seed=11, save=True)
    settings = (9, 21), scale, masks, 0.3
    expected = dropped.dropped_out(*(t.double() for t in tensors), *settings)
    eager = dropped.dropped_out(*tensors, *settings)
    walk = dropped.dropped_walks(tensors, torch.zeros_like(tensors[0]), *settings)["out"]
    assert (got.content.double() - expected).abs().max() <= allowed_error(eager, expected, walk, dtype, 189)


def test_everything_dropped_out():
    got = run(inputs(1, 1, (5, 14), 16, torch.float16), (5, 14), dropout_p=1.0, save=True)
    assert torch.equal(got.out, torch.zeros_like(got.out))
    assert torch.equal(got.content, torch.zeros_like(got.out))


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def large(request):
    """(24, 24) tokens of 48 channels: what the budgets are asserted for, checked once against the formula."""
    return assert_exact(inputs(1, 1, (24, 24), 48, request.param), (24, 24))


def test_budgets_of_traffic(large):
    tokens, row, tiles = 576, 48 * 2, 9
    counts = large.counts
    # attention: K and V by each of 9 blocks, Q once, the position's rows once; position: V and then T once
    read = tokens * row * (2 * tiles + 2) + 2 * tokens * row
    written = tokens * row * (1 + 1 + 2) + 4 * tokens  # out, content; T and the position; logsumexp
    assert read <= counts["global_read"] <= 1.1 * read
    assert written <= counts["global_written"] <= 1.01 * written


def test_budgets_of_instructions(large):
    tokens, dim, side = 576, 48, 24
    unpadded = (2 * tokens * tokens + tokens * 2 * side) * dim / (16 * 8 * 16)
    assert unpadded <= large.counts["mma"] <= 1.2 * unpadded
    assert tokens * tokens <= large.counts["exp2"] <= 1.2 * tokens * tokens


def test_no_bank_conflicts(large):
    for kind in ("ldmatrix", "copy"):
        assert large.counts[kind] > 0
        assert large.counts[f"{kind}_conflicts"] == 0


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_no_bank_conflicts_for_any_native_head_dim(head_dim):
    counts = run(inputs(1, 1, (5, 14), head_dim, torch.float16), (5, 14)).counts
    assert counts["ldmatrix_conflicts"] == 0
    assert counts["copy_conflicts"] == 0
