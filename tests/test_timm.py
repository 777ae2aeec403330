"""The fused models in timm's registry, against timm's own; what timm's tests ask of every model."""

from __future__ import annotations

import pytest
import timm
import torch
from models import assert_rounded, assert_trains_like, gradients, randomized
from timm.layers import resample_abs_pos_embed
from timm.models import FeatureGraphNet, get_pretrained_cfg, load_checkpoint
from torch import Tensor, nn

import gpsa_kernels.timm
from gpsa_kernels import FusedGPSA, SelfAttention, convit_tiny, unfuse

SIZES = ("tiny", "small", "base")
SMALL = {"img_size": 32, "depth": 3, "local_up_to_layer": 2}


def create(name: str = "convit_tiny", **kwargs) -> nn.Module:
    """One of timm's models or of ours; of both with the same seed, as its users would make it."""
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **kwargs}).eval()


def images(batch: int = 2, channels: int = 3, height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(batch, channels, height, width)


def test_names_and_settings():
    names = [f"fused_convit_{size}{plus}" for size in SIZES for plus in ("", "_plus")]
    assert sorted(timm.list_models("fused_*")) == sorted(names)
    assert sorted(timm.list_pretrained("fused_*")) == sorted(f"fused_convit_{size}.fb_in1k" for size in SIZES)
    assert {name for name in dir(gpsa_kernels.timm) if name.startswith("fused_")} == set(names)
    for size in SIZES:
        stock = get_pretrained_cfg(f"convit_{size}.fb_in1k").to_dict()
        assert stock["hf_hub_id"] == f"timm/convit_{size}.fb_in1k"
        expected = stock | {"architecture": f"fused_convit_{size}"}
        assert get_pretrained_cfg(f"fused_convit_{size}").to_dict() == expected
        assert timm.create_model(f"fused_convit_{size}.fb_in1k", device="meta").default_cfg == expected
        unpublished = {key: expected[key] for key in expected.keys() - {"hf_hub_id", "tag"}}
        plus = f"fused_convit_{size}_plus"
        assert get_pretrained_cfg(plus).to_dict() == unpublished | {"architecture": plus}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("plus", ["", "_plus"])
def test_sizes_are_those_of_our_own_models(size, plus):
    theirs = timm.create_model(f"fused_convit_{size}{plus}", device="meta")
    ours = getattr(gpsa_kernels, f"convit_{size}{plus}")(device="meta")
    shapes = [{name: t.shape for name, t in model.state_dict().items()} for model in (theirs, ours)]
    assert shapes[0] == shapes[1]
    assert [type(block.attn) for block in theirs.blocks] == [type(block.attn) for block in ours.blocks]
    assert [block.attn.num_heads for block in theirs.blocks] == [block.attn.num_heads for block in ours.blocks]


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"global_pool": "avg", "in_chans": 1, "num_classes": 7, "qkv_bias": True},
        {"use_pos_embed": False, "drop_path_rate": 0.5, "locality_strength": 2.0},
    ],
)
@pytest.mark.parametrize("size", SIZES)
def test_every_output_and_gradient_is_timms(size, kwargs):
    stock, fused = (create(f"{prefix}convit_{size}", **kwargs) for prefix in ("", "fused_"))
    for (name, expected), actual in zip(stock.state_dict().items(), fused.state_dict().values(), strict=True):
        assert torch.equal(actual, expected), name
    stock, fused, x = randomized(stock), randomized(fused), images(channels=kwargs.get("in_chans", 3)).double()
    assert_trains_like(fused, x, stock(x), gradients(stock, x))


def test_the_head_is_taken_off():
    model, x = create("fused_convit_tiny"), images()
    assert {f"{model.default_cfg[key]}.weight" for key in ("classifier", "first_conv")} <= model.state_dict().keys()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    assert create("fused_convit_tiny", num_classes=0)(x).shape == pooled.shape


