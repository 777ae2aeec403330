"""The reference model, against timm's, which was written without us."""

import copy
import re

import pytest
import torch
from models import SHALLOW, assert_rounded, assert_same_outcome, images, outcome, randomized, timm_convit
from timm.layers import resample_abs_pos_embed
from timm.optim import create_optimizer_v2
from torch import nn
from torch.export import Dim, export

import gpsa_kernels
from gpsa_kernels import ConViT, FusedGPSA, SelfAttention

SIZES = {**SHALLOW, "embed_dim": 24, "num_heads": 3, "image_size": 32, "patch_size": 8, "num_classes": 5}


def small(**kwargs) -> ConViT:
    return randomized(ConViT(**{**SIZES, **kwargs})).eval()


def like(theirs: nn.Module, size: str = "tiny", **kwargs) -> ConViT:
    """Our model of the same size as one of timm's, holding its parameters."""
    ours = getattr(gpsa_kernels, f"convit_{size}")(image_size=64, device="meta", **kwargs)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return ours


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        *(("tiny", {}), ("small", SHALLOW), ("base", SHALLOW)),
        *(("tiny", {**SHALLOW, **other}) for other in ({"qkv_bias": True}, {"use_pos_embed": False})),
        *(("tiny", {"depth": 2, "local_up_to_layer": local}) for local in (0, 1)),
    ],
)
def test_every_output_and_gradient_equals_timms(size, sizes):
    """And parameters pass both ways, in the same order."""
    theirs = timm_convit(size, **sizes)
    ours, x = like(theirs, size, **sizes), images(2, 64)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_rounded(ours.forward_features(x), theirs.forward_features(x), ours)
    assert_same_outcome(outcome(ours, x), outcome(theirs, x), ours)


@pytest.mark.parametrize(
    ("name", "dim", "heads", "millions"),  # arXiv 2103.10697, table 1
    [
        *(("tiny", 192, 4, 6), ("small", 432, 9, 27), ("base", 768, 16, 86)),
        *(("tiny_plus", 256, 4, 10), ("small_plus", 576, 9, 48), ("base_plus", 1024, 16, 152)),
    ],
)
def test_sizes_of_the_paper(name, dim, heads, millions):
    model = getattr(gpsa_kernels, f"convit_{name}")(device="meta")
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


def test_arguments_reach_their_place():
    sizes = {"image_size": (32, 16), "in_chans": 1, "num_classes": 0, "mlp_ratio": 2.0, "qkv_bias": True}
    rates = {"drop_rate": 0.1, "attn_drop_rate": 0.2, "drop_path_rate": 0.3, "locality_strength": 2.0}
    model = ConViT(**{**SIZES, **sizes, **rates}, backend="eager", dtype=torch.float64)
    first, _, last = model.blocks
    assert model.grid_size == (4, 2)
    assert isinstance(model.head, nn.Identity)
    assert first.mlp.fc1.out_features == 48
    assert first.attn.qk.bias is not None
    assert last.attn.qkv.bias is not None
    drops = (model.pos_drop, first.mlp.drop1, first.mlp.drop2, first.attn.proj_drop, last.attn.proj_drop)
    assert {drop.p for drop in drops} == {0.1}
    assert first.attn.attn_drop.p == last.attn.attn_drop.p == 0.2
    assert [block.drop_path.p for block in model.blocks] == [0.0, 0.15, 0.3]
    assert {block.attn.backend for block in model.blocks} == {"eager"}
    assert first.attn.pos_proj.weight[0, 2] == -2.0
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.eval()(torch.zeros(2, 1, 32, 16, dtype=torch.float64)).shape == (2, 24)
    assert small(img_size=(32, 16)).grid_size == (4, 2)
    new = ConViT(**SIZES)
    assert not new.head.bias.any()
    assert not new.blocks[0].mlp.fc1.bias.any()


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (2, 5), (5, 2), (1, 1)])
def test_layers_are_told_the_grid_of_any_image(rows, columns):
    model, seen = small(), []
    for block in model.blocks[:2]:
        block.attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    assert model.forward_features(images(2, 8 * rows, 8 * columns)).shape == (2, 1 + rows * columns, 24)
    assert seen == 2 * [(rows, columns)]


