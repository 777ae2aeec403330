"""Differentiation: for any subset of inputs; once by every backend, in every way by eager."""

import dataclasses
import functools
import itertools

import pytest
import torch
from models import randomized
from reference import inputs, literal, with_gradients
from torch import nn
from torch.autograd import forward_ad

from gpsa_kernels import BACKENDS, ConViT, FusedGPSA, SelfAttention, gpsa_attention
from gpsa_kernels.backends.base import Forward, Gradients
from gpsa_kernels.demo import saved_for_backward


@pytest.fixture(params=["kernels", "composed"])
def _sdpa(request, monkeypatch):
    """The backend sdpa as it runs on the CPU, and as it runs elsewhere."""
    if request.param == "composed":
        monkeypatch.setitem(BACKENDS, "sdpa", dataclasses.replace(BACKENDS["sdpa"], kernel_devices=frozenset()))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("trained", itertools.product((False, True), repeat=5))
def test_any_subset_may_be_frozen(backend, trained):
    tensors, grad_out = inputs(2, 2, (2, 3), 4), torch.randn(2, 2, 6, 4, dtype=torch.float64)
    result, *gradients = with_gradients(gpsa_attention, tensors, grad_out, (2, 3), backend=backend)
    leaves = [t.detach().requires_grad_(train) for t, train in zip(tensors, trained, strict=True)]
    out = gpsa_attention(*leaves, (2, 3), backend=backend)
    assert out.requires_grad == any(trained)
    torch.testing.assert_close(out.detach(), result)
    if any(trained):
        out.backward(grad_out)
    for leaf, gradient, train in zip(leaves, gradients, trained, strict=True):
        torch.testing.assert_close(leaf.grad, gradient if train else None)


def test_saved_for_backward_is_far_less_than_eager_keeps():
    """What sdpa keeps grows with N; what eager keeps grows with N^2."""
    *qkv, pos_weight, gate = inputs(1, 2, (24, 24), 48, torch.float32)
    parameters = nn.ParameterList([pos_weight, gate])
    call = functools.partial(gpsa_attention, *qkv, *parameters, (24, 24))
    sdpa, eager = (saved_for_backward(parameters, functools.partial(call, backend=name)) for name in ("sdpa", "eager"))
    assert sdpa == 4 * (4 * 2 * 576 * 48 + 2 * 576)  # q, k, v, the content branch's output; logsumexp
    assert eager > 8 * sdpa


REFUSED = 'fused attention has first derivatives only.*backend="eager" has all derivatives'


def _attention(backend):
    """The operator as a function of its five tensors."""
    return lambda *tensors: gpsa_attention(*tensors, (2, 3), backend=backend), inputs(1, 2, (2, 3), 4)


def _gate_alone(backend):
    *rest, gate = inputs(1, 2, (2, 3), 4)
    return lambda gate: gpsa_attention(*(t.detach() for t in rest), gate, (2, 3), backend=backend), [gate]


def _layer(kind):
    def build(backend):
        torch.manual_seed(0)
        return randomized(kind(8, 2, backend=backend)), [torch.randn(2, 4, 8, dtype=torch.float64)]

    return build


def _model(backend):
    torch.manual_seed(0)
    sizes = {"embed_dim": 8, "num_heads": 2, "depth": 3, "local_up_to_layer": 2, "image_size": 8, "patch_size": 4}
    model = randomized(ConViT(num_classes=3, backend=backend, **sizes)).eval()
    return model, [torch.randn(1, 3, 8, 8, dtype=torch.float64)]


CALLS = {"operator": _attention, "gate alone": _gate_alone, "ConViT": _model}
CALLS |= {kind.__name__: _layer(kind) for kind in (FusedGPSA, SelfAttention)}
calls = pytest.mark.parametrize("build", CALLS.values(), ids=CALLS)


@calls
def test_eager_has_all_derivatives(build):
    function, tensors = build("eager")
    tensors = [t.detach().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, check_fwd_over_rev=True, fast_mode=True)


def _dual_numbers(function, tensors):
    with forward_ad.dual_level():
        out = function(*(forward_ad.make_dual(t, t.cos().detach()) for t in tensors))
        return forward_ad.unpack_dual(out).tangent


def _jvp(function, tensors):
    return torch.func.jvp(function, tuple(tensors), tuple(t.cos() for t in tensors))[1]


def _gradient_of_first(function):
    return torch.func.grad(lambda first, *rest: function(first, *rest).square().sum())


