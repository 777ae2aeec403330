"""Bad input: an error that names the argument, what came and what was expected, before any work."""

import re

import pytest
import torch
from reference import inputs

from gpsa_kernels import BACKENDS, FusedGPSA, SelfAttention, gpsa_attention

DTYPES = "must be float32, float64, float16 or bfloat16, got"
EMPTY = "q must have at least one head, token and channel, got shape"
NAMES = f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, got"
TOKENS = "grid_size must be (rows, columns) with rows * columns = 20 tokens, got"


def ones(*shape, **kwargs):
    return torch.ones(*shape, **{"dtype": torch.float64, **kwargs})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": ones(2, 20, 8)}, ValueError, "q must have 4 dimensions (batch, heads, tokens, head_dim), got shape (2,"),
        ({"q": ones(2, 0, 20, 8)}, ValueError, f"{EMPTY} (2, 0, 20, 8)"),
        ({"q": ones(2, 3, 0, 8)}, ValueError, f"{EMPTY} (2, 3, 0, 8)"),
        ({"q": ones(2, 3, 20, 0)}, ValueError, f"{EMPTY} (2, 3, 20, 0)"),
        ({"k": ones(2, 3, 21, 8)}, ValueError, "k must have q's shape (2, 3, 20, 8), got (2, 3, 21, 8)"),
        ({"v": ones(2, 3, 20, 4)}, ValueError, "v must have q's shape (2, 3, 20, 8), got (2, 3, 20, 4)"),
        ({"k": ones(2, 3, 20, 8, dtype=torch.float32)}, TypeError, "k must have q's dtype torch.float64, got torch.f"),
        ({"v": ones(2, 3, 20, 8, device="meta")}, ValueError, "v must be on q's device cpu, got meta"),
        ({"gate": ones(3, device="meta")}, ValueError, "gate must be on q's device cpu, got meta"),
        ({"q": ones(2, 3, 20, 8, dtype=torch.int64)}, TypeError, f"q {DTYPES} torch.int64"),
        ({"gate": ones(3, dtype=torch.int32)}, TypeError, f"gate {DTYPES} torch.int32"),
        ({"q": [1.0]}, TypeError, "q must be a torch.Tensor, got list"),
        ({"pos_weight": None}, TypeError, "pos_weight must be a torch.Tensor, got NoneType"),
        ({"pos_weight": ones(3, 2)}, ValueError, "pos_weight must have shape (3, 3) for 3 heads, got (3, 2)"),
        ({"pos_weight": ones(2, 3)}, ValueError, "pos_weight must have shape (3, 3) for 3 heads, got (2, 3)"),
        ({"gate": ones(1)}, ValueError, "gate must have shape (3,) for 3 heads, got (1,)"),
        ({"grid_size": (4, 6)}, ValueError, f"{TOKENS} (4, 6)"),
        ({"grid_size": (-4, -5)}, ValueError, f"{TOKENS} (-4, -5)"),
        ({"grid_size": (4.0, 5.0)}, TypeError, "grid_size must hold two integers, got (4.0, 5.0)"),
        ({"grid_size": 20}, ValueError, "grid_size must be a pair (rows, columns), got 20"),
        ({"grid_size": (2, 2, 5)}, ValueError, "grid_size must be a pair (rows, columns), got (2, 2, 5)"),
        ({"scale": float("nan")}, ValueError, "scale must be a finite number, got nan"),
        ({"scale": float("-inf")}, ValueError, "scale must be a finite number, got -inf"),
        ({"scale": "1"}, TypeError, "scale must be a finite number, got '1'"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p must be a probability in [0, 1], got 1.5"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must be a probability in [0, 1], got -0.1"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p must be a probability in [0, 1], got nan"),
        ({"backend": "fastest"}, ValueError, f"{NAMES} 'fastest'"),
        ({"backend": None}, ValueError, f"{NAMES} None"),
        ({"backend": "sdpa", "dropout_p": 0.5}, RuntimeError, "backend 'sdpa' cannot run this call: attention dropout"),
    ],
)
def test_operator(changes, error, message):
    tensors = zip(("q", "k", "v", "pos_weight", "gate"), inputs(2, 3, (4, 5), 8), strict=True)
    with pytest.raises(error, match=re.escape(message)):
        gpsa_attention(**{"grid_size": (4, 5), **dict(tensors), **changes})


@pytest.mark.parametrize(
    ("kind", "arguments", "shape", "message"),
    [
        (FusedGPSA, (10, 4), (), "dim must be a multiple of num_heads, got dim=10 and num_heads=4"),
        (FusedGPSA, (10, 0), (), "dim must be a multiple of num_heads, got dim=10 and num_heads=0"),
        (SelfAttention, (10, 4), (), "dim must be a multiple of num_heads, got dim=10 and num_heads=4"),
        (SelfAttention, (10, 0), (), "dim must be a multiple of num_heads, got dim=10 and num_heads=0"),
        (FusedGPSA, (8, 2), (9, 8), "x must be (batch, tokens, 8), got shape (9, 8)"),
        (FusedGPSA, (8, 2), (1, 9, 4), "x must be (batch, tokens, 8), got shape (1, 9, 4)"),
        (SelfAttention, (8, 2), (9, 8), "x must be (batch, tokens, 8), got shape (9, 8)"),
        (FusedGPSA, (8, 2), (1, 12, 8), "x has 12 tokens, which make no square grid: pass grid_size"),
    ],
)
def test_layers(kind, arguments, shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(*arguments)(torch.ones(shape))


def test_tokens_that_do_not_fit_the_grid_of_the_layer_or_of_the_call():
    x = torch.ones(1, 16, 8)
    with pytest.raises(ValueError, match=re.escape("rows * columns tokens for grid_size (3, 4), got 16")):
        FusedGPSA(8, 2, grid_size=(3, 4))(x)
    with pytest.raises(ValueError, match=re.escape("rows * columns tokens for grid_size (5, 5), got 16")):
        FusedGPSA(8, 2)(x, grid_size=(5, 5))
