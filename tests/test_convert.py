"""fuse and unfuse, on timm's model, on a layer written like the original's, and on lookalikes."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from models import assert_rounded, gradients, randomized, timm_convit
from timm.models.convit import GPSA as TimmGPSA
from timm.models.convit import MHSA as TimmMHSA
from timm.models.vision_transformer import Attention as TimmAttention
from torch import nn

from gpsa_kernels import ConViT, FusedGPSA, SelfAttention, fuse, unfuse

SMALL = {"depth": 3, "local_up_to_layer": 2}


class OriginalGPSA(nn.Module):
    """The formula, with the constructor and the lazily made plain attribute ``rel_indices`` of the original code."""

    def __init__(
        self, dim, num_heads=8, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0, use_local_init=True
    ):
        super().__init__()
        self.num_heads, self.dim = num_heads, dim
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.pos_proj = nn.Linear(3, num_heads)
        self.proj_drop = nn.Dropout(proj_drop)
        self.gating_param = nn.Parameter(torch.ones(num_heads))
        if use_local_init:
            nn.init.eye_(self.v.weight)

    def offsets(self, tokens):
        side = round(tokens**0.5)
        index = torch.arange(tokens, device=self.gating_param.device)
        dx, dy = (index % side)[None] - (index % side)[:, None], (index // side)[None] - (index // side)[:, None]
        return torch.stack((dx, dy, dx**2 + dy**2), dim=-1).to(self.gating_param.dtype)[None]

    def table(self, tokens):
        if not hasattr(self, "rel_indices") or self.rel_indices.shape[1] != tokens:
            self.rel_indices = self.offsets(tokens)
        return self.rel_indices

    def attention(self, x):
        q, k = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in self.qk(x).chunk(2, dim=-1))
        content = (self.scale * q @ k.mT).softmax(-1)
        position = self.pos_proj(self.table(x.shape[1])).permute(0, 3, 1, 2).softmax(-1)
        g = self.gating_param.sigmoid().view(1, -1, 1, 1)
        return self.attn_drop((1 - g) * content + g * position)

    def forward(self, x):
        v = self.v(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        return self.proj_drop(self.proj((self.attention(x) @ v).transpose(1, 2).flatten(2)))


class ReturnsTuple(OriginalGPSA):
    """DyTox hands the attention map out with the result."""

    def forward(self, x):
        return super().forward(x), self.attention(x)


class OtherDirection(OriginalGPSA):
    def offsets(self, tokens):
        return super().offsets(tokens) * torch.tensor([-1, 1, 1])


class OtherGate(OriginalGPSA):
    def attention(self, x):
        return super().attention(x) * 1.001


class FixedSize(OriginalGPSA):
    def offsets(self, tokens):
        return super().offsets(16)


class NeedsMask(OriginalGPSA):
    def forward(self, x, mask):
        return super().forward(x)


class ExtraParameter(OriginalGPSA):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.temperature = nn.Parameter(torch.ones(1))


class ClassToken(OriginalGPSA):
    def forward(self, x):
        return torch.cat((x[:, :1], super().forward(x)), dim=1)


class OwnSettings(OriginalGPSA):
    """Names two of its attributes as FusedGPSA does."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.backend, self.grid_size = "theirs", 14


class OtherScale(TimmMHSA):
    def forward(self, x):
        return super().forward(1.001 * x)


