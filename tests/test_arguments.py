"""Bad input: an error that names the argument, what came and what was expected, before any work."""

from __future__ import annotations

import re

import pytest
import torch
from reference import inputs

import gpsa_kernels
from gpsa_kernels import FusedGPSA, SelfAttention, gpsa_attention


def call(**changes):
    q, k, v, pos_weight, gate = inputs(2, 3, (4, 5), 8)
    arguments = {"q": q, "k": k, "v": v, "pos_weight": pos_weight, "gate": gate, "grid_size": (4, 5)}
    return gpsa_attention(**(arguments | changes))


def ones(*shape, **kwargs):
    return torch.ones(*shape, dtype=kwargs.pop("dtype", torch.float64), **kwargs)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": ones(2, 20, 8)}, ValueError, "q must have 4 dimensions (batch, heads, tokens, head_dim), got shape (2,"),
        ({"k": ones(2, 3, 21, 8)}, ValueError, "k must have q's shape (2, 3, 20, 8), got (2, 3, 21, 8)"),
        ({"v": ones(2, 3, 20, 4)}, ValueError, "v must have q's shape (2, 3, 20, 8), got (2, 3, 20, 4)"),
        ({"k": ones(2, 3, 20, 8, dtype=torch.float32)}, TypeError, "k must have q's dtype torch.float64, got torch.f"),
        ({"v": ones(2, 3, 20, 8, device="meta")}, ValueError, "v must be on q's device cpu, got meta"),
        ({"gate": ones(3, device="meta")}, ValueError, "gate must be on q's device cpu, got meta"),
        (
            {"q": ones(2, 3, 20, 8, dtype=torch.int64)},
            TypeError,
            "q must be float32, float64, float16 or bfloat16, got",
        ),
        ({"gate": ones(3, dtype=torch.int32)}, TypeError, "gate must be float32, float64, float16 or bfloat16, got"),
        ({"q": [1.0]}, TypeError, "q must be a torch.Tensor, got list"),
        ({"pos_weight": None}, TypeError, "pos_weight must be a torch.Tensor, got NoneType"),
        ({"pos_weight": ones(3, 2)}, ValueError, "pos_weight must have shape (3, 3) for 3 heads, got (3, 2)"),
        ({"pos_weight": ones(2, 3)}, ValueError, "pos_weight must have shape (3, 3) for 3 heads, got (2, 3)"),
        ({"gate": ones(1)}, ValueError, "gate must have shape (3,) for 3 heads, got (1,)"),
        (
            {"grid_size": (4, 6)},
            ValueError,
            "grid_size must be (rows, columns) with rows * columns = 20 tokens, got (4,",
        ),
        ({"grid_size": (-4, -5)}, ValueError, "grid_size must be (rows, columns) with rows * columns = 20 tokens"),
        ({"grid_size": (4.0, 5.0)}, TypeError, "grid_size must hold two integers, got (4.0, 5.0)"),
        ({"grid_size": 20}, ValueError, "grid_size must be a pair (rows, columns), got 20"),
        ({"grid_size": (2, 2, 5)}, ValueError, "grid_size must be a pair (rows, columns), got (2, 2, 5)"),
        ({"scale": float("nan")}, ValueError, "scale must be a finite number, got nan"),
        ({"scale": float("-inf")}, ValueError, "scale must be a finite number, got -inf"),
        ({"scale": "1"}, TypeError, "scale must be a finite number, got '1'"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p must be a probability in [0, 1], got 1.5"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must be a probability in [0, 1], got -0.1"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p must be a probability in [0, 1], got nan"),
        ({"backend": "fastest"}, ValueError, "backend must be 'auto' or one of"),
        ({"backend": None}, ValueError, "backend must be 'auto' or one of"),
        ({"backend": "sdpa", "dropout_p": 0.5}, RuntimeError, "backend 'sdpa' cannot run this call: attention dropout"),
    ],
)
def test_operator(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(**changes)


@pytest.mark.parametrize("shape", [(2, 0, 20, 8), (2, 3, 0, 8), (2, 3, 20, 0)])
def test_empty_heads_tokens_or_channels(shape):
    q = ones(*shape)
    with pytest.raises(ValueError, match="q must have at least one head, token and channel, got shape"):
        gpsa_attention(q, q, q, ones(shape[1], 3), ones(shape[1]), (4, 5))


def test_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match=", ".join(map(repr, gpsa_kernels.BACKENDS))):
        call(backend="flash")


@pytest.mark.parametrize("layer", [FusedGPSA, SelfAttention])
def test_heads_that_do_not_divide_dim(layer):
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads, got dim=10 and num_heads=4"):
        layer(10, 4)
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads"):
        layer(10, 0)


def test_layer_input():
    layer = FusedGPSA(8, 2)
    with pytest.raises(ValueError, match=re.escape("x must be (batch, tokens, 8), got shape (9, 8)")):
        layer(torch.ones(9, 8))
    with pytest.raises(ValueError, match=re.escape("x must be (batch, tokens, 8), got shape (1, 9, 4)")):
        layer(torch.ones(1, 9, 4))
    with pytest.raises(ValueError, match=re.escape("x must be (batch, tokens, 8), got shape (9, 8)")):
        SelfAttention(8, 2)(torch.ones(9, 8))


def test_layer_grid():
    with pytest.raises(ValueError, match="x has 12 tokens, which make no square grid: pass grid_size"):
        FusedGPSA(8, 2)(torch.ones(1, 12, 8))
    with pytest.raises(ValueError, match=re.escape("rows * columns tokens for grid_size (3, 4), got 16")):
        FusedGPSA(8, 2, grid_size=(3, 4))(torch.ones(1, 16, 8))
    with pytest.raises(ValueError, match=re.escape("rows * columns tokens for grid_size (5, 5), got 16")):
        FusedGPSA(8, 2)(torch.ones(1, 16, 8), grid_size=(5, 5))


def test_missing_and_unexpected_keys():
    layer = FusedGPSA(8, 2)
    state = layer.state_dict()
    state["extra"] = state.pop("gating_param")
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"gating_param".*Unexpected key.*"extra"'):
        layer.load_state_dict(state)
