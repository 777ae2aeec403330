"""gpsa_attention as a torch function: compiled, exported, under autocast, behind its registered operator."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from reference import assert_as_exact_as_eager, inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import BaseTorchDispatchMode

from gpsa_kernels import BACKENDS, FusedGPSA, gpsa_attention
from gpsa_kernels.backends.base import Forward

backends = pytest.mark.parametrize("backend", ["eager", "sdpa"])
kernels = pytest.mark.parametrize("backend", [name for name, b in BACKENDS.items() if "cpu" in b.kernel_devices])
SETTINGS = (3, 4, 0.3, 0.0)


def detached(dtype=torch.float32):
    return [t.detach() for t in inputs(2, 2, (3, 4), 8, dtype)]


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck(backend, dtype, requires_grad):
    tensors = [t.requires_grad_(requires_grad) for t in detached(dtype)]
    torch.library.opcheck(torch.ops.gpsa.attention_forward.default, (*tensors, None, *SETTINGS, backend))
    tensors = detached(dtype)
    out, *saved = torch.ops.gpsa.attention_forward(*tensors, None, *SETTINGS, backend, True)
    arguments = (out, *tensors, None, *SETTINGS, *saved, backend)
    torch.library.opcheck(torch.ops.gpsa.attention_backward.default, arguments)


@kernels
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_fake_tensors_have_the_real_strides(backend, save, packed):
    """opcheck compares shapes; compiled code relies on strides, too."""
    tensors = [*detached(), None]
    if packed:
        tensors[:3] = torch.randn(2, 12, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind()
    with FakeTensorMode() as mode:
        fakes = [t if t is None else mode.from_tensor(t) for t in tensors]
    both = []
    for arguments in (tensors, fakes):
        out, *saved = torch.ops.gpsa.attention_forward(*arguments, *SETTINGS, backend, save)
        assert all(bool(t.numel()) == save for t in saved)
        grads = torch.ops.gpsa.attention_backward(out, *arguments, *SETTINGS, *saved, backend) if save else ()
        both.append([(t.shape, t.stride(), t.dtype) for t in (out, *saved, *grads)])
    assert both[0] == both[1]


@kernels
def test_operator_is_differentiable_and_casts_by_itself(backend):
    tensors = inputs(2, 2, (3, 4), 8, torch.float32)
    out = torch.ops.gpsa.attention_forward(*tensors, None, *SETTINGS, backend)[0]
    expected = gpsa_attention(*tensors, (3, 4), scale=0.3, backend=backend)
    assert torch.equal(out, expected)
    assert all(map(torch.equal, *(torch.autograd.grad(t.square().sum(), tensors) for t in (out, expected))))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = torch.ops.gpsa.attention_forward(*tensors, None, *SETTINGS, backend)[0]
    assert low.dtype == torch.bfloat16


class Subclass(torch.Tensor):
    """Sees every operator on it, as DTensor does."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        with torch._C._DisableTorchDispatch():
            return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("mode", "kind", "observed"),
    [
        (nullcontext, torch.Tensor, 0),
        (partial(torch.autocast, "cpu", torch.bfloat16), torch.Tensor, 0),
        (BaseTorchDispatchMode, torch.Tensor, 2),
        (BaseTorchFunctionMode, torch.Tensor, 1),  # autograd's engine is below it
        (nullcontext, Subclass, 2),
    ],
)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_the_operator_is_dispatched_where_something_looks_on(mode, kind, observed, requires_grad):
    tensors = [t.detach().as_subclass(kind).requires_grad_(requires_grad) for t in inputs(2, 2, (3, 4), 8)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, mode():
        out = gpsa_attention(*tensors, (3, 4), backend="sdpa").mul_(2)  # it is no view
        if requires_grad:
            torch.autograd.grad(out.sum(), tensors)
    seen = {event.name for event in profile.events()} & {"gpsa::attention_forward", "gpsa::attention_backward"}
    assert len(seen) == min(observed, 1 + requires_grad)


def test_what_traces_by_running_meets_the_operator():
    tensors = tuple(t.detach() for t in inputs(2, 2, (3, 4), 8, torch.float32))

    def run(*tensors):
        return gpsa_attention(*tensors, (3, 4), backend="sdpa")

    assert "gpsa.attention_forward" in make_fx(run)(*tensors).code
    assert "gpsa::attention_forward" in str(torch.jit.trace(run, tensors, check_trace=False).graph)


def test_kernels_are_given_no_lazy_negative(monkeypatch):
    given = []

    def forward(call, save):
        given.append(call.q)
        return Forward(call.q.clone(), None, None)

    monkeypatch.setitem(BACKENDS, "sdpa", dataclasses.replace(BACKENDS["sdpa"], forward=forward))
    q, *rest = (t.detach() for t in inputs(2, 2, (3, 4), 8))
    gpsa_attention(torch._neg_view(q), *rest, (3, 4), backend="sdpa")
    assert not given[0].is_neg()
    assert torch.equal(given[0], -q)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("eager", torch.float32), ("sdpa", torch.float32), ("sdpa", torch.float64)], ids=str
)
def test_compile_gives_the_same_numbers(backend, dtype):
    torch._dynamo.reset()
    compiled = torch.compile(gpsa_attention, fullgraph=True)
    assert_as_exact_as_eager(compiled, inputs(2, 2, (3, 4), 8, dtype), (3, 4), backend=backend)


@backends
def test_a_second_batch_size_does_not_recompile(backend):
    torch._dynamo.reset()
    compiled = torch.compile(gpsa_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3, 5):
        tensors = inputs(batch, 4, (3, 7), 8, torch.float32)  # no two sizes alike, which would make a guard
        with torch._dynamo.config.patch(error_on_recompile=batch != 2):
            assert_as_exact_as_eager(compiled, tensors, (3, 7), backend=backend)


def test_compiled_dropout_is_seeded():
    torch._dynamo.reset()
    compiled, outs = torch.compile(gpsa_attention, fullgraph=True), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(compiled(*detached(), (3, 4), dropout_p=0.5))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@backends
@pytest.mark.parametrize("strict", [True, False])
def test_export(backend, strict):
    layer = FusedGPSA(16, 2, grid_size=(3, 4), backend=backend).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (torch.randn(2, 12, 16),), dynamic_shapes={"x": {0: batch}}, strict=strict)
    x = torch.randn(5, 12, 16)
    torch.testing.assert_close(program.module()(x), layer(x))


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_does_what_it_does_to_sdpa(backend, dtype):
    q, k, v, *parameters = tensors = inputs(2, 2, (3, 4), 8, torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        out = gpsa_attention(*tensors, (3, 4), backend=backend)
        mixed = gpsa_attention(q.to(dtype), k, v, *parameters, (3, 4), backend=backend)
        peer = F.scaled_dot_product_attention(q, k, v)
    assert out.dtype == mixed.dtype == peer.dtype == dtype
    expected = gpsa_attention(q.to(dtype), k.to(dtype), v.to(dtype), *parameters, (3, 4), backend=backend)
    assert torch.equal(out, expected)
    assert torch.equal(mixed, expected)
    for grad in torch.autograd.grad(out.float().sum(), tensors):
        assert grad.dtype == torch.float32
        assert grad.isfinite().all()


@backends
@pytest.mark.parametrize(
    "context", [torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)], ids=["inference", "autocast"]
)
def test_inference_mode_and_autocast_change_nothing_in_float64(backend, context):
    tensors = detached(torch.float64)
    expected = gpsa_attention(*tensors, (3, 4), backend=backend)
    with context:
        assert torch.equal(gpsa_attention(*tensors, (3, 4), backend=backend), expected)
