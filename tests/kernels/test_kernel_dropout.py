"""Attention dropout in the kernels: one mask over both branches, replayed in the backward pass."""

import pytest
import torch
from reference import NAMES, attention, inputs, with_gradients

from gpsa_kernels.check.exactness import dropped_map

GRID, P = (5, 13), 0.3


@pytest.fixture
def tensors(target):
    """With a flat position, so that no entry of the map underflows."""
    tensors, _ = target.given(2, 2, GRID, 40, target.widest)
    tensors[3].mul_(0.1)
    return tensors


@pytest.fixture
def dropped(target, tensors):
    """The attention map after dropout."""

    def dropped(gate=None, dropout_p=P, **kwargs):
        q, k, _, pos_weight, gates = tensors
        gates = gates if gate is None else torch.full_like(gates, gate)
        settings = {"dropout_p": dropout_p, "backend": target.backend, **kwargs}
        return dropped_map(attention, q, k, pos_weight, gates, GRID, **settings)

    return dropped


def test_as_exact_as_eager_with_the_same_mask(target, dtype, dropout_shape):
    target.check(inputs(*dropout_shape, dtype), dropout_shape[2], dropout_p=P, saved=True)


@pytest.mark.parametrize("dropout_p", [1e-6, 0.01, 0.5, 0.9, 0.99])
def test_probabilities(target, dropout_p):
    target.check(inputs(1, 2, (3, 7), 32, torch.float16), (3, 7), dropout_p=dropout_p, saved=True)


@pytest.mark.parametrize("logit", [12.0, -12.0])
def test_open_and_closed_gates(target, grid, logit):
    *tensors, gate = inputs(1, 2, grid, 16, torch.float16)
    target.check([*tensors, torch.full_like(gate, logit)], grid, dropout_p=P, saved=True)


@pytest.mark.parametrize("weight", [0.0, 30.0, -30.0])
def test_flat_and_steep_positions(target, grid, weight):
    q, k, v, pos_weight, gate = inputs(1, 2, grid, 16, target.dtypes[-1])
    target.check([q, k, v, torch.full_like(pos_weight, weight), gate], grid, dropout_p=P, saved=True)


def test_keep_rate_and_scale(dropped):
    some, full = dropped(), dropped(dropout_p=0.0)
    kept = some != 0
    assert abs(kept.double().mean() - (1 - P)) < 4 * (P * (1 - P) / kept.numel()) ** 0.5
    eps = torch.finfo(some.dtype).eps
    torch.testing.assert_close(some[kept], full[kept] / (1 - P), rtol=16 * eps, atol=eps)


def test_one_mask_for_both_branches(dropped, tensors):
    tensors[0].mul_(0.1)
    tensors[3].fill_(0.01)
    position, content = dropped(gate=100.0), dropped(gate=-100.0)
    assert torch.equal(position != 0, content != 0)
    assert torch.equal(position != 0, dropped() != 0)


def test_masks_of_heads_images_and_seeds_differ(dropped):
    first, again, other = (dropped(seed=seed) != 0 for seed in (0, 0, 1))
    assert torch.equal(first, again)
    masks = torch.stack([*first.flatten(0, 1), *other.flatten(0, 1)]).flatten(1).float()
    agreement = (masks @ masks.T + (1 - masks) @ (1 - masks).T) / masks.size(1)
    expected = (1 - P) ** 2 + P**2
    off_diagonal = agreement[~torch.eye(len(masks), dtype=torch.bool)]
    assert (off_diagonal - expected).abs().max() < 6 * (expected * (1 - expected) / masks.size(1)) ** 0.5


def test_a_seed_gives_the_same_bits_and_another_one_others(target, tensors):
    grad_out, settings = torch.randn_like(tensors[0]), {"dropout_p": P, "backend": target.backend}
    first, again, other = (with_gradients(attention, tensors, grad_out, GRID, seed=s, **settings) for s in (5, 5, 6))
    for name, a, b, c in zip(NAMES, first, again, other, strict=True):
        assert torch.equal(a, b), name
        assert not torch.equal(a, c), name


def test_everything_dropped(target, tensors):
    for name, t in zip(NAMES, target.run(tensors, torch.randn_like(tensors[0]), GRID, dropout_p=1.0), strict=True):
        assert t.eq(0).all(), name
    if target.backend == "eager":
        return
    seed = torch.zeros(1, dtype=torch.int64, device=target.device)
    _, content, _ = torch.ops.gpsa.attention_forward(*tensors, seed, *GRID, 1.0, 1.0, target.backend, True)
    assert content.eq(0).all()
