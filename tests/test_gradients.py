"""Differentiation: exact in float64, for any subset of inputs, once."""

from __future__ import annotations

import itertools

import pytest
import torch
from reference import NAMES, inputs, with_gradients

from gpsa_kernels import gpsa_attention

backends = pytest.mark.parametrize("backend", ["eager", "sdpa"])


@backends
@pytest.mark.parametrize("grid_size", [(1, 1), (2, 3), (3, 2), (1, 5)])
def test_gradcheck(backend, grid_size):
    tensors = inputs(2, 2, grid_size, 3)
    assert torch.autograd.gradcheck(lambda *t: gpsa_attention(*t, grid_size, backend=backend), tensors)


def test_closed_form_matches_autograd_of_the_composition():
    """The gradients that sdpa writes down by hand, against autograd's of the same computation."""
    from gpsa_kernels.backends import BACKENDS

    sdpa = BACKENDS["sdpa"]
    tensors = inputs(3, 2, (4, 5), 8)
    grad_out = torch.randn(3, 2, 20, 8, dtype=torch.float64)
    by_hand = with_gradients(gpsa_attention, tensors, grad_out, (4, 5), scale=0.3, backend="sdpa")
    composed = with_gradients(sdpa.compose, tensors, grad_out, (4, 5), 0.3, 0.0)
    for a, b in zip(by_hand, composed, strict=True):
        torch.testing.assert_close(a, b)


@backends
def test_any_subset_may_be_frozen(backend):
    tensors = inputs(2, 2, (2, 3), 4)
    grad_out = torch.randn(2, 2, 6, 4, dtype=torch.float64)
    expected = dict(zip(NAMES, with_gradients(gpsa_attention, tensors, grad_out, (2, 3), backend=backend), strict=True))
    for trained in itertools.product((False, True), repeat=5):
        leaves = [t.detach().requires_grad_(train) for t, train in zip(tensors, trained, strict=True)]
        out = gpsa_attention(*leaves, (2, 3), backend=backend)
        assert out.requires_grad == any(trained)
        torch.testing.assert_close(out.detach(), expected["out"])
        if any(trained):
            out.backward(grad_out)
        for name, leaf, train in zip(NAMES[1:], leaves, trained, strict=True):
            if train:
                torch.testing.assert_close(leaf.grad, expected[name])
            else:
                assert leaf.grad is None


@backends
def test_second_derivatives_raise(backend):
    tensors = inputs(1, 2, (2, 3), 4)
    out = gpsa_attention(*tensors, (2, 3), backend=backend)
    for grad in torch.autograd.grad(out.sum(), tensors, create_graph=True):
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(grad.sum(), tensors, allow_unused=True, retain_graph=True)


@backends
def test_a_gradient_penalty_raises_instead_of_being_left_out(backend):
    tensors = inputs(1, 2, (2, 3), 4)
    out = gpsa_attention(*tensors, (2, 3), backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        (out.square().sum() + grad.square().sum()).backward()


@backends
def test_backward_twice_with_a_retained_graph(backend):
    tensors = inputs(1, 2, (2, 3), 4)
    out = gpsa_attention(*tensors, (2, 3), backend=backend)
    first = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(out.sum(), tensors), strict=True):
        assert torch.equal(a, b)


@backends
def test_inputs_are_left_alone(backend):
    tensors = inputs(2, 2, (2, 3), 4)
    grad_out = torch.randn(2, 2, 6, 4, dtype=torch.float64)
    copies = [t.detach().clone() for t in (*tensors, grad_out)]
    gpsa_attention(*tensors, (2, 3), backend=backend).backward(grad_out)
    with torch.no_grad():
        gpsa_attention(*tensors, (2, 3), backend=backend)
    for before, after in zip(copies, (*tensors, grad_out), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@backends
def test_parameters_of_another_dtype_keep_theirs(backend, dtype):
    """As under autocast: float32 gates beside 16-bit activations."""
    q, k, v, *parameters = inputs(1, 2, (2, 3), 4, dtype)
    parameters = [t.detach().float().requires_grad_() for t in parameters]
    out = gpsa_attention(q, k, v, *parameters, (2, 3), backend=backend)
    assert out.dtype == dtype
    assert [g.dtype for g in torch.autograd.grad(out.sum(), parameters)] == [torch.float32] * 2


@backends
def test_saved_for_backward_is_far_less_than_eager_keeps(backend):
    """What sdpa keeps grows with N; what eager keeps grows with N^2."""
    tensors = inputs(1, 2, (24, 24), 48, torch.float32)
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        gpsa_attention(*tensors, (24, 24), backend=backend)
    one = tensors[0].numel() * 4
    small = 2 * 576 * 4 + sum(t.numel() * 4 for t in tensors[3:])  # logsumexp, pos_weight, gate
    if backend == "sdpa":
        assert sum(saved.values()) == 4 * one + small  # q, k, v and the content branch's output
    else:
        assert sum(saved.values()) > 8 * (4 * one + small)
