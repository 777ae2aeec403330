"""The reference model, against timm's, which was written without us, and against the formula."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from models import assert_rounded, gradients, randomized, timm_convit
from reference import loops
from timm.layers import resample_abs_pos_embed
from torch import nn

import gpsa_kernels
from gpsa_kernels import ConViT, FusedGPSA, SelfAttention
from gpsa_kernels.convit import DropPath


def small(**kwargs) -> ConViT:
    sizes = {"embed_dim": 24, "num_heads": 3, "depth": 3, "local_up_to_layer": 2, "image_size": 32, "patch_size": 8}
    return randomized(ConViT(**{**sizes, "num_classes": 5, **kwargs})).eval()


def images(batch: int, height: int, width: int | None = None) -> torch.Tensor:
    return torch.randn(batch, 3, height, width or height, dtype=torch.float64)


def like(theirs: nn.Module, **kwargs) -> ConViT:
    """Our model of the same size as one of timm's, holding its parameters."""
    build = getattr(gpsa_kernels, {4: "convit_tiny", 9: "convit_small", 16: "convit_base"}[theirs.num_features // 48])
    ours = build(image_size=64, device="meta", **kwargs)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return ours


# ---- timm as oracle -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_checkpoints_pass_both_ways(size):
    theirs = timm.create_model(f"convit_{size}", img_size=64, device="meta")
    ours = like(theirs)
    expected, actual = theirs.state_dict(), ours.state_dict()
    assert [(k, t.shape) for k, t in actual.items()] == [(k, t.shape) for k, t in expected.items()]
    theirs.load_state_dict(actual, strict=True, assign=True)


SHALLOW = {"depth": 3, "local_up_to_layer": 2}  # of the wide ones, to keep the float64 tests short


@pytest.mark.parametrize(("size", "sizes"), [("tiny", {}), ("small", SHALLOW), ("base", SHALLOW)])
def test_equals_timm(size, sizes):
    theirs = timm_convit(size, **sizes).eval()
    ours = like(theirs, **sizes).eval()
    x = images(2, 64)
    with torch.no_grad():
        assert_rounded(ours.forward_features(x), theirs.forward_features(x), ours)
        assert_rounded(ours(x), theirs(x), ours)


@pytest.mark.parametrize(
    ("size", "sizes"), [("tiny", {}), ("small", SHALLOW), ("base", SHALLOW), ("tiny", {"qkv_bias": True, **SHALLOW})]
)
def test_every_gradient_equals_timm(size, sizes):
    theirs = timm_convit(size, **sizes)
    ours = like(theirs, **sizes)
    x = images(2, 64)
    expected, actual = gradients(theirs, x), gradients(ours, x)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        if name.endswith("pos_proj.bias"):
            assert torch.equal(gradient, torch.zeros_like(gradient)), name
        else:
            assert_rounded(gradient, expected[name], ours, name)


@pytest.mark.parametrize("local_up_to_layer", [0, 1])
def test_class_token_joins_where_timm_adds_it(local_up_to_layer):
    sizes = {"depth": 2, "local_up_to_layer": local_up_to_layer}
    theirs = timm_convit(**sizes).eval()
    ours = like(theirs, **sizes).eval()
    x = images(2, 64)
    assert_rounded(ours(x), theirs(x), ours)


def test_without_position_embedding_equals_timm():
    sizes = {"depth": 2, "local_up_to_layer": 1, "use_pos_embed": False}
    theirs = timm_convit(**sizes).eval()
    ours = like(theirs, **sizes).eval()
    x = images(2, 64)
    assert_rounded(ours(x), theirs(x), ours)


# ---- structure ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dim", "heads", "millions"),  # arXiv 2103.10697, table 1
    [
        ("convit_tiny", 192, 4, 6),
        ("convit_small", 432, 9, 27),
        ("convit_base", 768, 16, 86),
        ("convit_tiny_plus", 256, 4, 10),
        ("convit_small_plus", 576, 9, 48),
        ("convit_base_plus", 1024, 16, 152),
    ],
)
def test_sizes_of_the_paper(name, dim, heads, millions):
    model = getattr(gpsa_kernels, name)(device="meta")
    assert model.num_features == dim
    assert [type(block.attn) for block in model.blocks] == [FusedGPSA] * 10 + [SelfAttention] * 2
    assert {block.attn.num_heads for block in model.blocks} == {heads}
    # the table gives whole millions, some rounded and some cut off
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 1.5


def test_class_token_alone_when_every_layer_is_local():
    model = small(local_up_to_layer=3)
    tokens = model.forward_features(images(2, 32))
    assert tokens.shape == (2, 17, 24)
    assert torch.equal(tokens[:, 0], model.norm(model.cls_token)[0].expand(2, -1))


def test_starts_as_a_convolution():
    model = ConViT(embed_dim=24, num_heads=4, depth=2, local_up_to_layer=1, locality_strength=2.0, image_size=32)
    attn = model.blocks[0].attn
    assert torch.equal(attn.v.weight, torch.eye(24))
    assert torch.equal(attn.pos_proj.weight[:, 2], torch.full((4,), -2.0))
    assert model.head.bias.abs().max() == 0


def test_arguments_reach_their_place():
    model = ConViT(
        embed_dim=24,
        num_heads=3,
        depth=3,
        local_up_to_layer=2,
        image_size=(32, 16),
        patch_size=8,
        in_chans=1,
        num_classes=0,
        mlp_ratio=2.0,
        qkv_bias=True,
        drop_rate=0.1,
        attn_drop_rate=0.2,
        drop_path_rate=0.3,
        backend="eager",
        dtype=torch.float64,
    )
    assert model.grid_size == (4, 2)
    assert isinstance(model.head, nn.Identity)
    assert model.blocks[0].mlp.fc1.out_features == 48
    assert model.blocks[0].attn.qk.bias is not None
    assert model.blocks[2].attn.qkv.bias is not None
    assert model.pos_drop.p == model.blocks[0].mlp.drop.p == model.blocks[0].attn.proj_drop.p == 0.1
    assert model.blocks[0].attn.attn_drop.p == model.blocks[2].attn.attn_drop.p == 0.2
    assert [block.drop_path.p for block in model.blocks] == [0.0, 0.15, 0.3]
    assert {block.attn.backend for block in model.blocks} == {"eager"}
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.eval()(torch.zeros(2, 1, 32, 16, dtype=torch.float64)).shape == (2, 24)
    assert model.no_weight_decay() == {"cls_token", "pos_embed"}


# ---- any image size -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 40), (40, 16), (8, 8)])
def test_rectangles_equal_the_formula_in_loops(height, width):
    model = small()
    attn, seen = model.blocks[1].attn, {}
    attn.register_forward_hook(lambda module, inputs, out: seen.update(x=inputs[0], out=out))
    rows, columns = height // 8, width // 8
    assert model.forward_features(images(2, height, width)).shape == (2, 1 + rows * columns, 24)

    def heads(t):
        return t.unflatten(2, (3, 8)).transpose(1, 2)

    q, k = map(heads, attn.qk(seen["x"]).chunk(2, dim=-1))
    v = heads(attn.v(seen["x"]))
    out = loops(q, k, v, attn.pos_proj.weight, attn.gating_param, (rows, columns), 8**-0.5)
    assert_rounded(seen["out"], attn.proj(out.transpose(1, 2).flatten(2)), model)


@pytest.mark.parametrize(("height", "width"), [(48, 48), (16, 16), (24, 40)])
def test_position_embedding_of_another_grid(height, width):
    """On the fly, the same as in a model that is made for the grid and holds timm's resampling."""
    model, made_for_it = small(), small(image_size=(height, width))
    state = model.state_dict()
    grid = [height // 8, width // 8]
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"].float(), grid, [4, 4], 0).double()
    made_for_it.load_state_dict(state)
    x = images(2, height, width)
    # timm resamples in float32: so do we, then, for this comparison
    with torch.no_grad():
        model.float()
        made_for_it.float()
        assert_rounded(model(x.float()), made_for_it(x.float()), model)


def test_position_embedding_learns_through_resampling():
    model = small()
    model(images(1, 48)).sum().backward()
    assert model.pos_embed.grad.abs().min() > 0


@pytest.mark.parametrize("wrap", [lambda model: model, nn.Sequential])
def test_checkpoint_of_another_size_is_resampled(wrap):
    other, model = small(image_size=48), small()
    state = wrap(other).state_dict()
    before = {name: t.clone() for name, t in state.items()}
    wrap(model).load_state_dict(state)
    x = images(2, 32)
    with torch.no_grad():
        assert_rounded(model(x), other(x), model)
    assert all(torch.equal(state[name], t) for name, t in before.items())


def test_checkpoint_of_the_same_size_is_copied():
    other, model = small(), small()
    nn.init.normal_(model.pos_embed)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.pos_embed, other.pos_embed)


def test_half_precision_checkpoint_is_resampled():
    state = small(image_size=48).half().state_dict()
    model = small().half()
    model.load_state_dict(state)
    assert model.pos_embed.dtype == torch.float16
    assert model.pos_embed.isfinite().all()


# ---- training -------------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_nothing():
    model = small(drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.5).train()
    x = images(4, 32)
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        calls = 0

        def count(*_):
            nonlocal calls
            calls += 1

        handle = model.blocks[0].register_forward_pre_hook(count)
        torch.manual_seed(1)
        results.append(gradients(model, x))
        handle.remove()
        assert calls == 1 + enable
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_nothing_is_checkpointed_where_nothing_is_differentiated(monkeypatch):
    """torch's checkpoint reads the random generators, which no CUDA graph of an inference allows."""
    model = small()
    model.set_grad_checkpointing()
    monkeypatch.setattr("gpsa_kernels.convit.checkpoint", None)
    with torch.no_grad():
        model(images(1, 32))


def test_every_dropout_draws_what_timms_draws():
    rates = {"attn_drop_rate": 0.2, "drop_path_rate": 0.5}
    theirs = timm_convit(**SHALLOW, **rates, pos_drop_rate=0.3, proj_drop_rate=0.3).train()
    ours = like(theirs, **SHALLOW, **rates, drop_rate=0.3).train()
    x, results = images(4, 64), []
    for model in (ours, theirs):
        torch.manual_seed(1)
        results.append(model(x).detach())
    assert_rounded(*results, ours)


def test_drop_path():
    layer = DropPath(0.25)
    x = torch.randn(4000, 2, 3)
    out = layer(x)
    kept = out.flatten(1).any(dim=1)
    torch.testing.assert_close(out[kept], x[kept] / 0.75)
    assert out[~kept].abs().max() == 0
    # five standard deviations of a binomial share
    assert abs(kept.float().mean() - 0.75) < 5 * (0.75 * 0.25 / 4000) ** 0.5
    assert torch.equal(layer.eval()(x), x)
    assert DropPath(1.0)(x).abs().max() == 0


def test_dropout_acts_in_training_only():
    model = small(drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5)
    x = images(2, 32)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image_size": 30}, "height and width must be multiples of the patch size 8, got 30 x 30"),
        ({"image_size": (32, 4)}, "height and width must be multiples of the patch size 8, got 32 x 4"),
        ({"num_heads": 5}, "dim must be a multiple of num_heads, got dim=24 and num_heads=5"),
        ({"local_up_to_layer": -1}, "local_up_to_layer must be at least 0, got -1"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small(**kwargs)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 32, 30), "height and width must be multiples of the patch size 8, got 32 x 30"),
        ((2, 3, 0, 32), "height and width must be multiples of the patch size 8, got 0 x 32"),
        ((2, 1, 32, 32), "images must be (batch, 3, height, width), got shape (2, 1, 32, 32)"),
        ((3, 32, 32), "images must be (batch, 3, height, width), got shape (3, 32, 32)"),
    ],
)
def test_bad_images(shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small()(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("blocks.0.attn.gating_param"), 'Missing key(s) in state_dict: "blocks.0.attn.gating_'),
        (lambda state: state.pop("pos_embed"), 'Missing key(s) in state_dict: "pos_embed"'),
        (lambda state: state.update(extra=torch.zeros(1)), 'Unexpected key(s) in state_dict: "extra"'),
        (lambda state: state.update(pos_embed=torch.zeros(1, 17, 24)), "size mismatch for pos_embed"),
        (lambda state: state.update(pos_embed=torch.zeros(1, 9, 25)), "size mismatch for pos_embed"),
    ],
)
def test_bad_checkpoints(change, message):
    state = small().state_dict()
    change(state)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        small().load_state_dict(state)
