"""fuse and unfuse on layers that something else has changed before or after, or that return more than one value."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from models import randomized, timm_convit
from timm.models.convit import GPSA as TimmGPSA
from timm.models.convit import MHSA as TimmMHSA
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize, prune

from gpsa_kernels import FusedGPSA, fuse, unfuse


def layer(**kwargs) -> nn.Module:
    return randomized(TimmGPSA(24, 3, **kwargs))


def tokens() -> torch.Tensor:
    return torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Halved(nn.Module):
    def forward(self, parameter):
        return 0.5 * parameter


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
        (lambda m: parametrize.register_parametrization(m, "gating_param", Halved()), "ParametrizedFusedGPSA"),
        (lambda m: fully_shard(m, mesh=torch.distributed.init_device_mesh("cpu", (1,))), "FSDPFusedGPSA"),
    ],
    ids=["parametrize", "fully_shard"],
)
def test_unfuse_leaves_a_layer_whose_class_was_changed(change, name):
    model = nn.Sequential(fuse(layer()), fuse(layer()))
    change(model[0])
    expected = model(tokens())
    with pytest.warns(UserWarning, match=f"^0 stays fused: since fuse its class has changed from FusedGPSA to {name}"):
        unfuse(model)
    assert [type(m).__name__ for m in model] == [name, "GPSA"]
    torch.testing.assert_close(model(tokens()), expected)


def test_pruned_parameters_are_fused():
    model = layer(qkv_bias=True).half()  # the trial's copy has another dtype
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


def test_a_parametrized_gate_is_named():
    model = layer()
    parametrize.register_parametrization(model, "gating_param", Halved())
    with pytest.warns(UserWarning, match="is left as it is: the fused layer does not know its parametrizations"):
        fuse(model)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


CHANGES = {
    "forward hook": lambda m: m.attn_drop.register_forward_hook(lambda _, x, out: out.square()),
    "backward hook": lambda m: m.attn_drop.register_full_backward_hook(lambda _, grads, __: (2 * grads[0],)),
    "backward pre-hook": lambda m: m.attn_drop.register_full_backward_pre_hook(lambda _, grads: (2 * grads[0],)),
    "another module": lambda m: setattr(m, "attn_drop", nn.Hardtanh(0.1, 0.5)),
    "forward pre-hook": lambda m: m.pos_proj.register_forward_pre_hook(lambda _, x: (2 * x[0],)),
    "prune": lambda m: prune.l1_unstructured(m.pos_proj, "weight", 0.5),
    "another class": lambda m: setattr(m.pos_proj, "__class__", Doubled),
    "another forward": lambda m: setattr(m.pos_proj, "forward", lambda x: x.cos()),
    "not linear": lambda m: setattr(m, "pos_proj", nn.Sequential(m.pos_proj, nn.Tanh())),
}


def results(model: nn.Module) -> dict[str, torch.Tensor]:
    with torch.no_grad():  # an optimizer's step
        for parameter in model.parameters():
            parameter *= 1.1
    x = tokens().requires_grad_()
    out = model(x)
    out.sin().sum().backward()
    return {"out": out, "x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
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
    model = timm_convit(image_size=32, depth=3, local_up_to_layer=2).float().eval()
    x = torch.randn(4, 3, 32, 32)
    expected = model(x)
    quantize = torch.ao.quantization.quantize_dynamic
    quantized, fused = quantize(copy.deepcopy(model), {nn.Linear}), quantize(fuse(copy.deepcopy(model)), {nn.Linear})
    error, allowed = ((q(x) - expected).abs().max() for q in (fused, quantized))
    assert 0 < error <= 2 * allowed


class DyToxGPSA(TimmGPSA):
    """Hands out the attention map and v, too, which DyTox's blocks pass on and its model drops."""

    def forward(self, x):
        return super().forward(x), self.get_attention(x), self.v(x)


class DyTox(nn.Module):
    def __init__(self):
        super().__init__()
        self.sabs = nn.ModuleList([DyToxGPSA(24, 3, attn_drop=0.1), DyToxGPSA(24, 3)])

    def forward(self, x):
        for attention in self.sabs:
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
    assert type(model.sabs[0]) is DyToxGPSA
    fused = copied(fuse(model, outputs=3))
    assert isinstance(fused.sabs[0], FusedGPSA)
    assert fused.sabs[0](tokens())[1:] == (None, None)
    actual = results(fused)
    for layer in (0, 1):  # the bias cancels in the softmax: timm's gradient is rounding
        expected[f"sabs.{layer}.pos_proj.bias"] = actual[f"sabs.{layer}.pos_proj.bias"]
    torch.testing.assert_close(actual, expected)
    names = [{name: vars(m).keys() for name, m in model.named_modules()} for model in (unfuse(fused), DyTox())]
    assert names[0] == names[1]
    assert type(fused.sabs[0]) is DyToxGPSA


def test_a_layer_of_one_value_is_not_taken_for_one_of_three():
    with pytest.warns(UserWarning, match="its forward returns a Tensor, not 3 values"):
        assert type(fuse(TimmGPSA(24, 3), outputs=3)) is TimmGPSA
