"""FusedGPSA and SelfAttention as layers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from reference import literal
from torch import nn

from gpsa_kernels import FusedGPSA, SelfAttention
from gpsa_kernels.analysis import gates, non_locality
from gpsa_kernels.formula import attention_map, relative_offsets

backends = pytest.mark.parametrize("backend", ["auto", "eager", "sdpa"])


def spelled_out(layer, x, grid_size):
    """The layer as the paper writes it, from its parameters."""
    batch, tokens, dim = x.shape
    q, k = layer.qk(x).view(batch, tokens, 2, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    v = layer.v(x).view(batch, tokens, layer.num_heads, -1).transpose(1, 2)
    out = literal(q, k, v, layer.pos_proj.weight, layer.gating_param, grid_size, layer.scale)
    return layer.proj(out.transpose(1, 2).reshape(batch, tokens, dim))


@backends
@pytest.mark.parametrize(("tokens", "grid_size"), [(9, None), (12, (3, 4)), (12, (4, 3)), (1, None)])
def test_the_layer_is_the_formula(backend, tokens, grid_size):
    layer = FusedGPSA(12, 3, qkv_bias=True, grid_size=grid_size, backend=backend, dtype=torch.float64)
    x = torch.randn(2, tokens, 12, dtype=torch.float64)
    out = layer(x)
    side = round(tokens**0.5)
    expected = spelled_out(layer, x, grid_size or (side, side))
    torch.testing.assert_close(out, expected)
    weights = [p for name, p in layer.named_parameters() if name != "pos_proj.bias"]
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), weights, retain_graph=True),
        torch.autograd.grad(expected.square().sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_constructor_arguments():
    layer = FusedGPSA(16, 4, True, qk_scale=0.5, attn_drop=0.1, proj_drop=0.2, locality_strength=2.0)
    assert (layer.scale, layer.attn_drop.p, layer.proj_drop.p, layer.locality_strength) == (0.5, 0.1, 0.2, 2.0)
    assert FusedGPSA(16).num_heads == 8
    meta = FusedGPSA(16, 4, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in meta.parameters()} == {("meta", torch.bfloat16)}
    assert "grid_size=(2, 3)" in repr(FusedGPSA(16, 4, grid_size=(2, 3)))


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_state_dict_keys_shapes_and_order(qkv_bias):
    state = FusedGPSA(8, 2, qkv_bias=qkv_bias).state_dict()
    biases = {"qk.bias": (16,), "v.bias": (8,)} if qkv_bias else {}
    expected = {
        "gating_param": (2,),
        "qk.weight": (16, 8),
        "v.weight": (8, 8),
        "proj.weight": (8, 8),
        "proj.bias": (8,),
    }
    expected |= {"pos_proj.weight": (2, 3), "pos_proj.bias": (2,)} | biases
    assert {name: tuple(t.shape) for name, t in state.items()} == expected
    order = ["gating_param", "qk.weight", "qk.bias", "v.weight", "v.bias", "proj.weight", "proj.bias"]
    order += ["pos_proj.weight", "pos_proj.bias"]
    assert list(state) == [name for name in order if name in expected]


def test_local_init():
    layer = FusedGPSA(20, 5, locality_strength=0.5)
    assert torch.equal(layer.v.weight, torch.eye(20))
    assert torch.equal(layer.gating_param, torch.ones(5))
    # head h1 + 2 h2 looks at (dx, dy) = (h2, h1) - 1/2
    expected = torch.tensor([[-1, -1, -1], [-1, 1, -1], [1, -1, -1], [1, 1, -1.0]]) * 0.5
    assert torch.equal(layer.pos_proj.weight[:4], expected)
    rest = layer.pos_proj.weight[4].clone()
    assert 0 < rest.abs().max() < 0.2  # trunc-normal with standard deviation 0.02
    with torch.no_grad():
        layer.v.weight.zero_()
        layer.pos_proj.weight[:4] = 7
    layer.local_init()
    assert torch.equal(layer.v.weight, torch.eye(20))
    assert torch.equal(layer.pos_proj.weight[:4], expected)
    assert torch.equal(layer.pos_proj.weight[4], rest)
    random = FusedGPSA(20, 5, use_local_init=False)
    assert not torch.equal(random.v.weight, torch.eye(20))


def test_a_local_head_looks_where_it_was_told_to():
    layer = FusedGPSA(9, 9, locality_strength=30.0, grid_size=(5, 6))
    with torch.no_grad():
        layer.gating_param.fill_(50.0)
    attention = layer.get_attention(torch.randn(1, 30, 9))[0]
    query = 2 * 6 + 3
    for h1 in range(3):
        for h2 in range(3):
            assert attention[h1 + 3 * h2, query].argmax() == (2 + h1 - 1) * 6 + (3 + h2 - 1)


def test_the_size_may_change_between_calls():
    layer = FusedGPSA(8, 2)
    for tokens, grid_size in ((16, None), (9, None), (6, (2, 3)), (6, (3, 2)), (4, None)):
        x = torch.randn(1, tokens, 8)
        side = round(tokens**0.5)
        torch.testing.assert_close(layer(x, grid_size), spelled_out(layer, x, grid_size or (side, side)))


def test_dropout_is_for_training():
    layer = FusedGPSA(8, 2, attn_drop=0.5, proj_drop=0.5)
    x = torch.randn(2, 9, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), spelled_out(layer, x, (3, 3)))


@pytest.mark.parametrize("kind", [FusedGPSA, SelfAttention])
@pytest.mark.parametrize("training", [False, True])
def test_the_submodule_decides_whether_attention_is_dropped(kind, training):
    """As in timm, so that it can be frozen or kept up (Monte Carlo dropout) apart from the layer."""
    layer = kind(8, 2, attn_drop=0.5).train(not training)
    layer.attn_drop.train(training)
    x = torch.randn(2, 9, 8)
    assert torch.equal(layer(x), layer(x)) != training


@backends
def test_position_bias_gets_a_zero_gradient(backend):
    layer = FusedGPSA(8, 2, backend=backend)
    layer(torch.randn(2, 9, 8)).sum().backward()
    assert layer.pos_proj.bias.grad is not None
    assert not layer.pos_proj.bias.grad.any()
    assert all(p.grad is not None for p in layer.parameters())


def test_a_frozen_layer_lets_gradients_through():
    layer = FusedGPSA(8, 2).requires_grad_(False)
    x = torch.randn(2, 9, 8, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in layer.parameters())


def test_queries_and_keys_are_views():
    layer = FusedGPSA(8, 2)
    packed = torch.randn(2, 9, 16)
    layer.qk = nn.Identity()
    q, k = layer._queries_and_keys(packed)
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()


def test_get_attention():
    layer = FusedGPSA(8, 2, dtype=torch.float64).eval()
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    attention = layer.get_attention(x)
    assert attention.shape == (2, 2, 9, 9)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 2, 9, dtype=torch.float64))
    v = layer.v(x).view(2, 9, 2, 4).transpose(1, 2)
    torch.testing.assert_close(layer.proj((attention @ v).transpose(1, 2).reshape(2, 9, 8)), layer(x))
    attention.square().sum().backward()
    assert x.grad.any()
    assert layer.pos_proj.weight.grad.any()


def test_get_attention_computes_in_float32_under_autocast():
    layer = FusedGPSA(8, 2).eval()
    x = torch.randn(2, 9, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention = layer.get_attention(x)
        q, k = (t.float() for t in layer._queries_and_keys(x))
    expected = attention_map(q, k, layer.pos_proj.weight, layer.gating_param, (3, 3), layer.scale)
    assert torch.equal(attention, expected.bfloat16())


@pytest.mark.parametrize(("tokens", "grid_size", "columns"), [(9, None, 3), (16, (2, 8), 8)])
def test_get_attention_map(tokens, grid_size, columns):
    layer = FusedGPSA(8, 2).eval()
    x = torch.randn(2, tokens, 8)
    distance, attention = layer.get_attention_map(x, return_map=True, grid_size=grid_size)
    assert torch.equal(attention, layer.get_attention(x, grid_size).mean(0))
    assert torch.equal(layer.get_attention_map(x, grid_size=grid_size), distance)
    by_hand = torch.zeros(2)
    for i in range(tokens):
        for j in range(tokens):
            steps = i // columns - j // columns, i % columns - j % columns
            by_hand += attention[:, i, j] * math.hypot(*steps) / tokens
    torch.testing.assert_close(distance, by_hand)


def test_rel_indices():
    layer = FusedGPSA(8, 2)
    assert torch.equal(layer.get_rel_indices(9), relative_offsets((3, 3), dtype=torch.float32).unsqueeze(0))
    layer(torch.randn(1, 6, 8), grid_size=(2, 3))
    assert torch.equal(layer.rel_indices, relative_offsets((2, 3), dtype=torch.float32).unsqueeze(0))
    assert "rel_indices" not in layer.state_dict()
    assert layer.half().rel_indices.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_layer(dtype):
    layer = FusedGPSA(16, 2)
    x = torch.randn(2, 9, 16)
    expected = layer(x)
    low = layer.to(dtype)(x.to(dtype))
    assert low.dtype == dtype
    # two roundings of activations of the order of the result's, on each of the projections' 16 terms
    error = (low.float() - expected).abs().max().item()
    assert error < 2 * 16**0.5 * torch.finfo(dtype).eps * max(1.0, expected.abs().max().item())


def test_non_locality_of_known_maps():
    eye = torch.eye(12).expand(3, 2, 12, 12)
    assert torch.equal(non_locality(eye, (3, 4)), torch.zeros(2))
    shift = torch.eye(12).roll(1, dims=1)[None]
    shift[0, 11] = 0
    shift[0, 11, 10] = 1
    distances = [1, 1, 1, 10**0.5] * 2 + [1, 1, 1, 1]
    torch.testing.assert_close(non_locality(shift, (3, 4)), torch.tensor([sum(distances) / 12]))
    with pytest.raises(ValueError, match="attention must be"):
        non_locality(eye, (3, 3))


def test_gates():
    model = nn.Sequential(FusedGPSA(8, 2), nn.Sequential(FusedGPSA(8, 4)))
    assert {name: tuple(g.shape) for name, g in gates(model).items()} == {"0": (2,), "1.0": (4,)}
    assert torch.equal(gates(model)["0"], torch.sigmoid(torch.ones(2)))
    assert not any(g.requires_grad for g in gates(model).values())


@backends
def test_self_attention(backend):
    layer = SelfAttention(12, 3, qkv_bias=True, qk_scale=0.3, backend=backend, dtype=torch.float64)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    q, k, v = layer.qkv(x).view(2, 7, 3, 3, 4).permute(2, 0, 3, 1, 4)
    attention = F.softmax(0.3 * q @ k.mT, dim=-1)
    torch.testing.assert_close(layer.get_attention(x), attention)
    torch.testing.assert_close(layer(x), layer.proj((attention @ v).transpose(1, 2).reshape(2, 7, 12)))
    assert list(layer.state_dict()) == ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
    distance, mean_map = layer.get_attention_map(torch.randn(2, 9, 12, dtype=torch.float64), return_map=True)
    assert (distance.shape, mean_map.shape) == ((3,), (3, 9, 9))
    layer.attn_drop.p = 1.0
    assert torch.equal(layer(x), layer.proj.bias.expand_as(x))
    assert f"backend={backend!r}" in repr(layer)


@backends
@pytest.mark.parametrize("kind", [FusedGPSA, SelfAttention])
def test_shapes_on_the_meta_device(kind, backend):
    layer, x = kind(12, 3, backend=backend, device="meta"), torch.randn(2, 9, 12, device="meta")
    out = layer(x)
    assert (out.shape, out.device.type) == (x.shape, "meta")
    assert layer.get_attention(x).shape == (2, 3, 9, 9)
    grads = torch.autograd.grad(out.sum(), tuple(layer.parameters()))
    assert [g.shape for g in grads] == [p.shape for p in layer.parameters()]