@pytest.mark.parametrize(("height", "width"), [(48, 48), (16, 16), (24, 40)])
def test_position_embedding_of_another_grid(height, width):
    """On the fly, the same as in a model that is made for the grid and holds timm's resampling."""
    # timm resamples in float32: so do we, then, for this comparison
    model, made_for_it = small().float(), small(image_size=(height, width)).float()
    state = model.state_dict()
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [height // 8, width // 8], [4, 4], 0)
    made_for_it.load_state_dict(state)
    x = images(2, height, width).float()
    assert_rounded(model(x), made_for_it(x), model)
    model(x).sum().backward()
    assert model.pos_embed.grad.abs().min() > 0


@pytest.mark.parametrize("wrap", [lambda model: model, nn.Sequential])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_checkpoint_of_another_size_is_resampled(wrap, dtype):
    other, model = small(image_size=48).to(dtype), small().to(dtype)
    state = wrap(other).state_dict()
    before = copy.deepcopy(state)
    wrap(model).load_state_dict(state)
    x = images(2, 32).to(dtype)
    assert_rounded(model(x), other(x), model)
    torch.testing.assert_close(state, before, rtol=0, atol=0)


def test_checkpoint_of_the_same_size_is_copied():
    other, model = small(image_size=(16, 64)), small(image_size=(16, 64))  # as many patches as a square has
    nn.init.normal_(model.pos_embed)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.pos_embed, other.pos_embed)


@pytest.mark.parametrize("loaded", [{"pos_embed": torch.zeros(1, 17, 24)}, {"pos_embed": torch.zeros(1, 9, 25)}, {}])
def test_position_embeddings_that_cannot_be_resampled(loaded):
    state = small().state_dict()
    del state["pos_embed"]
    message = "size mismatch for pos_embed" if loaded else r'Missing key\(s\) in state_dict: "pos_embed"'
    with pytest.raises(RuntimeError, match=message):
        small().load_state_dict(state | loaded)


def test_gradient_checkpointing_changes_nothing():
    model = small(drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.5).train()
    x, results, calls = images(4, 32), [], []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(model.grad_checkpointing))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        results.append(outcome(model, x))
    assert calls == [False, True, True]
    torch.testing.assert_close(*results, rtol=0, atol=0)


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


@pytest.mark.parametrize("layer_decay", [None, 0.75])
def test_timms_optimizers_see_the_same_groups_as_in_timms_model(layer_decay):
    def groups(model: nn.Module) -> dict:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        made = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=layer_decay)
        settings = [(group["params"], group["weight_decay"], group.get("lr_scale")) for group in made.param_groups]
        return {names[id(parameter)]: rest for parameters, *rest in settings for parameter in parameters}

    theirs = timm_convit(**SHALLOW)
    assert groups(like(theirs, **SHALLOW)) == groups(theirs)


@pytest.mark.parametrize("indices", [None, 2, (0, -1), [1]], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"norm": True, "output_fmt": "NLC"}, {"stop_early": True}])
def test_intermediates_are_timms(indices, kwargs):
    theirs, x = timm_convit(**SHALLOW), images(2, 64)
    ours = like(theirs, **SHALLOW)
    expected, kept = theirs.forward_intermediates(x, indices, **kwargs)
    tokens, *actual = ours.forward_intermediates(x, indices, **kwargs)
    for mine, other in zip(actual[0], kept, strict=True):
        assert_rounded(mine, other, ours)
    assert_rounded(tokens[:, -16:], expected[:, -16:], ours)
    assert tokens.shape == (2, 17, 192)  # the class token is there wherever it stops
    alone = ours.forward_intermediates(x, indices, intermediates_only=True, **kwargs)
    torch.testing.assert_close(alone, actual[0], rtol=0, atol=0)


def test_intermediates_of_images_of_any_size():
    kept = small().forward_intermediates(images(2, 16, 40), intermediates_only=True)
    assert [t.shape for t in kept] == 3 * [(2, 24, 2, 5)]


@pytest.mark.parametrize("indices", [0, 4, -1, (3,), (0, -4), (0.0,)])
def test_intermediates_of_blocks_that_are_not_there(indices):
    message = f"indices must be some of 3 blocks', or how many of the last, got {indices}"
    with pytest.raises(ValueError, match=re.escape(message)):
        small().forward_intermediates(images(1, 32), indices)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NLC', got 'NHWC'"):
        small().forward_intermediates(images(1, 32), output_fmt="NHWC")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # plain PyTorch, and the operator
def test_exported_for_images_of_any_size(dtype):
    model = small(image_size=64).to(dtype)
    rows, columns = Dim("rows"), Dim("columns")
    shape = {0: Dim("batch"), 2: 8 * rows, 3: 8 * columns}
    exported = export(model, (images(2, 64).to(dtype),), dynamic_shapes=(shape,)).module()
    for batch, height, width in [(2, 64, 64), (1, 40, 72), (3, 96, 48), (2, 16, 24)]:
        x = images(batch, height, width).to(dtype)
        assert_rounded(exported(x), model(x), model)


def test_exported_for_images_of_its_size_nothing_is_resampled():
    graph = export(small(), (images(2, 32),)).graph
    assert not [node for node in graph.nodes if "bicubic" in str(node.target)]