def tokens(count: int = 9, dim: int = 24, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, count, dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def layer(kind=OriginalGPSA, **kwargs) -> nn.Module:
    return randomized(kind(24, num_heads=3, **kwargs)).eval()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to one rounding for every term of the sums over the 24 channels of a layer, forward and backward."""
    assert actual.dtype == expected.dtype
    tolerance = 2 * 24 * torch.finfo(expected.dtype).eps * expected.abs().max()
    assert (actual - expected).abs().max() <= tolerance


# ---- timm's model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "sizes"), [("tiny", {}), ("small", SMALL), ("base", SMALL), ("tiny", {"qkv_bias": True, **SMALL})]
)
def test_fused_timm_model_equals_itself(size, sizes):
    model = timm_convit(size, **sizes)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected_out, expected = model(x).detach(), gradients(model, x)
    state = model.state_dict()
    assert fuse(model) is model

    assert not any(isinstance(m, TimmGPSA | TimmMHSA) for m in model.modules())
    local = sizes.get("local_up_to_layer", 10)
    assert [type(b.attn) for b in model.blocks] == [FusedGPSA] * local + [SelfAttention] * (len(model.blocks) - local)
    assert list(model.state_dict()) == list(state)
    assert_rounded(model(x).detach(), expected_out, model)
    actual = gradients(model, x)
    assert list(actual) == list(expected)
    for name, gradient in actual.items():
        if name.endswith("pos_proj.bias"):
            assert torch.equal(gradient, torch.zeros_like(gradient)), name
        else:
            assert_rounded(gradient, expected[name], model, name)


def test_adam_takes_the_same_steps():
    """The optimizer is made before fuse, and goes on."""
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    start, results = timm_convit(image_size=32, **SMALL), []
    for fused in (False, True):
        model = copy.deepcopy(start)
        # Adam divides by |gradient| + eps: an eps of the gradients' size keeps it from blowing up their rounding
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, eps=1.0)
        for step in range(4):
            if fused and step == 1:
                fuse(model)
            gradients(model, x)
            optimizer.step()
        results.append(model)
    expected, actual = results
    for name, parameter in actual.named_parameters():
        assert_rounded(parameter, expected.get_parameter(name), actual, name)


def test_parameters_and_submodules_are_the_same_objects():
    model = timm_convit(image_size=32, **SMALL)
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    for switch in (fuse, unfuse):
        switch(model)
        assert all(p is parameters[name] for name, p in model.named_parameters())
        assert all(m is modules[name] for name, m in model.named_modules())


def test_self_attention_can_be_left():
    model = fuse(timm_convit(image_size=32, **SMALL), self_attention=False)
    assert [type(b.attn) for b in model.blocks] == [FusedGPSA, FusedGPSA, TimmMHSA]


def test_settings_reach_every_layer():
    model = fuse(timm_convit(image_size=32, **SMALL), backend="eager", grid_size=(1, 4))
    assert {(b.attn.backend, b.attn.grid_size) for b in model.blocks[:2]} == {("eager", (1, 4))}
    assert model.blocks[2].attn.backend == "eager"
    own = randomized(ConViT(embed_dim=192, num_heads=4, image_size=(16, 64), **SMALL)).eval()
    own.load_state_dict(model.state_dict())
    # timm's model takes the 2x2 patches of a square for the 1x4 that the layers are told of
    x = torch.randn(1, 3, 16, 64, dtype=torch.float64)
    square = torch.cat((torch.cat(x.chunk(4, dim=3)[:2], dim=3), torch.cat(x.chunk(4, dim=3)[2:], dim=3)), dim=2)
    assert_rounded(model.eval()(square), own(x), own)


def gradient_penalty(model, x):
    """The gradient of a penalty with respect to what comes after all attention."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), model.head.weight)[0]


def forward_mode(model, x):
    return torch.func.jvp(model, (x,), (x.cos(),))[1]


@pytest.mark.parametrize("self_attention", [True, False])
def test_other_derivatives_are_timms_or_refused(self_attention):
    model = timm_convit(image_size=32, **SMALL).eval()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    expected, tangent = gradient_penalty(model, x), forward_mode(model, x)
    fuse(model, self_attention=self_attention)
    torch.testing.assert_close(forward_mode(model, x), tangent)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient_penalty(model, x)
    for block in model.blocks:
        block.attn.backend = "eager"
    torch.testing.assert_close(gradient_penalty(model, x), expected)
    for block in model.blocks:
        block.attn.backend = "sdpa"
    with pytest.raises(RuntimeError, match="first derivatives only"):
        forward_mode(model, x)


# ---- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model,
        lambda model: model.half(),
        lambda model: model.to(torch.float64),
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: copy.deepcopy(model).half(),
    ],
    ids=["as is", "half", "float64", "deepcopy", "pickle", "deepcopy, half"],
)
@pytest.mark.parametrize("train", [False, True])
def test_unfuse_restores_the_layers(change, train):
    plain = timm_convit(image_size=48, **SMALL).float().train(train)
    x = torch.randn(2, 3, 48, 48)
    plain(x)  # has cached offsets for 9 tokens, in float32
    expected, model = change(copy.deepcopy(plain)), change(fuse(copy.deepcopy(plain)))
    assert isinstance(model.blocks[0].attn, FusedGPSA)
    model(x.to(model.norm.weight.dtype))
    unfuse(model)

    assert [type(m) for m in model.modules()] == [type(m) for m in expected.modules()]
    assert [m.training for m in model.modules()] == [m.training for m in expected.modules()]
    assert {name: vars(m).keys() for name, m in model.named_modules()} == {
        name: vars(m).keys() for name, m in expected.named_modules()
    }
    assert torch.equal(model(x.to(model.norm.weight.dtype)), expected(x.to(model.norm.weight.dtype)))
    assert {n: (t.dtype, t.shape) for n, t in model.named_buffers()} == {
        n: (t.dtype, t.shape) for n, t in expected.named_buffers()
    }


