"""Attention dropout in the kernels: one mask over both branches, replayed in the backward pass."""

from __future__ import annotations

import pytest
import torch
from reference import NAMES, inputs, literal, with_gradients

from gpsa_kernels import gpsa_attention

GRID, TOKENS, HEAD_DIM, P = (5, 13), 65, 72, 0.3


def _tensors(target, dtype):
    return [t.detach().to(target.device) for t in inputs(2, 2, GRID, HEAD_DIM, dtype)]


@pytest.fixture
def tensors(target, widest):
    return _tensors(target, widest)


def _dropped_map(tensors, target, seed=0, gate=None, dropout_p=P):
    """The attention map after dropout, read off with V = identity (head_dim padded to a multiple of 8)."""
    q, k, _, pos_weight, logits = tensors
    identity = torch.eye(TOKENS, HEAD_DIM, dtype=q.dtype, device=q.device).expand_as(q)
    if gate is not None:
        logits = torch.full_like(logits, gate)
    torch.manual_seed(seed)
    out = gpsa_attention(q, k, identity, pos_weight, logits, GRID, dropout_p=dropout_p, backend=target.backend)
    return out[..., :TOKENS].cpu()


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
    first, again, other = (_dropped_map(tensors, target, seed) != 0 for seed in (0, 0, 1))
    assert torch.equal(first, again)
    masks = torch.stack([*first.flatten(0, 1), *other.flatten(0, 1)]).flatten(1).float()
    agreement = (masks @ masks.T + (1 - masks) @ (1 - masks).T) / masks.size(1)
    expected = (1 - P) ** 2 + P**2
    off_diagonal = agreement[~torch.eye(len(masks), dtype=torch.bool)]
    assert (off_diagonal - expected).abs().max() < 6 * (expected * (1 - expected) / masks.size(1)) ** 0.5


@pytest.mark.smoke
def test_gradients_use_the_forward_mask(target, dtype):
    tensors = _tensors(target, dtype)
    mask = (_dropped_map(tensors, target) != 0).double() / (1 - P)
    grad_out = torch.randn(tensors[0].shape).to(tensors[0].dtype)

    def masked(q, k, v, pos_weight, gate):
        identity = torch.eye(TOKENS, dtype=q.dtype).expand(*q.shape[:2], -1, -1)
        return (literal(q, k, identity, pos_weight, gate, GRID, HEAD_DIM**-0.5) * mask) @ v

    def dropped(*leaves):
        torch.manual_seed(0)
        return gpsa_attention(*leaves, GRID, dropout_p=P, backend=target.backend)

    expected = with_gradients(masked, [t.cpu().double() for t in tensors], grad_out.double())
    found = with_gradients(dropped, tensors, grad_out.to(target.device))
    half_the_digits = torch.finfo(tensors[0].dtype).eps ** 0.5  # another mask leaves none
    for name, a, b in zip(NAMES, expected, found, strict=True):
        assert (b.cpu().double() - a).norm() < half_the_digits * a.norm(), name


def test_gradients_by_finite_differences(target, tensors):
    if torch.float64 not in target.dtypes:
        pytest.skip("these kernels do not compute in float64")

    def dropped(*leaves):
        torch.manual_seed(3)
        return gpsa_attention(*leaves, (2, 3), dropout_p=0.5, backend=target.backend)

    assert torch.autograd.gradcheck(dropped, inputs(1, 1, (2, 3), 8), fast_mode=True)


def test_same_seed_same_bits(target, tensors):
    assert torch.equal(_dropped_map(tensors, target, seed=5), _dropped_map(tensors, target, seed=5))


def test_everything_dropped(target, tensors):
    assert _dropped_map(tensors, target, dropout_p=1.0).eq(0).all()
