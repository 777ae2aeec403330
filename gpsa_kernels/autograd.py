"""The operator contract of the kernels: ``torch.ops.gpsa.attention_forward`` and ``attention_backward``.

The schemas, fake tensors, autograd and autocast rules are here, once, for every backend that brings kernels; the
backend is an argument of the operator, so a new one registers nothing. Both operators are pure functions of their
arguments: the dropout seed is an input, drawn outside, so nothing hides from torch.compile, activation checkpointing
or CUDA-graph capture.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.amp.autocast_mode import is_autocast_available
from torch.autograd import forward_ad

from gpsa_kernels.backends import BACKENDS
from gpsa_kernels.backends.base import empty_output
from gpsa_kernels.positional import accumulation_dtype

_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor pos_weight, Tensor gate, Tensor? seed"
_SETTINGS = "SymInt rows, SymInt columns, float scale, float dropout_p, str backend"

_library = torch.library.Library("gpsa", "DEF")
_library.define(
    f"attention_forward({_TENSORS}, {_SETTINGS}, bool save=False) -> (Tensor out, Tensor content, Tensor logsumexp)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"attention_backward(Tensor grad_out, {_TENSORS}, Tensor content, Tensor logsumexp, {_SETTINGS}) "
    "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_pos_weight, Tensor grad_gate)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check_dropout(
    q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, grid_size: tuple[int, int], dropout_p: float, backend: str
) -> None:
    """Raises where a kernel would drop nothing in silence."""
    if dropout_p == 0:
        if seed is not None:
            raise ValueError("seed must be None for dropout_p = 0, got a tensor")
        return
    if seed is None:
        raise ValueError(f"seed must be a tensor for dropout_p > 0, got None and dropout_p={dropout_p}")
    reason = BACKENDS[backend].unsupported(q, k, v, grid_size, dropout_p)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run this call: {reason}")


# ---- kernels -------------------------------------------------------------------------------------------------------


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    seed: Tensor | None,
    rows: int,
    columns: int,
    scale: float,
    dropout_p: float,
    backend: str,
    save: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_dropout(q, k, v, seed, (rows, columns), dropout_p, backend)
    kernel = BACKENDS[backend].forward
    assert kernel is not None, f"backend {backend!r} has no kernels"
    return kernel(q, k, v, pos_weight, gate, seed, (rows, columns), scale, dropout_p, save)


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    seed: Tensor | None,
    content: Tensor,
    logsumexp: Tensor,
    rows: int,
    columns: int,
    scale: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_dropout(q, k, v, seed, (rows, columns), dropout_p, backend)
    kernel = BACKENDS[backend].backward
    assert kernel is not None, f"backend {backend!r} has no kernels"
    return kernel(
        grad_out,
        q,
        k,
        v,
        pos_weight,
        gate,
        seed,
        content,
        logsumexp,
        (rows, columns),
        scale,
        dropout_p,
    )


# ---- fake tensors --------------------------------------------------------------------------------------------------


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    seed: Tensor | None,
    rows: int,
    columns: int,
    scale: float,
    dropout_p: float,
    backend: str,
    save: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_dropout(q, k, v, seed, (rows, columns), dropout_p, backend)
    dtype = accumulation_dtype(q.dtype)
    saves_content = save and BACKENDS[backend].saves_content(q, (rows, columns), dropout_p)
    content = empty_output(q) if saves_content else q.new_empty(0)
    logsumexp = q.new_empty(q.shape[:3] if save else (0,), dtype=dtype)
    return empty_output(q), content, logsumexp


def _backward_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    seed: Tensor | None,
    content: Tensor,
    logsumexp: Tensor,
    rows: int,
    columns: int,
    scale: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_dropout(q, k, v, seed, (rows, columns), dropout_p, backend)
    grads = (empty_output(q), empty_output(q), empty_output(q))
    return *grads, pos_weight.new_empty(pos_weight.shape), gate.new_empty(gate.shape)


# ---- autograd ------------------------------------------------------------------------------------------------------


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work: cheap, as every call asks."""
    return forward_ad._current_level >= 0 or _are_functorch_transforms_active()


def _differentiated_by_transform() -> bool:
    stack = torch._C._functorch.get_interpreter_stack() or ()
    kinds = torch._C._functorch.TransformType
    return forward_ad._current_level >= 0 or any(level.key() in (kinds.Grad, kinds.Jvp) for level in stack)


# The compiler cannot trace the question, and it enters a transform itself while it traces what is inside.
_differentiated_by_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _refusal(what: str) -> RuntimeError:
    return RuntimeError(
        f'fused attention has first derivatives only, by backward(): {what}. backend="eager" has all derivatives'
    )


