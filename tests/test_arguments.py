"""Arguments: what is refused, in words that name the argument, what came and what was expected, and what is taken."""

import re
from decimal import Decimal
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from reference import inputs
from torch import nn

from gpsa_kernels import BACKENDS, ConViT, FusedGPSA, SelfAttention, fuse, gpsa_attention, unfuse

TENSORS = dict(zip(("q", "k", "v", "pos_weight", "gate"), inputs(2, 3, (2, 3), 8, torch.float32), strict=True))
ONE, TWO = torch.tensor(0.5), torch.tensor([2.0, 3.0])
operator = partial(gpsa_attention, **TENSORS, grid_size=(2, 3))
gpsa = partial(FusedGPSA, dim=8, num_heads=2)
convit = partial(ConViT, embed_dim=8, num_heads=2, depth=1, image_size=32)
layer, plain = gpsa(), SelfAttention(8, 2)
X = torch.randn(1, 9, 8)
# what takes one for a layer
GRIDS = (gpsa, partial(fuse, layer), *(partial(f, X) for f in (layer, layer.get_attention, layer.get_attention_map)))
NO_NUMBER = "must be a finite number, got "
DTYPES = "must be float32, float64, float16 or bfloat16, got"
BACKEND = f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, got"
EMPTY = "must have at least one head, token and channel, got shape"
DIVIDES = "dim must be a multiple of num_heads"
FITS = "grid_size must be (rows, columns) with rows * columns = 6 tokens, got"
PATCHES = "height and width must be multiples of the patch size 16, got"
PAIR = "grid_size must be a pair (rows, columns)"

kinds = pytest.mark.parametrize("kind", [FusedGPSA, SelfAttention])


@kinds
def test_what_timm_and_the_original_have_in_different_orders_goes_by_name(kind):
    """timm's fourth argument is attn_drop, the original's qk_scale."""
    with pytest.raises(TypeError, match="from 2 to 4 positional arguments but 5"):
        kind(24, 4, False, 0.3)


