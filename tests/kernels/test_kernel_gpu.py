"""What only a GPU can show: graphs, streams, schedules, sizes beyond 32-bit offsets and grid limits."""

import pytest
import torch
from reference import NAMES, assert_same_bits, with_gradients

from gpsa_kernels import gpsa_attention

grid_sizes = pytest.mark.parametrize("grid_size", [(14, 14), (24, 24), (3, 5)], ids=str)

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


@grid_sizes
def test_250_runs_give_the_same_bits(target, dtype, grid_size):
    tensors, grad_out = target.given(4, 9, grid_size, 48, dtype)
    first = target.run(tensors, grad_out, grid_size)
    for _ in range(249):
        assert_same_bits(target.run(tensors, grad_out, grid_size), first)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@grid_sizes
def test_graph_replay_gives_the_same_bits(target, grid_size, dropout_p):
    tensors, grad_out = target.given(2, 9, grid_size, 48, torch.float16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        target.run(tensors, grad_out, grid_size, dropout_p=dropout_p)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = target.run(tensors, grad_out, grid_size, dropout_p=dropout_p)
    graph.replay()
    torch.cuda.synchronize()
    if dropout_p:  # every replay draws another mask
        out = results[0].clone()
        graph.replay()
        torch.cuda.synchronize()
        assert not torch.equal(results[0], out)
        return
    for offset in (0.125, 0.25):
        for t in tensors:
            t.add_(offset)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(results, target.run(tensors, grad_out, grid_size))


def test_kernels_run_on_the_current_stream(target):
    grid_size = (24, 24)
    tensors, _ = target.given(1, 2, grid_size, 48, torch.float16)
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


@grid_sizes
def test_compiled_by_inductor(target, grid_size):
    tensors, grad_out = target.given(2, 3, grid_size, 48, torch.float16)

    def attention(*leaves):
        return 2 * gpsa_attention(*leaves, grid_size, backend=target.backend)

    compiled = torch.compile(attention, fullgraph=True)
    assert_same_bits(*(with_gradients(function, tensors, grad_out) for function in (compiled, attention)))


@pytest.mark.parametrize(("batch", "heads"), [(70_000, 1), (1, 70_000), (2, 33_000)])
def test_more_batch_heads_than_a_grid_axis_holds(target, batch, heads):
    """The first and the last few (batch, head)s, against the same ones computed alone."""
    tensors, grad_out = target.given(batch, heads, (2, 3), 8, torch.float16)
    results = target.run(tensors, grad_out, (2, 3))
    for part in (slice(0, 7), slice(-7, None)):
        index = (part, slice(None)) if batch >= heads else (slice(None), part)
        few = [t[index].contiguous() for t in tensors[:3]]
        parameters = [t if batch >= heads else t[part] for t in tensors[3:]]
        alone = target.run([*few, *parameters], grad_out[index].contiguous(), (2, 3))
        for name, a, b in zip(NAMES[:4], results, alone, strict=False):
            assert torch.equal(a[index], b), name


def test_16384_tokens(target):
    """Against ``sdpa`` in float32, which is checked against the formula on the CPU."""
    grid_size = (128, 128)
    tensors, grad_out = target.given(1, 2, grid_size, 48, torch.float16)
    floats = [t.float() for t in tensors]
    truth = with_gradients(gpsa_attention, floats, grad_out.float(), grid_size, backend="sdpa")
    half = with_gradients(gpsa_attention, tensors, grad_out, grid_size, backend="sdpa")
    for name, a, b, expected in zip(NAMES, target.run(tensors, grad_out, grid_size), half, truth, strict=True):
        error, allowed = ((t.float() - expected).abs().max() for t in (a, b))
        assert error <= allowed + torch.finfo(a.dtype).eps * expected.abs().max(), name


def test_offsets_beyond_32_bits(target):
    """A view whose last batch element starts more than 2^31 elements behind the first."""
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 10 GB of memory")
    (q, k, *rest), grad_out = target.given(2, 1, (3, 5), 16, torch.float16)
    memory = torch.empty(2**31 + 4096, dtype=torch.float16, device="cuda")
    spread = [memory.as_strided(q.shape, (2**31 + 1024, 240, 16, 1), offset) for offset in (0, 512)]
    far = [view.copy_(t) for view, t in zip(spread, (q, k), strict=True)]
    assert_same_bits(target.run([*far, *rest], grad_out, (3, 5)), target.run([q, k, *rest], grad_out, (3, 5)))
