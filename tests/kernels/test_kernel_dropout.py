"""Attention dropout in the kernels: one mask over both branches, replayed in the backward pass."""

from __future__ import annotations

import pytest
import torch
from reference import NAMES, assert_as_exact_as_eager, assert_what_backward_reads_is_exact, inputs, with_gradients

from gpsa_kernels import gpsa_attention
from gpsa_kernels.check.exactness import dropped_map, kept_by_dropout

GRID, TOKENS, HEAD_DIM, P = (5, 13), 65, 40, 0.3
SEED = 5


def _attention(*arguments, seed=SEED, **kwargs):
    """With the mask of a seed."""
    torch.manual_seed(seed)
    return gpsa_attention(*arguments, **kwargs)


@pytest.fixture
def tensors(target, widest):
    return [t.detach().to(target.device) for t in inputs(2, 2, GRID, HEAD_DIM, widest)]


def _dropped_map(tensors, target, gate=None, dropout_p=P, **kwargs):
    q, k, _, pos_weight, logits = tensors
    if gate is not None:
        logits = torch.full_like(logits, gate)
    settings = {"dropout_p": dropout_p, "backend": target.backend, **kwargs}
    return dropped_map(_attention, q, k, pos_weight, logits, GRID, **settings)


def check(target, tensors, grid_size, dropout_p=P):
    """The result, all gradients and what backward reads."""
    q = tensors[0]
    settings = {"dropout_p": dropout_p, "backend": target.backend}
    mask = kept_by_dropout(_attention, *q.shape[:2], grid_size, q.dtype, target.device, **settings)
    assert_as_exact_as_eager(_attention, tensors, grid_size, device=target.device, mask=mask, **settings)
    there, scale = [t.detach().to(target.device) for t in tensors], q.size(-1) ** -0.5
    torch.manual_seed(SEED)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=target.device)  # as gpsa_attention draws it
    _, *saved = torch.ops.gpsa.attention_forward(*there, seed, *grid_size, scale, dropout_p, target.backend, True)
    assert_what_backward_reads_is_exact(*saved, tensors, grid_size, scale, mask, dropout_p)


def test_as_exact_as_eager_with_the_same_mask(target, dtype, dropout_shape):
    check(target, inputs(*dropout_shape, dtype), dropout_shape[2])


@pytest.mark.parametrize("dropout_p", [1e-6, 0.01, 0.5, 0.9, 0.99])
def test_probabilities(target, dropout_p):
    check(target, inputs(1, 2, (3, 7), 32, torch.float16), (3, 7), dropout_p)


@pytest.mark.parametrize("logit", [12.0, -12.0])
def test_open_and_closed_gates(target, grid, logit):
    *tensors, gate = inputs(1, 2, grid, 16, torch.float16)
    check(target, [*tensors, torch.full_like(gate, logit)], grid)


@pytest.mark.parametrize("weight", [0.0, 30.0, -30.0])
def test_flat_and_steep_positions(target, grid, weight):
    q, k, v, pos_weight, gate = inputs(1, 2, grid, 16, target.dtypes[-1])
    check(target, [q, k, v, torch.full_like(pos_weight, weight), gate], grid)


def test_keep_rate_and_scale(target, tensors):
    tensors[3].mul_(0.1)  # no entry of the map underflows
    dropped = _dropped_map(tensors, target)
    kept = dropped != 0
    assert abs(kept.double().mean() - (1 - P)) < 4 * (P * (1 - P) / kept.numel()) ** 0.5
    full = _dropped_map(tensors, target, dropout_p=0.0)
    eps = torch.finfo(dropped.dtype).eps
    torch.testing.assert_close(dropped[kept], full[kept] / (1 - P), rtol=16 * eps, atol=eps)


def test_one_mask_for_both_branches(target, tensors):
    tensors[3].fill_(0.01)
    tensors[0].mul_(0.1)
    position, content = _dropped_map(tensors, target, gate=100.0), _dropped_map(tensors, target, gate=-100.0)
    assert torch.equal(position != 0, content != 0)
    assert torch.equal(position != 0, _dropped_map(tensors, target) != 0)


def test_masks_of_heads_images_and_seeds_differ(target, tensors):
    tensors[3].mul_(0.1)
    first, again, other = (_dropped_map(tensors, target, seed=seed) != 0 for seed in (0, 0, 1))
    assert torch.equal(first, again)
    masks = torch.stack([*first.flatten(0, 1), *other.flatten(0, 1)]).flatten(1).float()
    agreement = (masks @ masks.T + (1 - masks) @ (1 - masks).T) / masks.size(1)
    expected = (1 - P) ** 2 + P**2
    off_diagonal = agreement[~torch.eye(len(masks), dtype=torch.bool)]
    assert (off_diagonal - expected).abs().max() < 6 * (expected * (1 - expected) / masks.size(1)) ** 0.5


def test_gradients_by_finite_differences(target):
    if torch.float64 not in target.dtypes:
        pytest.skip("these kernels do not compute in float64")

    def dropped(*leaves):
        return _attention(*leaves, (2, 3), dropout_p=0.5, backend=target.backend)

    assert torch.autograd.gradcheck(dropped, inputs(1, 1, (2, 3), 8), fast_mode=True)


def test_a_seed_gives_the_same_bits_and_another_one_others(target, tensors):
    grad_out, kwargs = torch.randn_like(tensors[0]), {"dropout_p": P, "backend": target.backend}
    first, again, other = (with_gradients(_attention, tensors, grad_out, GRID, seed=s, **kwargs) for s in (5, 5, 6))
    for name, a, b, c in zip(NAMES, first, again, other, strict=True):
        assert torch.equal(a, b), name
        assert not torch.equal(a, c), name


def test_everything_dropped(target, tensors):
    grad_out = torch.randn_like(tensors[0])
    results = with_gradients(gpsa_attention, tensors, grad_out, GRID, dropout_p=1.0, backend=target.backend)
    for name, t in zip(NAMES, results, strict=True):
        assert t.eq(0).all(), name
    seed = torch.zeros(1, dtype=torch.int64, device=target.device)
    _, content, _ = torch.ops.gpsa.attention_forward(*tensors, seed, *GRID, 1.0, 1.0, target.backend, True)
    assert content.eq(0).all()