@kinds
def test_a_scale_of_zero_is_the_default_as_in_the_original(kind):
    assert kind(16, 4, qk_scale=0.0).scale == kind(16, 4).scale == 0.5


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (operator, {"q": torch.ones(2, 6, 8)}, ValueError, "q must have 4 dimensions (batch, heads, tokens, head_dim)"),
        *((operator, {"q": torch.ones(s)}, ValueError, f"q {EMPTY} {s}")
          for s in ((2, 0, 6, 8), (2, 3, 0, 8), (2, 3, 6, 0))),
        *((operator, {n: torch.ones(s)}, ValueError, f"{n} must have q's shape (2, 3, 6, 8), got {s}")
          for n, s in (("k", (2, 3, 7, 8)), ("v", (2, 3, 6, 4)))),
        (operator, {"k": TENSORS["k"].double()}, TypeError, "k must have q's dtype torch.float32, got torch.float64"),
        *((operator, {n: TENSORS[n].to("meta")}, ValueError, f"{n} must be on q's device cpu, got meta")
          for n in ("v", "gate")),
        *((operator, {n: TENSORS[n].int()}, TypeError, f"{n} {DTYPES} torch.int32") for n in ("q", "gate")),
        *((operator, {n: v}, TypeError, f"{n} must be a torch.Tensor, got {type(v).__name__}")
          for n, v in (("q", [1.0]), ("pos_weight", None))),
        *((operator, {n: torch.ones(s)}, ValueError, f"{n} must have shape {expected} for 3 heads, got {s}")
          for n, expected, s in (("pos_weight", (3, 3), (3, 2)), ("pos_weight", (3, 3), (2, 3)), ("gate", (3,), (1,)))),
        *((operator, {"grid_size": g}, ValueError, f"{FITS} {g}") for g in ((2, 4), (-2, -3))),
        *((operator, {"grid_size": g}, ValueError, f"{PAIR}, got {g!r}")
          for g in ("23", {2, 3}, {2: 0, 3: 1}, TWO, np.array([2, 3]), None, 6, (1, 2, 3))),
        *((operator, {"grid_size": g}, TypeError, f"grid_size must hold two integers, got {g!r}")
          for g in ((None, 6), (2j, 3), (True, 6), (Fraction(2), 3), (np.float32(2), 3), (2.0, 3), (*TWO,), ["2", 3])),
        *((operator, {"dropout_p": p}, TypeError, f"dropout_p {NO_NUMBER}{p!r} ({type(p).__name__})")
          for p in ("0.1", None, ONE, TWO, True, Decimal("0.1"))),
        *((operator, {"scale": s}, TypeError, f"scale {NO_NUMBER}{s!r} ({type(s).__name__})")
          for s in (ONE, nn.Parameter(ONE), True, "1")),
        *((operator, {"dropout_p": p}, ValueError, f"dropout_p must be a probability in [0, 1], got {p}")
          for p in (1.5, -0.1, float("nan"))),
        *((operator, {"scale": s}, ValueError, f"scale {NO_NUMBER}{s}") for s in (float("nan"), float("-inf"))),
        (operator, {"dropout_p": 0.5, "backend": "sdpa"}, RuntimeError, "backend 'sdpa' cannot run this call: att"),
        (operator, {"scale": 1e300}, ValueError, "a finite number of at most 3.4e+38, float32's largest, got 1e+300"),
        (operator, {"scale": 10**400}, ValueError, "scale must be a finite number, got inf"),
        *((f, {"backend": b}, ValueError, f"{BACKEND} {b!r}") for b in (["sdpa"], {}, None, "fastest")
          for f in (operator, gpsa, partial(fuse, layer))),
        *((operator, {n: t.detach().to_sparse()}, TypeError, f"{n} must be a dense tensor, got torch.sparse_coo")
          for n, t in TENSORS.items()),
        (operator, {"v": TENSORS["v"].detach().to_mkldnn()}, TypeError, "v must be a dense tensor, got torch._mkldnn"),
        (operator, {"q": torch.nested.nested_tensor([X])}, TypeError, "q must be a dense tensor, got nested"),
        *((f, {"x": x}, TypeError, f"x must be a torch.Tensor, got {type(x).__name__}")
          for x in ([1.0], None, X.numpy()) for f in (layer, plain, layer.get_attention, plain.get_attention)),
        *((f, {"grid_size": g}, error, message) for f in GRIDS for g, error, message in (
            (3, ValueError, f"{PAIR}, got 3"), ((3, 3, 7), ValueError, f"{PAIR}, got (3, 3, 7)"),
            ((3.0, 3.0), TypeError, "grid_size must hold two integers, got (3.0, 3.0)"),
            ((2, 0), ValueError, f"{PAIR} of positive integers or None, got (2, 0)"))),
        *((f, {"x": x}, ValueError, f"x must be (batch, tokens, 8), got shape {tuple(x.shape)}")
          for x in (X[0], X[..., :4]) for f in (layer, plain)),
        *((layer, {"x": X[:, :n]}, ValueError, f"x has {n} tokens, which make no square grid") for n in (0, 8)),
        *((f, {"x": X, **g}, ValueError, "x must have rows * columns tokens for grid_size (3, 4), got 9")
          for f, g in ((layer, {"grid_size": (3, 4)}), (gpsa(grid_size=(3, 4)), {}))),
        *((kind, {"dim": 10, "num_heads": n}, ValueError, f"{DIVIDES}, got dim=10 and num_heads={n}")
          for n in (0, 4) for kind in (FusedGPSA, SelfAttention)),
        (gpsa, {"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        *((gpsa, {n: v}, TypeError, f"{n} must be an integer, got {v!r}")
          for n in ("dim", "num_heads") for v in (None, "12", 8.0, True)),
        (gpsa, {"locality_strength": float("nan")}, ValueError, "locality_strength must be a finite number, got nan"),
        (gpsa, {"locality_strength": "1"}, TypeError, "locality_strength must be a finite number, got '1'"),
        *((convit, {"image_size": (h, w)}, ValueError, f"{PATCHES} {h} x {w}") for h, w in ((30, 30), (32, 4))),
        *((convit(), {"x": torch.ones(1, 3, h, 32)}, ValueError, f"{PATCHES} {h} x 32") for h in (30, 0)),
        *((convit(), {"x": torch.ones(s)}, ValueError, f"images must be (batch, 3, height, width), got shape {s}")
          for s in ((2, 1, 32, 32), (3, 32, 32))),
        *((convit, {"image_size": s}, ValueError, f"image_size must be a pair (height, width), got {s!r}")
          for s in ((32,), 32.0, "32")),
        *((convit, {n: v}, TypeError, f"{n} must be an integer, got {v!r}")
          for n, v in (("patch_size", (16, 16)), ("local_up_to_layer", None), ("depth", 1.0), ("num_classes", "5"))),
        *((convit, {n: v}, ValueError, f"{n} must be at least {v + 1}, got {v}")
          for n, v in (("patch_size", 0), ("local_up_to_layer", -1), ("depth", -1), ("num_classes", -1))),
        (convit(), {"x": X.numpy()}, TypeError, "images must be a torch.Tensor, got ndarray"),
        *((f, {"model": m}, TypeError, f"model must be a torch.nn.Module, got {kind}")
          for m, kind in ((None, type(None)), ([], list), ({}, dict), ("convit_tiny", str), (FusedGPSA, FusedGPSA))
          for f in (fuse, unfuse)),
        (fuse, {"model": layer, "outputs": 0}, ValueError, "outputs must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_what_is_refused(function, arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        function(**arguments)


def test_a_refused_call_leaves_a_layer_as_it_was():
    layer = gpsa()
    layer(X)
    with pytest.raises(ValueError, match="positive integers"):
        layer(X, (-3, -3))
    assert layer.rel_indices.shape == (1, 9, 9, 3)


def test_float64_among_tensors_that_autocast_casts_is_refused():
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="k must have q's dtype"):
        operator(k=TENSORS["k"].double())


@pytest.mark.parametrize(
    "arguments",
    [
        {"grid_size": [2, 3]},
        {"grid_size": torch.Size((2, 3))},
        {"grid_size": (np.int64(2), np.int32(3))},
        {"scale": np.float32(8**-0.5), "dropout_p": np.float64(0)},
        {"scale": np.float64(8**-0.5), "dropout_p": 0},
    ],
)
def test_what_is_taken_as_python_numbers(arguments):
    torch.testing.assert_close(operator(**arguments), operator())
    if "grid_size" in arguments:
        assert gpsa(**arguments).grid_size == (2, 3)


REGISTERED = TENSORS | {"seed": None, "rows": 2, "columns": 3, "scale": 0.3, "dropout_p": 0.0, "backend": "sdpa"}
SEED = torch.zeros(1, dtype=torch.int64)
SAVED = {"content": TENSORS["q"], "logsumexp": TENSORS["q"][..., 0], "grad_out": TENSORS["q"]}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": torch.randn(2, 3, 60, 8)}, "k must have q's shape (2, 3, 6, 8), got (2, 3, 60, 8)"),
        ({"v": torch.randn(2, 3, 6, 4)}, "v must have q's shape (2, 3, 6, 8), got (2, 3, 6, 4)"),
        ({"gate": torch.randn(1)}, "gate must have shape (3,) for 3 heads, got (1,)"),
        ({"k": TENSORS["k"].double()}, "k must have q's dtype torch.float32, got torch.float64"),
        ({"rows": 3}, "rows * columns must be 6, the tokens, got 3 * 3"),
        ({"rows": -2, "columns": -3}, "rows * columns must be 6, the tokens, got -2 * -3"),
        ({"backend": "eager"}, "backend must be one with kernels, 'cuda', 'triton', 'sdpa', got 'eager'"),
        ({"backend": "flash"}, "backend must be one with kernels, 'cuda', 'triton', 'sdpa', got 'flash'"),
        ({"grad_out": torch.randn(2, 3, 5, 8)}, "grad_out must have shape (2, 3, 6, 8), got (2, 3, 5, 8)"),
        ({"content": torch.randn(1, 3, 6, 8)}, "content must have shape (2, 3, 6, 8), got (1, 3, 6, 8)"),
        ({"logsumexp": torch.randn(2, 3, 0)}, "logsumexp must have shape (2, 3, 6), got (2, 3, 0)"),
        ({"dropout_p": 0.5, "seed": SEED}, "backend 'sdpa' cannot run this call: attention dropout needs one mask"),
        *(
            ({"backend": backend, **one}, f"seed must be a tensor if and only if dropout_p > 0, got {given}")
            for backend in ("sdpa", "triton", "cuda")
            for one, given in (({"dropout_p": 0.5}, "None for 0.5"), ({"seed": SEED}, "a tensor for 0.0"))
        ),
    ],
)
def test_the_registered_operators_check_their_arguments(arguments, message, device):
    def moved(arguments):
        return {n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}

    forward, backward = torch.ops.gpsa.attention_forward, torch.ops.gpsa.attention_backward
    with torch.inference_mode():
        if not arguments.keys() & SAVED.keys():
            with pytest.raises((TypeError, ValueError, RuntimeError), match=re.escape(message)):
                forward(**moved(REGISTERED | arguments))
        with pytest.raises((TypeError, ValueError, RuntimeError), match=re.escape(message)):
            backward(**moved(REGISTERED | SAVED | arguments))
        assert len(backward(**moved(REGISTERED | SAVED))) == 5