@pytest.mark.parametrize("kind", [OriginalGPSA, TimmGPSA])
def test_unfuse_takes_what_the_layer_holds_now(kind):
    model = fuse(layer(kind))
    model.v = nn.Linear(24, 24, bias=False, dtype=torch.float64)
    model.gating_param = nn.Parameter(torch.randn(3, dtype=torch.float64))
    expected = model(tokens())
    assert_close(unfuse(model)(tokens()), expected)
    assert type(model) is kind


def test_cached_offsets_follow_the_parameters():
    """The original keeps its table as a plain attribute, which ``.to()`` and ``.float()`` do not see."""
    model = layer()
    model(tokens())
    unfuse(fuse(model).float())
    assert model.rel_indices.dtype == torch.float32
    assert model(tokens().float()).dtype == torch.float32


def test_settings_win_over_attributes_of_their_names_which_unfuse_gives_back():
    model = layer(OwnSettings)
    before = dict(vars(model))
    fuse(model, backend="eager", grid_size=(2, 6))
    assert (model.backend, model.grid_size) == ("eager", (2, 6))
    assert vars(unfuse(model)) == before


def test_second_call_changes_nothing():
    model = fuse(timm_convit(image_size=32, **SMALL), backend="eager")
    before = [(m, dict(vars(m))) for m in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse(model)
    assert [(m, dict(vars(m))) for m in model.modules()] == before
    assert type(unfuse(unfuse(model)).blocks[0].attn) is TimmGPSA


def test_own_model_is_fused_already():
    model = ConViT(embed_dim=24, num_heads=3, image_size=32, **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert unfuse(fuse(model)) is model
    assert [type(b.attn) for b in model.blocks] == [FusedGPSA, FusedGPSA, SelfAttention]


# ---- layers from elsewhere ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"qkv_bias": True, "qk_scale": 0.3, "use_local_init": False}])
def test_layer_like_the_originals(kwargs):
    original = layer(**kwargs)
    x = tokens().requires_grad_()
    expected = original(x)
    (expected_grad,) = torch.autograd.grad(expected.sin().sum(), x)
    fused = fuse(original)
    assert isinstance(fused, FusedGPSA)
    assert fused.scale == original.scale
    actual = fused(x)
    (actual_grad,) = torch.autograd.grad(actual.sin().sum(), x)
    assert_close(actual, expected)
    assert_close(actual_grad, expected_grad)
    assert fused(tokens(16)).shape == (2, 16, 24)
    assert_close(unfuse(fused)(x), expected)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ReturnsTuple, "its forward returns a tuple, not a tensor"),
        (OtherDirection, "the fused layer's output differs by .*, rounding explains"),
        (OtherGate, "the fused layer's output differs by .*, rounding explains"),
        (FixedSize, "a trial raised RuntimeError: The size of tensor"),
        (NeedsMask, "a trial raised TypeError: .* missing 1 required positional argument: 'mask'"),
        (ExtraParameter, "the fused layer does not know its temperature"),
        (ClassToken, r"its output has shape \(1, 5, 24\) instead of \(1, 4, 24\)"),
    ],
)
def test_lookalikes_are_left_alone(kind, reason):
    model = nn.Sequential(nn.Identity(), nn.ModuleDict({"attn": layer(kind)}))
    with pytest.warns(UserWarning, match=rf"^1\.attn is left as it is: {reason}"):
        fuse(model)
    assert type(model[1]["attn"]) is kind


def test_self_attention_lookalikes():
    gpsa, changed = layer(), layer(OtherScale)
    normalized = randomized(TimmAttention(24, num_heads=3, qk_norm=True, norm_layer=nn.LayerNorm))
    model = nn.ModuleList([gpsa, changed, normalized, layer(TimmMHSA)])
    with pytest.warns(UserWarning, match="^1 is left as it is: the fused layer's output differs") as caught:
        fuse(model)
    assert len(caught) == 1
    assert [type(m) for m in model] == [FusedGPSA, OtherScale, TimmAttention, SelfAttention]


