"""The registered operator over the kernels: drawn calls, contract, compilation, autocast, refusals."""

import pytest
import torch
from fuzz import fuzz

from gpsa_kernels import BACKENDS, gpsa_attention
from gpsa_kernels.backends import Call
from gpsa_kernels.backends.triton import INTERPRETED
from gpsa_kernels.functional import select_backend

grid_sizes = pytest.mark.parametrize("grid_size", [(3, 5), (2, 17)], ids=str)


@pytest.mark.parametrize("seed", ["fixed", "fresh"])
def test_whatever_is_drawn_is_as_exact_as_eager(target, seed):
    fuzz(seed, 12 if INTERPRETED else 100, (target.backend,), target.dtypes, 20, 8)


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_opcheck(target, dropout_p, save):
    tensors, grad_out = target.given(2, 2, (3, 5), 16, target.widest)
    seed = torch.tensor([7], device=target.device) if dropout_p else None
    call = (*tensors, seed, 3, 5, 0.25, dropout_p)
    torch.library.opcheck(torch.ops.gpsa.attention_forward.default, (*call, target.backend, save))
    if save:
        _, *saved = torch.ops.gpsa.attention_forward(*call, target.backend, True)
        arguments = (grad_out, *call, *saved, target.backend)
        torch.library.opcheck(torch.ops.gpsa.attention_backward.default, arguments)


@pytest.mark.parametrize("save", [False, True])
@grid_sizes
def test_fake_tensors_have_the_real_strides(target, grid_size, save):
    real, _ = target.given(2, 2, grid_size, 16, target.widest)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in real]
    settings = (None, *grid_size, 0.25, 0.0, target.backend, save)
    made = (torch.ops.gpsa.attention_forward(*tensors, *settings) for tensors in (real, fake))
    for a, b in zip(*made, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@grid_sizes
def test_compiled_graph_gives_the_same_bits(target, grid_size):
    tensors, _ = target.given(2, 2, grid_size, 16, target.widest)

    def attention(*leaves):
        return gpsa_attention(*leaves, grid_size, backend=target.backend)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), attention(*tensors))


def test_autocast(target):
    tensors, _ = target.given(1, 2, (3, 5), 16, torch.float32)
    with torch.autocast(target.device, torch.float16):
        out = gpsa_attention(*tensors, (3, 5), backend=target.backend)
        if target.backend != "triton":  # autocast leaves float64 alone
            with pytest.raises(RuntimeError, match=r"q is torch\.float64"):
                gpsa_attention(*(t.double() for t in tensors), (3, 5), backend=target.backend)
    half = [t.half() for t in tensors[:3]]
    assert torch.equal(out, gpsa_attention(*half, *tensors[3:], (3, 5), backend=target.backend))


def test_inference_mode(target):
    tensors, _ = target.given(1, 2, (3, 5), 16, target.widest)
    expected = gpsa_attention(*tensors, (3, 5), backend=target.backend)
    with torch.inference_mode():
        assert torch.equal(gpsa_attention(*tensors, (3, 5), backend=target.backend), expected)


@pytest.mark.usefixtures("_no_vmap_fallback")
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_vmap_over_queries_gates_and_what_is_saved(target, dropout_p):
    (q, k, v, pos_weight, gate), _ = target.given(1, 2, (2, 3), 16, target.widest)
    seed = torch.tensor([7], device=target.device) if dropout_p else None
    settings = (2, 3, 0.25, dropout_p)

    def gradients(q, gate, grad_out):
        tensors = (q, k, v, pos_weight, gate, seed)
        out, *saved = torch.ops.gpsa.attention_forward(*tensors, *settings, target.backend, True)
        return out, *torch.ops.gpsa.attention_backward(grad_out, *tensors, *settings, *saved, target.backend)

    stacked = torch.stack((q, k), dim=2), torch.stack((gate, -gate)), torch.stack((k, v), dim=4)
    actual = torch.vmap(gradients, (2, 0, 4))(*stacked)
    expected = zip(gradients(q, gate, k), gradients(k, -gate, v), strict=True)
    torch.testing.assert_close(list(actual), [torch.stack(pair) for pair in expected])


def refusal(backend, q, k, v):
    """Why a backend cannot run a call; asked for by name it says the same."""
    pos_weight, gate = torch.zeros(q.size(1), 3, device=q.device), torch.zeros(q.size(1), device=q.device)
    reason = BACKENDS[backend].unsupported(Call(q, k, v, pos_weight, gate, None, 2, 3, 1.0, 0.0))
    if reason is not None:
        with pytest.raises(RuntimeError) as raised:
            gpsa_attention(q, k, v, pos_weight, gate, (2, 3), backend=backend)
        assert str(raised.value) == f"backend {backend!r} cannot run this call: {reason}"
    return reason


def test_what_the_kernels_cannot_run_is_refused(target):
    (q, k, v, *_), _ = target.given(1, 1, (2, 3), 8, target.widest)
    assert refusal(target.backend, q, k, v) is None
    for head_dim in (12, 136):
        odd = q.new_zeros(1, 1, 6, head_dim)
        assert f"multiple of 8 from 8 to 128, got {head_dim}" in refusal(target.backend, odd, odd, odd)
    transposed = q.new_zeros(1, 1, 8, 6).mT
    assert "k's last dimension has stride 6" in refusal(target.backend, q, transposed, v)
    assert "v's last dimension has stride 6" in refusal(target.backend, q, k, transposed)
    if torch.float32 not in target.dtypes:
        wide = q.float()
        assert "take float16 and bfloat16, and q is torch.float32" in refusal(target.backend, wide, wide, wide)


def test_the_interpreter_takes_what_it_computes_rightly_and_auto_leaves_it_alone(target):
    if not INTERPRETED:
        pytest.skip("about Triton's interpreter")
    (q, k, v, *parameters), _ = target.given(1, 1, (2, 3), 8, torch.float32)
    call = Call(q, k, v, *parameters, None, 2, 3, 1.0, 0.0)
    assert select_backend(call).name == "sdpa"
    assert select_backend(call._replace(dropout_p=0.5)).name == "eager"
    half = q.bfloat16()
    assert "bfloat16" in refusal("triton", half, half, half)