def _check_transforms(*tensors: Tensor) -> None:
    """Raises in an autograd kernel, inside a transform, where its derivative would be lost in silence."""
    if any(forward_ad.unpack_dual(t, level=0).tangent is not None for t in tensors):
        raise _refusal("it is differentiated in forward mode")
    if _are_functorch_transforms_active() and any(t.requires_grad for t in tensors):
        raise _refusal("it is differentiated by torch.func")


class _NoSecondDerivative(torch.autograd.Function):
    """The identity on gradients, whose own backward raises instead of leaving a term out in silence.

    What they were computed from goes in, too: a second derivative with respect to any of it then comes by here.
    """

    @staticmethod
    def forward(ctx: Any, inputs: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if grad is None else grad.view_as(grad) for grad in tensors[inputs:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise _refusal("its gradients were computed with create_graph=True and are being differentiated again")


def _first_order(inputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Marks ``grads`` as not differentiable where a graph of the backward pass is being built."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grads
    return _NoSecondDerivative.apply(len(inputs), *inputs, *grads)


class _FirstOrder(torch.autograd.Function):
    """The identity on the inputs of a composed backend, whose gradients then cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _first_order((), grads)


def first_order(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``tensors``, with a clear error where what is composed of them is differentiated in another way than once.

    A no-op where nothing records a graph, inside vmap, and under torch.compile, which refuses second derivatives by
    itself.
    """
    if transformed() and _differentiated_by_transform():
        raise _refusal("it is differentiated by torch.func or in forward mode")
    if torch.compiler.is_compiling() or transformed():
        return tensors
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return tensors
    return _FirstOrder.apply(*tensors)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pos_weight: Tensor,
        gate: Tensor,
        seed: Tensor | None,
        *settings: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, content, logsumexp = torch.ops.gpsa.attention_forward(q, k, v, pos_weight, gate, seed, *settings, True)
        ctx.settings = settings
        ctx.save_for_backward(q, k, v, pos_weight, gate, seed, content, logsumexp)
        ctx.mark_non_differentiable(content, logsumexp)
        ctx.set_materialize_grads(False)
        return out, content, logsumexp

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        frozen = (None,) * (1 + len(ctx.settings))
        if grad_out is None:
            return (None,) * 5 + frozen
        grads = torch.ops.gpsa.attention_backward(grad_out, *ctx.saved_tensors, *ctx.settings)
        return tuple(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=False)) + frozen


def _forward_autograd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    seed: Tensor | None,
    rows: int,
    columns: int,
    scale: float,
    dropout_p: float,
    backend: str,
    save: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    settings = (rows, columns, scale, dropout_p, backend)
    if transformed():
        _check_transforms(q, k, v, pos_weight, gate)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, pos_weight, gate)):
        return _Attention.apply(q, k, v, pos_weight, gate, seed, *settings)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.gpsa.attention_forward(q, k, v, pos_weight, gate, seed, *settings, save)


def _backward_autograd(grad_out: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    inputs = (grad_out, *rest[:5])
    if transformed():
        _check_transforms(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        grads = torch.ops.gpsa.attention_backward(grad_out, *rest)
    return _first_order(inputs, grads)


# ---- autocast ------------------------------------------------------------------------------------------------------


def _knows_autocast(device: str) -> bool:
    return is_autocast_available(device)


_knows_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined] # the compiler cannot trace the question


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast casts to on a type of device; None where it is off or, as on meta, not known."""
    if _knows_autocast(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Switches autocast off for what is inside."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device, enabled=False)


def autocast_inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in the autocast dtype of their device, by SDPA's rule: float64 stays as it is."""
    dtype = autocast_dtype(q.device.type)
    if dtype is None:
        return q, k, v
    q, k, v = (t if t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v))
    return q, k, v


_AUTOCAST_KEYS = {
    "AutocastCPU": torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU),
    "AutocastCUDA": torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA),
}


def _forward_autocast(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = autocast_inputs(q, k, v)
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS["AutocastCPU"] | _AUTOCAST_KEYS["AutocastCUDA"]):
        return torch.ops.gpsa.attention_forward(q, k, v, *rest)


for _key in ("CPU", "CUDA"):
    _library.impl("attention_forward", _forward, _key)
    _library.impl("attention_backward", _backward, _key)
for _key in _AUTOCAST_KEYS:
    _library.impl("attention_forward", _forward_autocast, _key)
_library.impl("attention_forward", _forward_autograd, "Autograd")
_library.impl("attention_backward", _backward_autograd, "Autograd")
torch.library.register_fake("gpsa::attention_forward", _forward_fake, lib=_library)
torch.library.register_fake("gpsa::attention_backward", _backward_fake, lib=_library)
