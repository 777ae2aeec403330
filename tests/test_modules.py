"""FusedGPSA and SelfAttention as layers."""

import math

import pytest
import torch
from reference import literal
from torch import nn

from gpsa_kernels import FusedGPSA, SelfAttention
from gpsa_kernels.analysis import gates, non_locality
from gpsa_kernels.formula import attention_map, relative_offsets

backends = pytest.mark.parametrize("backend", ["auto", "eager", "sdpa"])
kinds = pytest.mark.parametrize("kind", [FusedGPSA, SelfAttention])


@backends
@pytest.mark.parametrize("grid_size", [None, (4, 4), (2, 8)])  # the layer's own
def test_the_layer_is_the_formula(backend, grid_size):
    """As the paper writes it, from the layer's parameters, on grids that change between calls."""
    settings = {"attn_drop": 0.5, "proj_drop": 0.5, "grid_size": grid_size, "backend": backend}
    layer = FusedGPSA(12, 3, qkv_bias=True, dtype=torch.float64, **settings).eval()
    weights = [p for name, p in layer.named_parameters() if name != "pos_proj.bias"]
    for of_call in (None, (3, 4), (4, 3), (1, 1), None):
        rows, columns = of_call or grid_size or (4, 4)
        x = torch.randn(2, rows * columns, 12, dtype=torch.float64)
        q, k = layer.qk(x).unflatten(2, (2, 3, 4)).permute(2, 0, 3, 1, 4)
        v = layer.v(x).unflatten(2, (3, 4)).transpose(1, 2)
        expected = literal(q, k, v, layer.pos_proj.weight, layer.gating_param, (rows, columns), layer.scale)
        outs = layer(x, of_call), layer.proj(expected.transpose(1, 2).flatten(2))
        torch.testing.assert_close(*outs)
        torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), weights) for out in outs))


def test_constructor_arguments():
    layer = FusedGPSA(16, 4, True, qk_scale=0.5, attn_drop=0.1, proj_drop=0.2, locality_strength=2.0)
    assert (layer.scale, layer.attn_drop.p, layer.proj_drop.p, layer.locality_strength) == (0.5, 0.1, 0.2, 2.0)
    assert FusedGPSA(16).num_heads == 8
    meta = FusedGPSA(16, 4, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in meta.parameters()} == {("meta", torch.bfloat16)}
    assert meta.get_attention(torch.empty(2, 9, 16, device="meta", dtype=torch.bfloat16)).shape == (2, 4, 9, 9)
    assert "grid_size=(2, 3)" in repr(FusedGPSA(16, 4, grid_size=(2, 3)))


def test_local_init():
    layer = FusedGPSA(20, 5, locality_strength=0.5)
    # head h1 + 2 h2 looks at (dx, dy) = (h2, h1) - 1/2
    expected = torch.tensor([[-1, -1, -1], [-1, 1, -1], [1, -1, -1], [1, 1, -1.0]]) * 0.5
    rest = layer.pos_proj.weight[4].clone()
    assert 0 < rest.abs().max() < 0.2  # trunc-normal with standard deviation 0.02
    assert torch.equal(layer.gating_param, torch.ones(5))
    for _ in range(2):
        assert torch.equal(layer.v.weight, torch.eye(20))
        assert torch.equal(layer.pos_proj.weight, torch.cat((expected, rest[None])))
        nn.init.zeros_(layer.v.weight)
        nn.init.zeros_(layer.pos_proj.weight[:4])
        layer.local_init()
    assert not torch.equal(FusedGPSA(20, 5, use_local_init=False).v.weight, torch.eye(20))


def test_a_local_head_looks_where_it_was_told_to():
    layer = FusedGPSA(9, 9, locality_strength=30.0, grid_size=(5, 6))
    nn.init.constant_(layer.gating_param, 50.0)
    of_query = layer.get_attention(torch.randn(1, 30, 9))[0, :, 2 * 6 + 3]  # in row 2, column 3
    assert of_query.argmax(-1).tolist() == [row * 6 + column for column in (2, 3, 4) for row in (1, 2, 3)]


