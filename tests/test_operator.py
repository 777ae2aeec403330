"""The numbers of gpsa_attention, whatever the backend: against the formula, at awkward shapes and extreme values."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from reference import NAMES, assert_as_exact_as_eager, inputs, literal, loops, with_gradients
from torch._subclasses.fake_tensor import FakeTensorMode

import gpsa_kernels
from gpsa_kernels import gpsa_attention
from gpsa_kernels.backends import Backend, Call, eager, sdpa
from gpsa_kernels.backends.base import Forward

ALL_KERNELS = ("sdpa", "triton", "cuda")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
GRIDS = ((1, 1), (1, 2), (7, 9), (8, 8), (5, 13), (13, 5), (14, 14), (1, 197), (197, 1), (3, 11))
SHAPES = [
    *((2, 2, grid_size, 16) for grid_size in GRIDS),
    *((1, 2, (4, 6), head_dim) for head_dim in (1, 5, 8, 16, 24, 32, 40, 48, 64, 72, 96, 128)),
    *((batch, 3, (3, 5), 8) for batch in (0, 1, 7)),
    (2, 9, (14, 14), 48),
]

backends = pytest.mark.parametrize("backend", ["eager", "sdpa"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@backends
@pytest.mark.parametrize("grid_size", [(2, 3), (3, 2), (1, 4), (3, 3)])
def test_matches_the_loops(backend, grid_size):
    tensors = inputs(2, 3, grid_size, 4)
    expected = loops(*tensors, grid_size, 0.7)
    torch.testing.assert_close(gpsa_attention(*tensors, grid_size, scale=0.7, backend=backend), expected)
    torch.testing.assert_close(literal(*tensors, grid_size, 0.7), expected)


@backends
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_eager(backend, dtype, shape):
    assert_as_exact_as_eager(gpsa_attention, inputs(*shape, dtype), shape[2], backend=backend)


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


@backends
@dtypes
def test_expanded_output_gradient(backend, dtype):
    tensors = inputs(2, 2, (3, 4), 8, dtype)
    out = gpsa_attention(*tensors, (3, 4), backend=backend)
    summed = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
    assert all(map(torch.equal, summed, torch.autograd.grad(out, tensors, torch.ones_like(out))))


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


EXTREMES = {
    **{f"gate {logit}": (4, lambda t, logit=logit: t.fill_(logit)) for logit in (-100.0, 4.0, 8.0, 12.0, 100.0)},
    # one-hot rows, of scores of 1e4; maps up to one-hot, and with w2 > 0, where the softmax prefers the far corners
    "scores": (0, lambda t: t.mul_(1e4)),
    **{
        f"weights {weights}": (3, lambda t, weights=weights: t.copy_(torch.tensor(weights)))
        for weights in ((0, 0, 0), (1e3, -1e3, -1e3), (0, 0, -1e3), (1e3, 1e3, 0), (0.5, -1, 1e3))
    },
}


@backends
@dtypes
@pytest.mark.parametrize(("which", "change"), EXTREMES.values(), ids=EXTREMES)
def test_extremes_are_as_exact_as_eager(backend, dtype, which, change):
    tensors = inputs(2, 2, (4, 5), 8, dtype)
    change(tensors[which].data)
    assert_as_exact_as_eager(gpsa_attention, tensors, (4, 5), backend=backend)


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


@backends
def test_nan_stays_in_its_batch_element(backend):
    tensors = inputs(3, 2, (4, 5), 8, torch.float32)
    clean = with_gradients(gpsa_attention, tensors, torch.ones(3, 2, 20, 8), (4, 5), backend=backend)
    for which in range(3):
        poisoned = [t.detach().clone() for t in tensors]
        poisoned[which][1, 0, 3, 2] = float("nan")
        got = with_gradients(gpsa_attention, poisoned, torch.ones(3, 2, 20, 8), (4, 5), backend=backend)
        assert got[0][1, 0].isnan().any()
        for a, b in zip(got[:4], clean[:4], strict=True):
            assert torch.equal(a[[0, 2]], b[[0, 2]])
            assert torch.equal(a[1, 1], b[1, 1])


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


@backends
def test_runs_are_bitwise_equal_and_leave_their_inputs_alone(backend):
    tensors, grad_out = inputs(5, 3, (6, 7), 16, torch.float32), torch.randn(5, 3, 42, 16)
    copies = [t.detach().clone() for t in (*tensors, grad_out)]
    out, other = (gpsa_attention(*tensors, (6, 7), backend=backend) for _ in range(2))
    runs = [torch.autograd.grad(o, tensors, grad_out, retain_graph=True) for o in (out, out, other)]
    assert torch.equal(out, other)
    assert all(map(torch.equal, runs[0], runs[1]))
    assert all(map(torch.equal, runs[0], runs[2]))
    with torch.no_grad():
        gpsa_attention(*tensors, (6, 7), backend=backend)
    assert all(map(torch.equal, copies, (*tensors, grad_out)))


def dropped_map(dropout_p, seed):
    """The attention map itself, which is the output where V is the identity."""
    q, k, _, pos_weight, gate = (t.detach() for t in inputs(4, 2, (4, 6), 24))
    torch.manual_seed(seed)
    return gpsa_attention(q, k, torch.eye(24).to(q).expand_as(q), pos_weight, gate, (4, 6), dropout_p=dropout_p)


def test_dropout_masks_both_branches_at_once():
    full, dropped = dropped_map(0.0, 3), dropped_map(0.25, 3)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], full[kept] / 0.75)
    assert not dropped_map(1.0, 3).any()
    # 4 standard deviations of the mean of that many draws
    assert abs(kept.double().mean().item() - 0.75) < 4 * (0.25 * 0.75 / kept.numel()) ** 0.5


def test_dropout_follows_the_seed():
    first, again, other = (dropped_map(0.5, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
def test_dropout_gradient_uses_the_forward_mask(dropout_p):
    def fixed_mask(*tensors):
        torch.manual_seed(5)
        return gpsa_attention(*tensors, (2, 3), dropout_p=dropout_p)

    assert torch.autograd.gradcheck(fixed_mask, inputs(1, 2, (2, 3), 4))


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


@pytest.mark.parametrize("mode", [nullcontext, FakeTensorMode])
@pytest.mark.parametrize(
    ("backend", "seeded", "dropout_p", "error", "message"),
    [
        *((name, False, 0.5, ValueError, "if and only if dropout_p > 0, got None for 0.5") for name in ALL_KERNELS),
        *((name, True, 0.0, ValueError, "if and only if dropout_p > 0, got a tensor for 0.0") for name in ALL_KERNELS),
        ("sdpa", True, 0.5, RuntimeError, "backend 'sdpa' cannot run this call: attention dropout needs one mask"),
    ],
)
def test_the_operators_refuse_dropout_that_would_drop_nothing(backend, seeded, dropout_p, error, message, mode):
    with mode():
        q, k, v, out = torch.randn(4, 1, 2, 6, 8).unbind()
        seed = torch.zeros(1, dtype=torch.int64) if seeded else None
        call = (q, k, v, torch.randn(2, 3), torch.randn(2), seed, 2, 3, 0.5, dropout_p)
        with pytest.raises(error, match=message):
            torch.ops.gpsa.attention_forward(*call, backend)
        with pytest.raises(error, match=message):
            torch.ops.gpsa.attention_backward(out, *call, out, torch.randn(1, 2, 6), backend)