WAYS = {
    "dual numbers": _dual_numbers,
    "jvp": _jvp,
    "jacfwd": lambda function, tensors: torch.func.jacfwd(function)(*tensors),
    "jacrev": lambda function, tensors: torch.func.jacrev(function)(*tensors),
    "grad": lambda function, tensors: _gradient_of_first(function)(*tensors),
    "vmap of grad": lambda function, tensors: torch.vmap(_gradient_of_first(function))(*(t[None] for t in tensors)),
    "vmap of jvp": lambda function, tensors: torch.vmap(lambda *t: _jvp(function, t))(*(t[None] for t in tensors)),
    "jvp of vmap": lambda function, tensors: _jvp(torch.vmap(function), [t[None] for t in tensors]),
    "jvp of grad": lambda function, tensors: _jvp(_gradient_of_first(function), tensors),
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@pytest.mark.usefixtures("_sdpa")
@pytest.mark.parametrize("requires_grad", [False, True])
@ways
@calls
def test_transforms_are_right_or_refused(build, way, requires_grad):
    """Right where the backend is chosen for the call, refused where it was asked for by name and is another."""
    results = {}
    for backend in ("eager", "auto", "sdpa"):
        function, tensors = build(backend)
        tensors = [t.detach().requires_grad_(requires_grad) for t in tensors]
        if isinstance(function, nn.Module):
            function.requires_grad_(requires_grad)
        if backend == "sdpa":
            with pytest.raises(RuntimeError, match=REFUSED):
                way(function, tensors)
        else:
            results[backend] = way(function, tensors)
    assert results["eager"].abs().max() > 0
    torch.testing.assert_close(results["auto"], results["eager"])


@ways
def test_the_operator_refuses_transforms(way):
    def operator(*tensors):
        return torch.ops.gpsa.attention_forward(*tensors, None, 2, 3, 0.5, 0.0, "sdpa")[0]

    with pytest.raises(RuntimeError, match=REFUSED):
        way(operator, [t.detach() for t in inputs(1, 2, (2, 3), 4)])


@pytest.mark.usefixtures("_sdpa")
@pytest.mark.parametrize("backend", ["eager", "auto", "sdpa"])
@calls
def test_vmap(build, backend):
    function, tensors = build(backend)
    expected = function(*tensors)
    out = torch.vmap(function)(*(torch.stack((t, t)) for t in tensors))
    torch.testing.assert_close(out, torch.stack((expected, expected)))


@pytest.mark.usefixtures("_no_vmap_fallback")
@pytest.mark.parametrize("build", [_attention, _gate_alone, _layer(FusedGPSA)])
def test_vmap_of_the_operators_does_without_torchs_slow_fallback(build):
    function, tensors = build("sdpa")
    stacked = [torch.stack((t, t.sin())).detach().requires_grad_() for t in tensors]
    out = torch.vmap(function)(*stacked)
    torch.testing.assert_close(list(out), [function(*(t[i] for t in stacked)) for i in (0, 1)])
    tensors = [t.detach().requires_grad_() for t in tensors]
    out, directions = function(*tensors), torch.randn(3, *out[0].shape, dtype=out.dtype)
    batched = torch.autograd.grad(out, tensors, directions, is_grads_batched=True, retain_graph=True)
    for index, direction in enumerate(directions):
        expected = torch.autograd.grad(out, tensors, direction, retain_graph=True)
        torch.testing.assert_close([t[index] for t in batched], list(expected))


@pytest.mark.parametrize("kind", [FusedGPSA, SelfAttention])
def test_per_sample_gradients(kind):
    layer, (x,) = _layer(kind)("auto")
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, x[None]).square().sum()

    gradients = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for index, sample in enumerate(x):
        expected = torch.autograd.grad(layer(sample[None]).square().sum(), tuple(layer.parameters()))
        torch.testing.assert_close([gradients[name][index] for name in parameters], list(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["eager", "auto", "sdpa"])
def test_compiled_forward_mode(dtype, backend):
    torch._dynamo.reset()
    function, tensors = _attention(backend)
    compiled = torch.compile(lambda *t: _jvp(function, t), backend="aot_eager", fullgraph=backend != "sdpa")
    expected = _jvp(lambda *t: literal(*t, (2, 3), 0.5), tensors)
    tensors = [t.detach().to(dtype) for t in tensors]
    if backend == "sdpa":
        with pytest.raises(RuntimeError, match=f"(?s){REFUSED}"):
            compiled(*tensors)
    else:
        torch.testing.assert_close(compiled(*tensors), expected.to(dtype))


def test_a_compiled_call_notices_forward_mode():
    torch._dynamo.reset()
    function, tensors = _attention("auto")
    tensors = [t.detach() for t in tensors]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), function(*tensors))
    torch.testing.assert_close(_dual_numbers(compiled, tensors), _dual_numbers(function, tensors))


@pytest.mark.usefixtures("_sdpa")
@calls
def test_second_derivatives_are_refused(build):
    """With respect to the inputs, and to what comes after and is reached through the gradient of the output alone."""
    function, tensors = build("sdpa")
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = function(*tensors)
    later = torch.ones_like(out).requires_grad_()
    for gradient in torch.autograd.grad((later * out).sum(), tensors, create_graph=True):
        penalty = gradient.square().sum()
        for wanted in ([later], tensors):
            with pytest.raises(RuntimeError, match=REFUSED):
                torch.autograd.grad(penalty, wanted, retain_graph=True, allow_unused=True)
            with pytest.raises(RuntimeError, match=REFUSED):
                (out.sum() + penalty).backward(inputs=wanted, retain_graph=True)
        with pytest.raises(RuntimeError, match=REFUSED):
            (out.sum() + penalty).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.functional.jvp(function, tuple(tensors), tuple(tensors))


def test_second_derivatives_of_a_backend_that_saves_no_content_are_refused(monkeypatch):
    kernels = dataclasses.replace(
        BACKENDS["sdpa"],
        forward=lambda call, save: Forward(call.q.clone(), None, call.q[..., 0].clone()),
        backward=lambda grad_out, call, saved: Gradients(*(torch.zeros_like(t) for t in call[:5])),
    )
    monkeypatch.setitem(BACKENDS, "sdpa", kernels)
    function, tensors = _attention("sdpa")
    (gradient,) = torch.autograd.grad(function(*tensors).sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        gradient.sum().backward()


def test_a_tangent_that_comes_with_the_gradient_of_the_output_is_refused():
    function, tensors = _attention("sdpa")
    out = function(*tensors)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(out, tensors, forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out)))
