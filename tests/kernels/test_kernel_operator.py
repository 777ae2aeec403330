"""The registered operator over the kernels: contract, compilation, autocast, refusals."""

from __future__ import annotations

import pytest
import torch
from reference import inputs

from gpsa_kernels import BACKENDS, gpsa_attention
from gpsa_kernels.backends import Call
from gpsa_kernels.backends.triton import INTERPRETED
from gpsa_kernels.functional import select_backend


def _inputs(target, dtype, *shape):
    return [t.detach().to(target.device) for t in inputs(*shape, dtype)]


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_opcheck_forward(target, widest, dropout_p, save):
    seed = torch.tensor([7], device=target.device) if dropout_p else None
    tensors = _inputs(target, widest, 2, 2, (3, 5), 16)
    arguments = (*tensors, seed, 3, 5, 0.25, dropout_p, target.backend, save)
    torch.library.opcheck(torch.ops.gpsa.attention_forward.default, arguments)


def test_opcheck_backward(target, widest):
    tensors = _inputs(target, widest, 2, 2, (3, 5), 16)
    grad_out = torch.randn_like(tensors[0])
    settings = (3, 5, 0.25, 0.0, target.backend)
    _, content, logsumexp = torch.ops.gpsa.attention_forward(*tensors, None, *settings, True)
    arguments = (grad_out, *tensors, None, *settings[:4], content, logsumexp, target.backend)
    torch.library.opcheck(torch.ops.gpsa.attention_backward.default, arguments)


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("grid_size", [(3, 5), (2, 17)], ids=str)
def test_fake_tensors_have_the_real_strides(target, widest, grid_size, save):
    tensors = _inputs(target, widest, 2, 2, grid_size, 16)
    real = torch.ops.gpsa.attention_forward(*tensors, None, *grid_size, 0.25, 0.0, target.backend, save)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in tensors]
        fake = torch.ops.gpsa.attention_forward(*fakes, None, *grid_size, 0.25, 0.0, target.backend, save)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.parametrize("grid_size", [(3, 5), (2, 17)], ids=str)
def test_compiled_graph_gives_the_same_bits(target, widest, grid_size):
    tensors = _inputs(target, widest, 2, 2, grid_size, 16)

    def attention(*leaves):
        return gpsa_attention(*leaves, grid_size, backend=target.backend)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), attention(*tensors))


def test_autocast(target):
    tensors = _inputs(target, torch.float32, 1, 2, (3, 5), 16)
    with torch.autocast(target.device, torch.float16):
        out = gpsa_attention(*tensors, (3, 5), backend=target.backend)
    half = [t.half() for t in tensors[:3]]
    assert torch.equal(out, gpsa_attention(*half, *tensors[3:], (3, 5), backend=target.backend))


def test_inference_mode(target, widest):
    tensors = _inputs(target, widest, 1, 2, (3, 5), 16)
    expected = gpsa_attention(*tensors, (3, 5), backend=target.backend)
    with torch.inference_mode():
        assert torch.equal(gpsa_attention(*tensors, (3, 5), backend=target.backend), expected)


@pytest.mark.usefixtures("_no_vmap_fallback")
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_vmap_over_queries_gates_and_what_is_saved(target, widest, dropout_p):
    q, k, v, pos_weight, gate = _inputs(target, widest, 1, 2, (2, 3), 16)
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


def _call(q, k, v, dropout_p=0.0):
    return Call(q, k, v, torch.zeros(1, 3), torch.zeros(1), None, 2, 3, 1.0, dropout_p)


def test_refusals(target, widest):
    unsupported = BACKENDS[target.backend].unsupported
    q, k, v, pos_weight, gate = _inputs(target, widest, 1, 1, (2, 3), 8)
    assert unsupported(_call(q, k, v)) is None
    for head_dim in (12, 136):
        odd = torch.zeros(1, 1, 6, head_dim, dtype=widest, device=target.device)
        assert f"got {head_dim}" in unsupported(_call(odd, odd, odd))
        with pytest.raises(RuntimeError, match="multiple of 8"):
            gpsa_attention(odd, odd, odd, pos_weight, gate, (2, 3), backend=target.backend)
    transposed = torch.zeros(1, 1, 8, 6, dtype=widest, device=target.device).mT
    assert "k's last dimension" in unsupported(_call(q, transposed, v))


def test_the_interpreter_takes_what_it_computes_rightly_and_auto_leaves_it_alone(target):
    if not INTERPRETED:
        pytest.skip("about Triton's interpreter")
    q, k, v, *_ = _inputs(target, torch.float32, 1, 1, (2, 3), 8)
    assert select_backend(_call(q, k, v)).name == "sdpa"
    assert select_backend(_call(q, k, v, 0.5)).name == "eager"
    half = q.bfloat16()
    assert "bfloat16" in BACKENDS["triton"].unsupported(_call(half, half, half))