@pytest.mark.parametrize("model", [nn.Linear(2, 2), TimmMHSA(24, 3), TimmGPSA(24, 3).qk])
def test_nothing_to_fuse(model):
    kind = type(model)
    with pytest.warns(UserWarning, match=f"{kind.__name__} has no GPSA layer: nothing is fused"):
        fuse(model)
    assert type(model) is kind


def test_replaced_forward_is_left_alone():
    model = layer()
    model.forward = lambda x: x
    with pytest.warns(UserWarning, match="OriginalGPSA is left as it is: its forward method was replaced"):
        fuse(model)


@pytest.mark.parametrize("name", ["attn_drop", "pos_proj"])
def test_what_the_fused_layer_does_itself_must_be_plain(name):
    """A hook or an adapter on a submodule that is never called would be silently without effect."""
    message = f"the fused layer does the work of {name} itself"
    hooked = layer()
    getattr(hooked, name).register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=message):
        fuse(hooked)

    class Adapted(type(getattr(hooked, name))):
        def forward(self, input):
            return super().forward(input)

    adapted = layer()
    getattr(adapted, name).__class__ = Adapted
    with pytest.warns(UserWarning, match=message):
        fuse(adapted)


def test_hooks_and_adapters_keep_working():
    class LowRank(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
            self.down = nn.Linear(base.in_features, 2, bias=False, dtype=torch.float64)
            self.up = nn.Linear(2, base.out_features, bias=False, dtype=torch.float64)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    model, called = layer(), []
    model.qk, model.v, model.proj = (LowRank(m) for m in (model.qk, model.v, model.proj))
    for name in ("qk", "v", "proj", "proj_drop"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: called.append(name))
    model.register_forward_hook(lambda *_: called.append("layer"))
    expected = model(tokens())
    before = called.copy()
    called.clear()
    fuse(model)
    assert called == []  # the trial runs without them
    assert_close(model(tokens()), expected)
    assert sorted(called) == sorted(before)


def test_shared_layer_is_switched_once():
    shared = layer()
    model = nn.Sequential(shared, nn.Sequential(shared))
    expected = model(tokens())
    fuse(model)
    assert model[0] is model[1][0] is shared
    assert_close(model(tokens()), expected)
    assert type(unfuse(model)[1][0]) is OriginalGPSA


# ---- the trial ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [OriginalGPSA, TimmGPSA])
def test_trial_leaves_no_trace(kind):
    model = layer(kind, attn_drop=0.5, proj_drop=0.5).train()
    before, state = copy.deepcopy(model), torch.get_rng_state()
    unfuse(fuse(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert vars(model).keys() == vars(before).keys()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before.buffers(), strict=True))
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_dtype_is_fused(dtype):
    assert isinstance(fuse(layer().to(dtype)), FusedGPSA)


def test_meta_parameters():
    model = fuse(TimmGPSA(24, num_heads=3, device="meta"))
    assert isinstance(model, FusedGPSA)
    assert all(p.is_meta for p in model.parameters())
    expected = layer(TimmGPSA)
    unfuse(model).load_state_dict(expected.state_dict(), assign=True)
    model.to_empty(device="cpu").load_state_dict(expected.state_dict())
    assert_close(model.double()(tokens()), expected(tokens()))


@pytest.mark.parametrize("fill", [0.0, float("nan"), 1e4])
def test_values_of_the_parameters_do_not_matter(fill):
    """Neither hide a difference nor make one up."""
    for kind, fused in ((OriginalGPSA, FusedGPSA), (OtherDirection, OtherDirection)):
        model = layer(kind)
        for parameter in model.parameters():
            nn.init.constant_(parameter, fill)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert type(fuse(model)) is fused


@pytest.mark.parametrize(("dim", "heads"), [(4, 1), (4, 4), (48, 1), (48, 48), (192, 4), (768, 16)])
@pytest.mark.parametrize("kind", [TimmGPSA, TimmMHSA])
def test_trial_accepts_layers_of_every_size(kind, dim, heads):
    model = fuse(nn.Sequential(TimmGPSA(dim, heads), kind(dim, heads)))
    assert not isinstance(model[1], kind)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"backend": "fastest"}, "backend must be 'auto' or one of .*, got 'fastest'"),
        (
            {"grid_size": (2, 0)},
            r"grid_size must be a pair \(rows, columns\) of positive integers or None, got \(2, 0\)",
        ),
        ({"grid_size": (2, 2, 1)}, "grid_size must be a pair"),
    ],
)
def test_bad_arguments(kwargs, message):
    model = layer()
    with pytest.raises(ValueError, match=message):
        fuse(model, **kwargs)
    assert type(model) is OriginalGPSA
