"""What only a GPU can show: graphs, streams, schedules, sizes beyond 32-bit offsets and grid limits."""

from __future__ import annotations

import pytest
import torch
from reference import NAMES, inputs

from gpsa_kernels import gpsa_attention

GRID_SIZES = [(14, 14), (24, 24), (3, 5)]

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


def gpu_inputs(*shape, dtype=torch.float16):
    return [t.detach().cuda() for t in inputs(*shape, dtype)]


def step(target, grid_size, tensors, grad_out, dropout_p=0.0):
    """The result and all gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = gpsa_attention(*leaves, grid_size, dropout_p=dropout_p, backend=target.backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


@pytest.mark.parametrize("grid_size", GRID_SIZES, ids=str)
def test_250_runs_give_the_same_bits(target, dtype, grid_size):
    tensors = gpu_inputs(4, 9, grid_size, 48, dtype=dtype)
    grad_out = torch.randn_like(tensors[0])
    first = step(target, grid_size, tensors, grad_out)
    for _ in range(249):
        for name, a, b in zip(NAMES, first, step(target, grid_size, tensors, grad_out), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("grid_size", GRID_SIZES, ids=str)
def test_graph_replay_gives_the_same_bits(target, grid_size, dropout_p):
    tensors = gpu_inputs(2, 9, grid_size, 48)
    grad_out = torch.randn_like(tensors[0])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(target, grid_size, tensors, grad_out, dropout_p)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = step(target, grid_size, tensors, grad_out, dropout_p)
    graph.replay()
    torch.cuda.synchronize()
    if dropout_p:  # every replay draws another mask
        out = results[0].clone()
        graph.replay()
        torch.cuda.synchronize()
        assert not torch.equal(results[0], out)
        return
    for new in (tensors, gpu_inputs(2, 9, grid_size, 48)):
        for a, b in zip(tensors, new, strict=True):
            a.copy_(b + 0.125)
        graph.replay()
        torch.cuda.synchronize()
        for name, a, b in zip(NAMES, results, step(target, grid_size, tensors, grad_out), strict=True):
            assert torch.equal(a, b), name


def test_kernels_run_on_the_current_stream(target):
    grid_size = (24, 24)
    tensors = gpu_inputs(1, 2, grid_size, 48)
    expected = gpsa_attention(*tensors, grid_size, backend=target.backend)
    torch.cuda.synchronize()
    late = [torch.zeros_like(t) for t in tensors]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # cycles: what does not wait for the stream reads zeros
        for a, b in zip(late, tensors, strict=True):
            a.copy_(b)
        out = gpsa_attention(*late, grid_size, backend=target.backend)
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("grid_size", GRID_SIZES, ids=str)
def test_compiled_by_inductor(target, grid_size):
    tensors = [t.requires_grad_() for t in gpu_inputs(2, 3, grid_size, 48)]

    @torch.compile(fullgraph=True)
    def attention(*leaves):
        return 2 * gpsa_attention(*leaves, grid_size, backend=target.backend)

    out = attention(*tensors)
    expected = 2 * gpsa_attention(*tensors, grid_size, backend=target.backend)
    assert torch.equal(out, expected)
    grad_out = torch.randn_like(out)
    pairs = zip(*(torch.autograd.grad(o, tensors, grad_out) for o in (out, expected)), NAMES[1:], strict=True)
    for a, b, name in pairs:
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("batch", "heads"), [(70_000, 1), (1, 70_000), (2, 33_000)])
def test_more_batch_heads_than_a_grid_axis_holds(target, batch, heads):
    """Every (batch, head) is checked: against the same one computed alone among few."""
    tensors = gpu_inputs(batch, heads, (2, 3), 8)
    grad_out = torch.randn_like(tensors[0])
    out, grad_q, grad_k, grad_v, *_ = step(target, (2, 3), tensors, grad_out)
    for part in (slice(0, 7), slice(-7, None)):
        index = (part, slice(None)) if batch >= heads else (slice(None), part)
        few = [t[index].contiguous() for t in tensors[:3]]
        parameters = [t if batch >= heads else t[part] for t in tensors[3:]]
        alone = step(target, (2, 3), [*few, *parameters], grad_out[index].contiguous())
        for name, a, b in zip(NAMES, (out, grad_q, grad_k, grad_v), alone[:4], strict=False):
            assert torch.equal(a[index], b), name


def test_16384_tokens(target):
    """Against ``sdpa`` in float32, which is checked against the formula on the CPU."""
    grid_size = (128, 128)
    tensors = gpu_inputs(1, 2, grid_size, 48)
    grad_out = torch.randn_like(tensors[0])
    got = step(target, grid_size, tensors, grad_out)
    leaves = [t.float().requires_grad_() for t in tensors]
    out = gpsa_attention(*leaves, grid_size, backend="sdpa")
    truth = [out.detach(), *torch.autograd.grad(out, leaves, grad_out.float())]
    half = step(target._replace(backend="sdpa"), grid_size, tensors, grad_out)
    for name, a, b, expected in zip(NAMES, got, half, truth, strict=True):
        error, allowed = ((t.float() - expected).abs().max() for t in (a, b))
        assert error <= allowed + torch.finfo(a.dtype).eps * expected.abs().max(), name


def test_offsets_beyond_32_bits(target):
    """A view whose last batch element starts more than 2^31 elements behind the first."""
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 10 GB of memory")
    few = gpu_inputs(2, 1, (3, 5), 16)
    memory = torch.empty(2**31 + 4096, dtype=torch.float16, device="cuda")
    spread = [memory.as_strided((2, 1, 15, 16), (2**31 + 1024, 240, 16, 1), 512 * i) for i in range(2)]
    for a, b in zip(spread, few, strict=False):
        a.copy_(b)
    tensors = [*spread, *few[2:]]
    grad_out = torch.randn_like(few[0])
    for name, a, b in zip(
        NAMES, step(target, (3, 5), tensors, grad_out), step(target, (3, 5), few, grad_out), strict=True
    ):
        assert torch.equal(a, b), name
