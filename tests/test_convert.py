"""fuse and unfuse, on timm's model, on a layer like the original's, on lookalikes and on what was changed."""

import contextlib
import copy
import pickle
from functools import partial

import pytest
import timm
import torch
from models import SHALLOW, assert_same_outcome, images, outcome, randomized, timm_convit
from timm.models import create_feature_extractor
from timm.models.convit import GPSA as TimmGPSA
from timm.models.convit import MHSA as TimmMHSA
from timm.models.vision_transformer import Attention as TimmAttention
from torch import fx, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize, prune

from gpsa_kernels import ConViT, FusedGPSA, SelfAttention, fuse, unfuse

squashed = partial(parametrize.register_parametrization, tensor_name="gating_param", parametrization=nn.Tanh())


class OriginalGPSA(TimmGPSA):
    """timm's, with the plain attribute ``rel_indices`` that the original code makes in the first call."""

    def __init__(self, dim, num_heads, qkv_bias=False, qk_scale=None, **rates):
        super().__init__(dim, num_heads, qkv_bias, **rates)
        self.scale = qk_scale or self.scale
        del self.rel_indices

    def forward(self, x):
        if not hasattr(self, "rel_indices"):
            self.rel_indices = self.get_rel_indices(x.shape[1])
        return super().forward(x)


def changed(**methods):
    """What gives a layer a class of its own, with other methods."""

    def change(layer: nn.Module) -> nn.Module:
        layer.__class__ = type("Lookalike", (type(layer),), methods)
        return layer

    return change


OTHER_DIRECTION = changed(get_rel_indices=lambda self, n: TimmGPSA.get_rel_indices(self, n) * torch.tensor([-1, 1, 1]))


