"""The numbers of gpsa_attention beside those that tests/kernels has of all backends: the oracles', and sdpa's own."""

from functools import partial

import pytest
import torch
from reference import NAMES, assert_as_exact_as_eager, inputs, literal, loops, with_gradients

import gpsa_kernels
from gpsa_kernels import gpsa_attention
from gpsa_kernels.backends import Backend, Call, eager, sdpa
from gpsa_kernels.backends.base import Forward

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
backends = pytest.mark.parametrize("backend", ["eager", "sdpa"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@backends
@pytest.mark.parametrize("grid_size", [(2, 3), (3, 2), (1, 4), (3, 3)])
def test_matches_the_loops(backend, grid_size):
    tensors = inputs(2, 3, grid_size, 4)
    expected = loops(*tensors, grid_size, 0.7)
    torch.testing.assert_close(gpsa_attention(*tensors, grid_size, scale=0.7, backend=backend), expected)
    torch.testing.assert_close(literal(*tensors, grid_size, 0.7), expected)


@pytest.mark.parametrize("elements", [1, 200, 700])
def test_sdpa_workspace_of_any_size(monkeypatch, elements):
    """The batch is worked through in slices: of one element, of several with a rest, of all."""
    monkeypatch.setattr("gpsa_kernels.backends.sdpa._WORKSPACE_ELEMENTS", elements)
    assert_as_exact_as_eager(gpsa_attention, inputs(5, 2, (3, 4), 8, torch.float32), (3, 4), backend="sdpa")


@backends
@dtypes
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("differentiated", [False, True])
def test_merging_the_heads_is_a_view(backend, dtype, packed, differentiated):
    *qkv, pos_weight, gate = inputs(2, 3, (4, 5), 8, dtype)
    if packed:
        qkv = torch.randn(2, 20, 3, 3, 8).to(dtype).permute(2, 0, 3, 1, 4).unbind()
    with torch.set_grad_enabled(differentiated):
        out = gpsa_attention(*qkv, pos_weight, gate, (4, 5), backend=backend)
    assert out.transpose(1, 2).is_contiguous()


@backends
def test_expanded_parameters(backend):
    """What may be expanded among q, k, v and the output's gradient is drawn in fuzz.py."""
    *qkv, pos_weight, gate = (t.detach() for t in inputs(1, 3, (3, 4), 8))
    wide = pos_weight[:1].expand(3, 3), gate[:1].expand(3)
    out = gpsa_attention(*qkv, *wide, (3, 4), backend=backend)
    assert torch.equal(out, gpsa_attention(*qkv, *(t.contiguous() for t in wide), (3, 4), backend=backend))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_strided_last_dimension_goes_to_eager(name):
    """torch's flash attention on the CPU would read past it and return other numbers."""
    tensors = dict(zip(NAMES[1:], (t.detach() for t in inputs(1, 2, (3, 4), 8)), strict=True))
    expected = gpsa_attention(**tensors, grid_size=(3, 4), backend="eager")
    tensors[name] = tensors[name].mT.contiguous().mT
    assert torch.equal(gpsa_attention(**tensors, grid_size=(3, 4)), expected)
    with pytest.raises(RuntimeError, match=rf"{name}'s last dimension has stride 12.*contiguous"):
        gpsa_attention(**tensors, grid_size=(3, 4), backend="sdpa")


@backends
@dtypes
@pytest.mark.parametrize("gate", [-100.0, 100.0])
def test_a_closed_branch_has_no_say(backend, dtype, gate):
    tensors = inputs(2, 2, (4, 5), 8, dtype)
    tensors[4].data.fill_(gate)
    out = gpsa_attention(*tensors, (4, 5), backend=backend)
    closed_off = 3 if gate < 0 else 0  # pos_weight or q
    tensors[closed_off] = 2 * tensors[closed_off]
    assert torch.equal(out, gpsa_attention(*tensors, (4, 5), backend=backend))


def composed(backend, q, k, v, pos_weight, gate, grid_size, scale):
    return backend.compose(Call(q, k, v, pos_weight, gate, None, *grid_size, scale, 0.0))


@dtypes
@pytest.mark.parametrize("gate", [-8.0, 0.0, 4.0, 8.0, 12.0])
@pytest.mark.parametrize(("grid_size", "head_dim"), [((4, 5), 8), ((14, 14), 48)], ids=str)
def test_sdpa_blends_its_branches_in_float32(dtype, gate, grid_size, head_dim):
    """The composition, which is what GPUs and compilers run, beside the eager backend, which rounds its result only."""
    tensors = inputs(2, 2, grid_size, head_dim, dtype)
    tensors[4].data.fill_(gate)
    underflows = torch.sigmoid(torch.tensor(-gate)) < torch.finfo(dtype).tiny  # the content's share of a gradient
    rule = {} if underflows else {"eager": partial(composed, eager)}
    assert_as_exact_as_eager(partial(composed, sdpa), tensors, grid_size, **rule)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid_size", [(2, 3), (5, 7)], ids=str)
@torch.no_grad()
def test_sdpa_gradients_in_16_bits_are_those_of_float32_rounded_once(dtype, grid_size):
    *tensors, pos_weight, gate = inputs(2, 3, grid_size, 16, dtype)
    grad_out = torch.randn_like(tensors[0])
    content = sdpa.forward(Call(*tensors, pos_weight, gate, None, *grid_size, 0.25, 0.0), save=True)[1:]

    def gradients(dtype):
        made = Call(*(t.to(dtype) for t in tensors), pos_weight, gate, None, *grid_size, 0.25, 0.0)
        return sdpa.backward(grad_out.to(dtype), made, sdpa.Saved(content[0].to(dtype), content[1]))

    for grad, exact in zip(gradients(dtype), gradients(torch.float32), strict=True):
        assert torch.equal(grad, exact.to(grad.dtype))


@dtypes
@pytest.mark.parametrize("grid_size", [(2, 3), (7, 9)])
def test_of_tokens_alike_only_v_has_a_gradient(dtype, grid_size):
    """A blank image: whatever the attention, v comes out of it, and what cancels in sdpa leaves no rounding."""
    tensors = inputs(2, 3, grid_size, 16, dtype)
    tensors[2] = tensors[2][:, :, :1].expand_as(tensors[2])
    for attention in (gpsa_attention, torch.compile(gpsa_attention, backend="eager")):
        results = with_gradients(attention, tensors, torch.ones_like(tensors[0]), grid_size, backend="sdpa")
        found = dict(zip(NAMES, results, strict=True))
        assert torch.equal(found["out"], tensors[2])
        assert [name for name in NAMES if found[name].any()] == ["out", "v"]


@backends
@dtypes
@pytest.mark.parametrize("tokens", [1, 2, 6, 9, 15, 16, 17, 33])
def test_no_nan_is_lost(backend, dtype, tokens):
    """In one token of q, k or v; torch's flash attention on the CPU forgets it in rows shorter than a vector."""
    tensors = inputs(1, 2, (1, tokens), 8, dtype)
    for which in range(3):
        poisoned = [t.detach().clone() for t in tensors]
        poisoned[which][0, 0, tokens // 2] = torch.nan
        grad_out = torch.ones_like(poisoned[0])
        expected = with_gradients(literal, [t.double() for t in poisoned], grad_out.double(), (1, tokens), 8**-0.5)
        got = with_gradients(gpsa_attention, poisoned, grad_out, (1, tokens), backend=backend)
        compiled = torch.compile(gpsa_attention, backend="eager")(*poisoned, (1, tokens), backend=backend)
        for name, a, b in [("compiled", expected[0], compiled), *zip(NAMES[:4], expected, got, strict=False)]:
            assert b[a.isnan()].isnan().all(), name


def test_the_seed_of_the_mask_has_64_random_bits(monkeypatch):
    seeds = []

    def record(call, save):
        seeds.append(call.seed.item())
        return Forward(torch.empty_like(call.q), None, None)

    recorder = Backend("recorder", lambda: None, lambda *_: None, forward=record, kernel_devices=frozenset({"cpu"}))
    monkeypatch.setitem(gpsa_kernels.BACKENDS, "recorder", recorder)
    tensors = [t.detach() for t in inputs(1, 1, (1, 1), 1)]
    for _ in range(64):
        gpsa_attention(*tensors, (1, 1), dropout_p=0.5, backend="recorder")
    assert all({seed >> bit & 1 for seed in seeds} == {0, 1} for bit in range(64))