@kinds
@pytest.mark.parametrize("name", ["attn_drop", "proj_drop"])
@pytest.mark.parametrize("training", [False, True])
def test_the_submodule_decides_whether_it_drops(kind, name, training):
    """As in timm, so that it can be frozen or kept up (Monte Carlo dropout) apart from the layer."""
    layer = kind(8, 2, **{name: 0.5}).train(not training)
    getattr(layer, name).train(training)
    x = torch.randn(2, 9, 8)
    assert torch.equal(layer(x), layer(x)) != training


def test_queries_and_keys_are_views():
    packed = torch.randn(2, 9, 16)
    assert {t.untyped_storage().data_ptr() for t in FusedGPSA(8, 2)._split_heads(packed, 2)} == {packed.data_ptr()}


def test_get_attention_computes_in_float32_under_autocast():
    layer, x = FusedGPSA(8, 2).eval(), torch.randn(2, 9, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention = layer.get_attention(x)
        q, k = layer._split_heads(layer.qk(x).float(), 2)
    expected = attention_map(q, k, layer.pos_proj.weight, layer.gating_param, (3, 3), layer.scale)
    assert torch.equal(attention, expected.bfloat16())


@pytest.mark.parametrize(("tokens", "grid_size", "columns"), [(9, None, 3), (16, (2, 8), 8)])
def test_get_attention_map(tokens, grid_size, columns):
    layer, x = FusedGPSA(8, 2).eval(), torch.randn(2, tokens, 8)
    distance, attention = layer.get_attention_map(x, return_map=True, grid_size=grid_size)
    assert torch.equal(attention, layer.get_attention(x, grid_size).mean(0))
    assert torch.equal(layer.get_attention_map(x, grid_size=grid_size), distance)
    places = [divmod(i, columns) for i in range(tokens)]
    steps = torch.tensor([[math.dist(a, b) for b in places] for a in places])
    torch.testing.assert_close(distance, (attention * steps).sum((1, 2)) / tokens)


def test_rel_indices():
    layer = FusedGPSA(8, 2)
    assert torch.equal(layer.get_rel_indices(9), relative_offsets((3, 3), dtype=torch.float32).unsqueeze(0))
    layer(torch.randn(1, 6, 8), grid_size=(2, 3))
    assert torch.equal(layer.rel_indices, relative_offsets((2, 3), dtype=torch.float32).unsqueeze(0))
    assert "rel_indices" not in layer.state_dict()
    assert layer.half().rel_indices.dtype == torch.float16


def test_non_locality_of_known_maps():
    eye = torch.eye(12).expand(3, 2, 12, 12)
    assert torch.equal(non_locality(eye, (3, 4)), torch.zeros(2))
    shift = torch.eye(12)[[*range(1, 12), 10]][None]  # every token looks at the next one, the last at the one before
    distances = [1, 1, 1, 10**0.5] * 2 + [1, 1, 1, 1]
    torch.testing.assert_close(non_locality(shift, (3, 4)), torch.tensor([sum(distances) / 12]))
    with pytest.raises(ValueError, match="attention must be"):
        non_locality(eye, (3, 3))


def test_gates():
    of_model = gates(nn.Sequential(FusedGPSA(8, 2), nn.Sequential(FusedGPSA(8, 4))))
    torch.testing.assert_close(of_model, {"0": torch.ones(2).sigmoid(), "1.0": torch.ones(4).sigmoid()})
    assert not any(g.requires_grad for g in of_model.values())


@backends
def test_self_attention(backend):
    layer = SelfAttention(12, 3, qkv_bias=True, qk_scale=0.3, backend=backend, dtype=torch.float64)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    q, k, v = layer.qkv(x).view(2, 9, 3, 3, 4).permute(2, 0, 3, 1, 4)
    attention = (0.3 * q @ k.mT).softmax(-1)
    torch.testing.assert_close(layer.get_attention(x), attention)
    torch.testing.assert_close(layer(x), layer.proj((attention @ v).transpose(1, 2).reshape(2, 9, 12)))
    assert list(layer.state_dict()) == ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
    distance, mean_map = layer.get_attention_map(x, return_map=True)
    assert (distance.shape, mean_map.shape) == ((3,), (3, 9, 9))
    layer.attn_drop.p = 1.0
    assert torch.equal(layer(x), layer.proj.bias.expand_as(x))
    assert f"backend={backend!r}" in repr(layer)