@pytest.mark.parametrize("kwargs", [{"indices": [0, -1]}, {"indices": 2, "norm": True, "output_fmt": "NLC"}])
def test_intermediates_are_timms(kwargs):
    stock, fused, x = create(), create("fused_convit_tiny"), images()
    (expected, expected_kept), (actual, kept) = (m.forward_intermediates(x, **kwargs) for m in (stock, fused))
    for ours, theirs in zip([actual, *kept], [expected, *expected_kept], strict=True):
        assert_rounded(ours, theirs, stock)


@pytest.mark.parametrize("kwargs", [{}, {"out_indices": (0, 1)}, {"feature_cls": "fx", "out_indices": (0, 1)}])
def test_features_are_timms(kwargs):
    stock, fused = (
        create(n, features_only=True, **{"out_indices": 3, **kwargs}) for n in ("convit_tiny", "fused_convit_tiny")
    )
    assert isinstance(fused, FeatureGraphNet) == ("feature_cls" in kwargs)
    assert fused.feature_info.channels() == stock.feature_info.channels()
    for actual, expected in zip(fused(x := images()), stock(x), strict=True):
        assert_rounded(actual, expected, create())


@pytest.fixture
def checkpoint(tmp_path):
    """timm's model, and a checkpoint of it as timm's train.py writes one."""
    stock = randomized(create()).float()
    torch.save({"state_dict": stock.state_dict()}, tmp_path / "checkpoint.pth.tar")
    return stock, str(tmp_path / "checkpoint.pth.tar")


@pytest.mark.parametrize("kwargs", [{}, {"num_classes": 5, "in_chans": 1}, {"features_only": True}])
def test_pretrained_weights_are_loaded_as_timm_loads_them(checkpoint, kwargs):
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": checkpoint[1]}}
    stock, fused = (create(name, **overlay, **kwargs) for name in ("convit_tiny", "fused_convit_tiny"))
    for (name, expected), actual in zip(stock.state_dict().items(), fused.state_dict().values(), strict=True):
        assert torch.equal(actual, expected), name
    modules = [type(module) for module in fused.modules()]
    assert (modules.count(FusedGPSA), modules.count(SelfAttention)) == (2, 1)


@pytest.mark.parametrize("how", ["pretrained", "checkpoint_path", "load_checkpoint"])
def test_a_checkpoint_of_another_image_size_is_resampled(checkpoint, how):
    stock, path = checkpoint
    given = {
        "pretrained": {"pretrained": True, "pretrained_cfg_overlay": {"file": path}},
        "checkpoint_path": {"checkpoint_path": path},
    }
    fused = create("fused_convit_tiny", img_size=(48, 80), **given.get(how, {}))
    if how == "load_checkpoint":
        load_checkpoint(fused, path)
    expected = resample_abs_pos_embed(stock.pos_embed, [3, 5], num_prefix_tokens=0)
    torch.testing.assert_close(fused.pos_embed, expected)
    assert torch.equal(fused.blocks[0].attn.qk.weight, stock.blocks[0].attn.qk.weight)


def test_images_that_are_no_squares():
    model, x = randomized(create("fused_convit_tiny", img_size=(32, 48))), images(width=48).double()
    ours = convit_tiny(**{**SMALL, "img_size": (32, 48)}).double().eval()
    ours.load_state_dict(model.state_dict())
    assert_rounded(model(x), ours(x), ours)


def test_the_backend_is_chosen_by_name():
    model = create("fused_convit_tiny", backend="eager")
    assert [block.attn.backend for block in model.blocks] == ["eager"] * 3
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        create("fused_convit_tiny", backend="fast")


def test_weights_that_nobody_has_published():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for fused_convit_tiny_plus"):
        create("fused_convit_tiny_plus", pretrained=True)


def test_torchscript_is_refused_with_what_to_do_instead():
    model = create("fused_convit_tiny", scriptable=True)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile FusedGPSA: script unfuse\(model\)"):
        torch.jit.script(model)
    assert torch.equal(torch.jit.script(unfuse(model))(x := images()), model(x))