def tokens(count: int = 9) -> torch.Tensor:
    return torch.randn(2, count, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def layer(kind=OriginalGPSA, **kwargs) -> nn.Module:
    return randomized(kind(24, num_heads=3, **kwargs)).eval()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to one rounding for every term of the sums over the 24 channels of a layer, forward and backward."""
    assert actual.dtype == expected.dtype
    tolerance = 2 * 24 * torch.finfo(expected.dtype).eps * expected.abs().max()
    assert (actual - expected).abs().max() <= tolerance


def test_a_fused_timm_model_computes_the_same_and_holds_the_same():
    model, x = timm_convit(qkv_bias=True), images(2, 64)
    expected, state = outcome(model, x), list(model.state_dict())
    held = [*model.named_parameters(), *model.named_modules()]
    assert fuse(model) is model
    assert [type(block.attn) for block in model.blocks] == [FusedGPSA] * 10 + [SelfAttention] * 2
    assert list(model.state_dict()) == state
    assert_same_outcome(outcome(model, x), expected, model)
    for switched in (model, unfuse(model)):
        now = [*switched.named_parameters(), *switched.named_modules()]
        assert [(name, id(kept)) for name, kept in now] == [(name, id(kept)) for name, kept in held]


def test_settings_reach_every_layer():
    model = fuse(timm_convit(image_size=32, **SHALLOW), backend="eager", grid_size=(1, 4))
    assert {(b.attn.backend, b.attn.grid_size) for b in model.blocks[:2]} == {("eager", (1, 4))}
    assert model.blocks[2].attn.backend == "eager"
    model = fuse(timm_convit(image_size=32, **SHALLOW), self_attention=False)
    assert [type(b.attn) for b in model.blocks] == [FusedGPSA, FusedGPSA, TimmMHSA]


def traits(model: nn.Module) -> list[tuple]:
    return [(type(m), m.training, vars(m).keys()) for m in model.modules()]


CHANGES = {
    "as is": lambda model: model,
    "half": lambda model: model.half(),
    "float64": lambda model: model.double(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "deepcopy, half": lambda model: copy.deepcopy(model).half(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("train", [False, True])
def test_unfuse_restores_the_layers(change, train):
    plain = timm_convit(image_size=48, **SHALLOW).float().train(train)
    x = images(2, 48).float()
    plain(x)  # has cached offsets for 9 tokens, in float32
    expected, model = change(copy.deepcopy(plain)), change(fuse(copy.deepcopy(plain)))
    assert isinstance(model.blocks[0].attn, FusedGPSA)
    x = x.to(model.norm.weight.dtype)
    model(x)
    assert traits(unfuse(model)) == traits(expected)
    assert torch.equal(model(x), expected(x))
    buffers = [{name: (t.dtype, t.shape) for name, t in m.named_buffers()} for m in (model, expected)]
    assert buffers[0] == buffers[1]


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
    model = layer()
    model.backend, model.grid_size = "theirs", 14
    before = dict(vars(model))
    fuse(model, backend="eager", grid_size=(2, 6))
    assert (model.backend, model.grid_size) == ("eager", (2, 6))
    assert vars(unfuse(model)) == before


@pytest.mark.filterwarnings("error")
def test_a_second_call_changes_nothing():
    timms = fuse(timm_convit(image_size=32, **SHALLOW), backend="eager"), [TimmGPSA, TimmGPSA, TimmMHSA]
    own = ConViT(embed_dim=24, num_heads=3, image_size=32, **SHALLOW), [FusedGPSA, FusedGPSA, SelfAttention]
    for model, unfused in (timms, own):
        before = [(m, dict(vars(m))) for m in model.modules()]
        assert [(m, dict(vars(m))) for m in fuse(model).modules()] == before
        assert [type(b.attn) for b in unfuse(unfuse(model)).blocks] == unfused


@pytest.mark.parametrize("kwargs", [{}, {"qkv_bias": True, "qk_scale": 0.3}])
def test_layer_like_the_originals(kwargs):
    original = layer(**kwargs)
    x = tokens().requires_grad_()
    expected = original(x)
    (expected_grad,) = torch.autograd.grad(expected.sin().sum(), x)
    assert isinstance(fuse(original), FusedGPSA)
    actual = original(x)
    assert_close(actual, expected)
    assert_close(torch.autograd.grad(actual.sin().sum(), x)[0], expected_grad)
    assert original(tokens(16)).shape == (2, 16, 24)
    assert_close(unfuse(original)(x), expected)


RAISED = "a trial raised"
DIFFERS = "the fused layer's output differs by .*, rounding explains"
BYPASSED = "the fused layer does the work of"
REPLACED = "its forward method was replaced on the instance"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (OTHER_DIRECTION, DIFFERS),
        (changed(get_attention=lambda self, x: 1.001 * TimmGPSA.get_attention(self, x)), DIFFERS),
        (changed(get_rel_indices=lambda self, _: TimmGPSA.get_rel_indices(self, 16)), f"{RAISED} RuntimeError: The"),
        (changed(forward=lambda self, x, mask: x), f"{RAISED} TypeError: .* missing 1 .* argument: 'mask'"),
        (changed(forward=lambda self, x: x[:, :2]), r"its output has shape \(1, 2, 24\) instead of \(1, 4, 24\)"),
        (lambda layer: setattr(layer, "gain", nn.Parameter(torch.ones(1))), "the fused layer does not know its gain"),
        (squashed, "the fused layer does not know its parametrizations"),
        (lambda layer: setattr(layer, "forward", layer.get_attention), REPLACED),
        # a hook or an adapter on a submodule that is never called would be silently without effect
        (lambda layer: layer.attn_drop.register_forward_hook(print), f"{BYPASSED} attn_drop itself"),
        (lambda layer: layer.pos_proj.register_forward_hook(print), f"{BYPASSED} pos_proj itself"),
        (lambda layer: changed(forward=None)(layer.attn_drop), f"{BYPASSED} attn_drop itself"),
        (lambda layer: changed(forward=None)(layer.pos_proj), f"{BYPASSED} pos_proj itself"),
    ],
)
def test_lookalikes_are_left_alone(change, reason):
    other = layer()
    change(other)
    kind = type(other)
    for model, name in ((other, kind.__name__), (nn.ModuleDict({"blocks": nn.ModuleList([other])}), r"blocks\.0")):
        with pytest.warns(UserWarning, match=f"^{name} is left as it is: {reason}"):
            fuse(model)
    assert type(other) is kind


def test_self_attention_lookalikes():
    gpsa, scaled = layer(), changed(forward=lambda self, x: TimmMHSA.forward(self, 1.001 * x))(layer(TimmMHSA))
    normalized = randomized(TimmAttention(24, num_heads=3, qk_norm=True, norm_layer=nn.LayerNorm))
    model = nn.ModuleList([gpsa, scaled, normalized, layer(TimmMHSA)])
    with pytest.warns(UserWarning, match="^1 is left as it is: the fused layer's output differs") as caught:
        fuse(model)
    assert len(caught) == 1
    assert [type(m) for m in model] == [FusedGPSA, type(scaled), TimmAttention, SelfAttention]


@pytest.mark.parametrize("model", [nn.Linear(2, 2), TimmMHSA(24, 3), TimmGPSA(24, 3).qk])
def test_nothing_to_fuse(model):
    kind = type(model)
    with pytest.warns(UserWarning, match=f"{kind.__name__} has no GPSA layer: nothing is fused"):
        fuse(model)
    assert type(model) is kind


def test_hooks_and_adapters_keep_working():
    class LowRank(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
            self.added = nn.Sequential(nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)).double()

        @property
        def weight(self):  # which timm's layer looks at
            return self.base.weight

        def forward(self, x):
            return self.base(x) + self.added(x)

    model, called = layer(), []
    model.qk, model.v, model.proj = (LowRank(m) for m in (model.qk, model.v, model.proj))
    for name in ("qk", "v", "proj", "proj_drop"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: called.append(name))
    model.register_forward_hook(lambda *_: called.append("layer"))
    expected, before = model(tokens()), called.copy()
    fuse(model)
    assert called == before  # the trial runs without them
    assert_close(model(tokens()), expected)
    assert sorted(called) == sorted(2 * before)


@pytest.mark.parametrize("kind", [OriginalGPSA, TimmGPSA])
def test_trial_leaves_no_trace(kind):
    model = layer(kind, attn_drop=0.5, proj_drop=0.5).train()
    before, state = copy.deepcopy(model), torch.get_rng_state()
    unfuse(fuse(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert traits(model) == traits(before)
    held, held_before = ([*m.parameters(), *m.buffers()] for m in (model, before))
    torch.testing.assert_close(held, held_before, rtol=0, atol=0)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_meta_parameters():
    model = fuse(TimmGPSA(24, num_heads=3, device="meta"))
    assert isinstance(model, FusedGPSA)
    assert all(p.is_meta for p in model.parameters())
    expected = layer(TimmGPSA)
    unfuse(model).load_state_dict(expected.state_dict(), assign=True)
    model.to_empty(device="cpu").load_state_dict(expected.state_dict())
    assert_close(model.double()(tokens()), expected(tokens()))


@pytest.mark.filterwarnings("ignore:.* is left as it is")
@pytest.mark.parametrize("fill", [0.0, float("nan"), 1e4])
@pytest.mark.parametrize("same", [True, False])
def test_values_of_the_parameters_do_not_matter(fill, same):
    """Neither hide a difference nor make one up."""
    model = layer() if same else OTHER_DIRECTION(layer())
    for parameter in model.parameters():
        nn.init.constant_(parameter, fill)
    assert isinstance(fuse(model), FusedGPSA) == same


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("dim", "heads"), [(4, 1), (4, 4), (48, 1), (48, 48), (192, 4), (768, 16)])
@pytest.mark.parametrize("kind", [TimmGPSA, TimmMHSA])
def test_trial_accepts_layers_of_every_size_and_dtype(kind, dim, heads, dtype):
    model = fuse(nn.Sequential(TimmGPSA(dim, heads), kind(dim, heads)).to(dtype))
    assert not isinstance(model[1], kind)


# ---- layers that something else has changed, before or after, or that return more than one value ---------------------


@pytest.fixture
def _one_rank():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (squashed, "ParametrizedFusedGPSA"),
        (lambda m: fully_shard(m, mesh=torch.distributed.init_device_mesh("cpu", (1,))), "FSDPFusedGPSA"),
    ],
)
def test_unfuse_leaves_a_layer_whose_class_was_changed(change, name):
    model = nn.Sequential(fuse(layer()), fuse(layer(TimmGPSA)))
    change(model[0])
    expected = model(tokens())
    with pytest.warns(UserWarning, match=f"^0 stays fused: since fuse its class has changed from FusedGPSA to {name}"):
        unfuse(model)
    assert [type(m).__name__ for m in model] == [name, "GPSA"]
    torch.testing.assert_close(model(tokens()), expected)


def test_pruned_parameters_are_fused():
    model = layer(TimmGPSA, qkv_bias=True).half()  # the trial's copy has another dtype
    prune.custom_from_mask(model, "gating_param", torch.tensor([1, 0, 1]))
    for name in ("qk", "proj"):
        prune.l1_unstructured(getattr(model, name), "weight", 0.5)
    fuse(model).double()
    assert type(model) is FusedGPSA
    with torch.no_grad():
        model.gating_param_orig += 1
    out = model(tokens())
    out.sum().backward()
    assert (model.gating_param_orig.grad == 0).tolist() == [False, True, False]
    torch.testing.assert_close(unfuse(model)(tokens()), out)


CHANGES_AFTER_FUSE = {
    "forward hook": lambda m: m.attn_drop.register_forward_hook(lambda _, x, out: out.square()),
    "backward hook": lambda m: m.attn_drop.register_full_backward_hook(lambda _, grads, __: (2 * grads[0],)),
    "backward pre-hook": lambda m: m.attn_drop.register_full_backward_pre_hook(lambda _, grads: (2 * grads[0],)),
    "another module": lambda m: setattr(m, "attn_drop", nn.Hardtanh(0.1, 0.5)),
    "forward pre-hook": lambda m: m.pos_proj.register_forward_pre_hook(lambda _, x: (2 * x[0],)),
    "prune": lambda m: prune.l1_unstructured(m.pos_proj, "weight", 0.5),
    "another class": lambda m: changed(forward=lambda self, x: 2 * nn.Linear.forward(self, x))(m.pos_proj),
    "another forward": lambda m: setattr(m.pos_proj, "forward", lambda x: x.cos()),
    "not linear": lambda m: setattr(m, "pos_proj", nn.Sequential(m.pos_proj, nn.Tanh())),
}


def results(model: nn.Module) -> dict[str, torch.Tensor]:
    with torch.no_grad():  # an optimizer's step
        for parameter in model.parameters():
            parameter *= 1.1
    x = tokens().requires_grad_()
    return {**outcome(model, x), "x": x.grad}


@pytest.mark.parametrize("change", CHANGES_AFTER_FUSE.values(), ids=CHANGES_AFTER_FUSE)
def test_changes_after_fuse_are_honoured(change):
    """In output and gradients, as in the unfused layers; by a backend asked for by name they are refused."""
    original = randomized(nn.Sequential(TimmGPSA(24, 3), TimmMHSA(24, 3)))
    fused = fuse(copy.deepcopy(original))
    unchanged = results(copy.deepcopy(fused))
    changed = []
    for attention in (*original, *fused):
        with contextlib.suppress(AttributeError):  # MHSA has no pos_proj
            change(attention)
            changed.append(attention)
    expected, actual = results(original), results(fused)
    assert any((expected[name] - unchanged[name]).abs().max() > 1e-3 for name in ("out", "x"))
    torch.testing.assert_close(actual, expected)
    for attention in changed[len(changed) // 2 :]:
        attention.backend = "sdpa"
        with pytest.raises(RuntimeError, match=r"backend 'sdpa' does the work of (attn_drop|pos_proj) itself"):
            attention(tokens())


def test_quantized_linears_are_called():
    """int8 costs a fused model no more than twice what it costs timm's, one draw of rounding as much as the other."""
    model, x = timm_convit(image_size=32, **SHALLOW).float().eval(), images().float()
    expected = model(x)
    quantize = torch.ao.quantization.quantize_dynamic
    quantized, fused = quantize(copy.deepcopy(model), {nn.Linear}), quantize(fuse(copy.deepcopy(model)), {nn.Linear})
    error, allowed = ((q(x) - expected).abs().max() for q in (fused, quantized))
    assert 0 < error <= 2 * allowed


class DyToxGPSA(TimmGPSA):
    """Hands out the attention map and v, too, which DyTox's blocks pass on and its model drops."""

    def forward(self, x):
        return super().forward(x), self.get_attention(x), self.v(x)


class DyTox(nn.ModuleList):
    def __init__(self):
        super().__init__([DyToxGPSA(24, 3, attn_drop=0.1), DyToxGPSA(24, 3)])

    def forward(self, x):
        for attention in self:
            out, _, _ = attention(x)
            x = x + out
        return x


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_layers_that_return_more_than_one_value(copied):
    model = randomized(DyTox()).eval()
    expected = results(copy.deepcopy(model))
    with pytest.warns(UserWarning, match=r"returns a tuple, not a tensor \(outputs=3 takes the first"):
        fuse(model)
    with pytest.warns(UserWarning, match="returns a tuple, not 2 values"):
        fuse(model, outputs=2)
    with pytest.warns(UserWarning, match="its forward returns a Tensor, not 3 values"):
        assert type(fuse(TimmGPSA(24, 3), outputs=3)) is TimmGPSA
    assert type(model[0]) is DyToxGPSA
    fused = copied(fuse(model, outputs=3))
    assert isinstance(fused[0], FusedGPSA)
    assert fused[0](tokens())[1:] == (None, None)
    actual = results(fused)
    for index in (0, 1):  # the bias cancels in the softmax: timm's gradient is rounding
        expected[f"{index}.pos_proj.bias"] = actual[f"{index}.pos_proj.bias"]
    torch.testing.assert_close(actual, expected)
    names = [{name: vars(m).keys() for name, m in model.named_modules()} for model in (unfuse(fused), DyTox())]
    assert names[0] == names[1]
    assert type(fused[0]) is DyToxGPSA


# ---- torch.fx, for which a fused layer is a leaf --------------------------------------------------------------------


class Residual(nn.ModuleList):
    def forward(self, x, grid_size):
        return x + self[1](self[0](x, grid_size))


def test_symbolic_trace():
    grids, nothing = [((1, 9),), ((3, 3),)], [()]
    own = Residual([FusedGPSA(24, 3), SelfAttention(24, 3)])
    for model, calls in ((own, grids), (fuse(DyTox(), outputs=3), nothing)):
        traced = fx.symbolic_trace(model.double().eval())
        assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1"]
        for arguments in calls:
            assert torch.equal(traced(tokens(), *arguments), model(tokens(), *arguments))


@pytest.mark.parametrize("train", [False, True])
def test_the_whole_of_a_fused_model_is_traced_and_differentiated(train):
    model = fuse(timm_convit(image_size=32, **SHALLOW)).train(train)
    node = timm.models.get_graph_node_names(model)[not train][-1]
    extractor = create_feature_extractor(model, [node]).train(train)
    outcomes = [outcome(model, images(2), forward) for forward in (model, lambda x: extractor(x)[node])]
    torch.testing.assert_close(*outcomes, rtol=0, atol=0)
