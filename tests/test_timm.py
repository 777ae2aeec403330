"""The fused models in timm's registry, against timm's own; what timm's tests ask of every model."""

import pytest
import timm
import torch
from models import SHALLOW, assert_rounded, assert_same_outcome, images, outcome, randomized
from timm.layers import resample_abs_pos_embed
from timm.models import FeatureGraphNet, get_pretrained_cfg, load_checkpoint
from torch import nn

import gpsa_kernels.timm
from gpsa_kernels import FusedGPSA, SelfAttention, convit_tiny

SIZES = ("tiny", "small", "base")
SMALL = {"img_size": 32, **SHALLOW}


def create(name: str = "convit_tiny", **kwargs) -> nn.Module:
    """One of timm's models or of ours; of both with the same seed, as its users would make it."""
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **kwargs}).eval()


def test_names_and_settings():
    names = [f"fused_convit_{size}{plus}" for size in SIZES for plus in ("", "_plus")]
    assert sorted(timm.list_models("fused_*")) == sorted(names)
    assert sorted(timm.list_pretrained("fused_*")) == sorted(f"fused_convit_{size}.fb_in1k" for size in SIZES)
    assert {name for name in dir(gpsa_kernels.timm) if name.startswith("fused_")} == set(names)
    for size in SIZES:
        name, stock = f"fused_convit_{size}", get_pretrained_cfg(f"convit_{size}.fb_in1k").to_dict()
        assert stock["hf_hub_id"] == f"timm/convit_{size}.fb_in1k"
        published = timm.create_model(f"{name}.fb_in1k", device="meta").default_cfg
        assert get_pretrained_cfg(name).to_dict() == published == stock | {"architecture": name}
        del stock["hf_hub_id"], stock["tag"]
        assert get_pretrained_cfg(f"{name}_plus").to_dict() == stock | {"architecture": f"{name}_plus"}


@pytest.mark.parametrize("size", [f"{size}{plus}" for size in SIZES for plus in ("", "_plus")])
def test_sizes_are_those_of_our_own_models(size):
    theirs = timm.create_model(f"fused_convit_{size}", device="meta")
    ours = getattr(gpsa_kernels, f"convit_{size}")(device="meta")
    assert {n: t.shape for n, t in theirs.state_dict().items()} == {n: t.shape for n, t in ours.state_dict().items()}
    kinds, expected = ([(type(b.attn), b.attn.num_heads) for b in model.blocks] for model in (theirs, ours))
    assert kinds == expected


@pytest.mark.parametrize(
    ("size", "kwargs"),
    [
        *((size, {}) for size in SIZES),
        ("tiny", {"global_pool": "avg", "in_chans": 1, "num_classes": 7, "qkv_bias": True}),
        ("tiny", {"use_pos_embed": False, "drop_path_rate": 0.5, "locality_strength": 2.0}),
    ],
)
def test_every_output_and_gradient_is_timms(size, kwargs):
    stock, fused = (create(f"{prefix}convit_{size}", **kwargs) for prefix in ("", "fused_"))
    torch.testing.assert_close(fused.state_dict(), stock.state_dict(), rtol=0, atol=0)
    stock, fused, x = randomized(stock), randomized(fused), images(channels=kwargs.get("in_chans", 3))
    assert_same_outcome(outcome(fused, x), outcome(stock, x), fused)


def test_the_head_is_taken_off():
    model, x = create("fused_convit_tiny"), images().float()
    assert {f"{model.default_cfg[key]}.weight" for key in ("classifier", "first_conv")} <= model.state_dict().keys()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    assert create("fused_convit_tiny", num_classes=0)(x).shape == pooled.shape


@pytest.mark.parametrize("kwargs", [{}, {"out_indices": (0, 1)}, {"feature_cls": "fx", "out_indices": (0, 1)}])
def test_features_are_timms(kwargs):
    stock, fused = (
        create(n, features_only=True, **{"out_indices": 3, **kwargs}) for n in ("convit_tiny", "fused_convit_tiny")
    )
    assert isinstance(fused, FeatureGraphNet) == ("feature_cls" in kwargs)
    assert fused.feature_info.channels() == stock.feature_info.channels()
    for actual, expected in zip(fused(x := images().float()), stock(x), strict=True):
        assert_rounded(actual, expected, create())


@pytest.fixture
def checkpoint(tmp_path):
    """timm's model, a checkpoint of it as timm's train.py writes one, and what takes it for the pretrained weights."""
    stock, path = randomized(create()).float(), str(tmp_path / "checkpoint.pth.tar")
    torch.save({"state_dict": stock.state_dict()}, path)
    return stock, path, {"pretrained": True, "pretrained_cfg_overlay": {"file": path}}


@pytest.mark.parametrize("kwargs", [{}, {"num_classes": 5, "in_chans": 1}, {"features_only": True}])
def test_pretrained_weights_are_loaded_as_timm_loads_them(checkpoint, kwargs):
    stock, fused = (create(name, **checkpoint[2], **kwargs) for name in ("convit_tiny", "fused_convit_tiny"))
    torch.testing.assert_close(fused.state_dict(), stock.state_dict(), rtol=0, atol=0)
    modules = [type(module) for module in fused.modules()]
    assert (modules.count(FusedGPSA), modules.count(SelfAttention)) == (2, 1)


@pytest.mark.parametrize("how", ["pretrained", "checkpoint_path", "load_checkpoint"])
def test_a_checkpoint_of_another_image_size_is_resampled(checkpoint, how):
    stock, path, pretrained = checkpoint
    given = {"pretrained": pretrained, "checkpoint_path": {"checkpoint_path": path}, "load_checkpoint": {}}
    fused = create("fused_convit_tiny", img_size=(48, 80), **given[how])
    if how == "load_checkpoint":
        load_checkpoint(fused, path)
    torch.testing.assert_close(fused.pos_embed, resample_abs_pos_embed(stock.pos_embed, [3, 5], num_prefix_tokens=0))
    assert torch.equal(fused.blocks[0].attn.qk.weight, stock.blocks[0].attn.qk.weight)


def test_images_that_are_no_squares():
    model, x = randomized(create("fused_convit_tiny", img_size=(32, 48))), images(width=48)
    ours = convit_tiny(**{**SMALL, "img_size": (32, 48)}).double().eval()
    ours.load_state_dict(model.state_dict())
    assert_rounded(model(x), ours(x), ours)


def test_the_backend_is_chosen_by_name():
    model = create("fused_convit_tiny", backend="eager")
    assert [block.attn.backend for block in model.blocks] == ["eager"] * 3
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        create("fused_convit_tiny", backend="fast")
