"""The operator contract of the kernels: ``torch.ops.gpsa.attention_forward`` and ``attention_backward``.

Schemas, fake tensors, vmap, autograd and autocast are here, once, for every backend that brings kernels; its name is an
argument, so a new one registers nothing. The schemas are flat: the fields of a :class:`Call` in their order, what else
a pass takes, and the name. Both operators are pure functions of their arguments: the dropout seed is drawn outside, so
nothing hides from torch.compile, activation checkpointing or CUDA-graph capture.

A trip through the dispatcher, once for each rule in Python, costs more than a small kernel. :func:`attention` takes it
only where something but the kernels would see the operator, and else does the same without.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake, register_vmap

from gpsa_kernels.arguments import check_tensors
from gpsa_kernels.backends import BACKENDS, Backend, Call
from gpsa_kernels.backends.base import Forward, Gradients, Saved
from gpsa_kernels.derivatives import check_transforms, first_order_gradients, transformed
from gpsa_kernels.sharding import are_distributed, on_shards
from gpsa_kernels.tensors import accumulation_dtype, as_output, autocast_dtype, autocast_inputs, empty_output

_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor pos_weight, Tensor gate, Tensor? seed, "
    "SymInt rows, SymInt columns, float scale, float dropout_p"
)
_FIELDS = len(Call._fields)
_DIFFERENTIABLE = 5  # of them: q, k, v, pos_weight, gate

_library = torch.library.Library("gpsa", "DEF")
_library.define(
    f"attention_forward({_CALL}, str backend, bool save=False) -> (Tensor out, Tensor content, Tensor logsumexp)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"attention_backward(Tensor grad_out, {_CALL}, Tensor content, Tensor logsumexp, str backend) "
    "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_pos_weight, Tensor grad_gate)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


_FORWARD, _BACKWARD = torch.ops.gpsa.attention_forward, torch.ops.gpsa.attention_backward


def _forward_arguments(*arguments: Any) -> tuple[Call, str, bool]:
    backend, *save = arguments[_FIELDS:]  # torch leaves out a last False
    return Call(*arguments[:_FIELDS]), backend, save == [True]


def _check(call: Call, backend: str) -> None:
    """Raises where a kernel would read what is not there, or drop nothing in silence."""
    check_tensors(call.q, call.k, call.v, call.pos_weight, call.gate)
    if call.rows < 1 or call.rows * call.columns != call.q.shape[2]:
        raise ValueError(f"rows * columns must be {call.q.shape[2]}, the tokens, got {call.rows} * {call.columns}")
    if backend not in BACKENDS or BACKENDS[backend].forward is None:
        kernels = [name for name in BACKENDS if BACKENDS[name].forward is not None]
        raise ValueError(f"backend must be one with kernels, {', '.join(map(repr, kernels))}, got {backend!r}")
    if (call.seed is not None) != call.has_dropout:
        given = "None" if call.seed is None else "a tensor"
        raise ValueError(f"seed must be a tensor if and only if dropout_p > 0, got {given} for {call.dropout_p}")
    if call.has_dropout and (reason := BACKENDS[backend].unsupported(call)) is not None:
        raise RuntimeError(f"backend {backend!r} cannot run this call: {reason}")


def _checked_backward(grad_out: Tensor, *arguments: Any) -> tuple[Call, Tensor, Tensor, str]:
    """The arguments of the backward pass, which raise as those of the forward pass do."""
    call, content, logsumexp, backend = Call(*arguments[:_FIELDS]), *arguments[_FIELDS:]
    _check(call, backend)
    for name, t, dims in (("grad_out", grad_out, 4), ("content", content, 4), ("logsumexp", logsumexp, 3)):
        expected = tuple(call.q.shape[:dims])
        if t.shape != expected and not (name == "content" and t.numel() == 0):
            raise ValueError(f"{name} must have shape {expected}, got {tuple(t.shape)}")
    return call, content, logsumexp, backend


# ---- kernels and fake tensors --------------------------------------------------------------------------------------


def _run_forward(*arguments: Any) -> Forward:
    call, backend, save = _forward_arguments(*arguments)
    kernel = BACKENDS[backend].forward
    assert kernel is not None
    return kernel(call, save)


def _run_backward(grad_out: Tensor, *arguments: Any) -> Gradients:
    call, *saved, backend = Call(*arguments[:_FIELDS]), *arguments[_FIELDS:]
    kernel = BACKENDS[backend].backward
    assert kernel is not None
    return kernel(grad_out, call, Saved(*saved))


def _empty_forward(*arguments: Any) -> Forward:
    call, backend, save = _forward_arguments(*arguments)
    return Forward.empty(call.q, save, save and BACKENDS[backend].saves_content(call))


def _forward(run: Callable[..., Forward], *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``run``, checked, with tensors for what is not saved, as the schema has it."""
    call, backend, _ = _forward_arguments(*arguments)
    _check(call, backend)
    out, content, logsumexp = run(*arguments)
    content = call.q.new_empty(0) if content is None else content
    logsumexp = call.q.new_empty(0, dtype=accumulation_dtype(call.q.dtype)) if logsumexp is None else logsumexp
    return out, content, logsumexp


def _backward(*arguments: Any) -> Gradients:
    """In tensors that share no memory, as an operator's results must."""
    call, content, logsumexp, backend = _checked_backward(*arguments)
    # as the forward kernel has laid them out, whatever happened to them since
    saved = as_output(content) if content.dim() == 4 else content, logsumexp.contiguous()
    grads = _run_backward(arguments[0], *call, *saved, backend)
    return grads._replace(gate=grads.gate.clone())


def _backward_fake(*arguments: Any) -> Gradients:
    call, *_ = _checked_backward(*arguments)
    q, pos_weight, gate = call.q, call.pos_weight, call.gate
    grads = empty_output(q), empty_output(q), empty_output(q)
    return Gradients(*grads, pos_weight.new_empty(pos_weight.shape), gate.new_empty(gate.shape))


# ---- vmap ----------------------------------------------------------------------------------------------------------


def _is_left_out(t: Tensor) -> bool:
    return t.dim() == 1 and t.numel() == 0


def _vmap(operator: Any, seed: int, info: Any, dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    """Calls in a batch as one with more heads; one by one where ``arguments[seed]`` makes a mask for a call's heads."""
    count = info.batch_size
    if arguments[seed] is not None:
        calls = [[a if d is None else a.select(d, i) for a, d in zip(arguments, dims)] for i in range(count)]  # noqa: B905
        results = [torch.stack(tensors) for tensors in zip(*(operator(*call) for call in calls), strict=True)]
        return tuple(results), (0,) * len(results)

    def more_heads(t: Any, dim: int | None) -> Any:
        if not isinstance(t, Tensor) or _is_left_out(t):
            return t
        t = t.expand(count, *t.shape) if dim is None else t.movedim(dim, 0)
        heads = 1 if t.dim() > 3 else 0
        return t.movedim(0, heads).flatten(heads, heads + 1)

    def fewer_heads(t: Tensor) -> tuple[Tensor, int | None]:
        if _is_left_out(t):
            return t, None
        heads = 1 if t.dim() > 2 else 0
        return t.unflatten(heads, (count, -1)), heads

    tensors, out_dims = zip(*map(fewer_heads, operator(*map(more_heads, arguments, dims))), strict=True)
    return tensors, out_dims


# ---- autograd ------------------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., Any], constants: tuple[Any, ...], *inputs: Tensor
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """``run`` is the operator, or what it would run; ``constants`` are the arguments after ``inputs``."""
        with torch._C._AutoDispatchBelowAutograd():
            out, content, logsumexp = run(*inputs, *constants, True)
        ctx.constants = constants
        ctx.save_for_backward(*inputs, content, logsumexp)
        ctx.set_materialize_grads(False)
        if run is _run_forward:  # nobody asks for the others
            return out
        ctx.mark_non_differentiable(content, logsumexp)
        return out, content, logsumexp

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return None, None, *(None,) * _DIFFERENTIABLE
        *inputs, content, logsumexp = ctx.saved_tensors
        *settings, backend = ctx.constants
        batched = torch._C._functorch.is_legacy_batchedtensor(grad_out)  # by autograd.grad's is_grads_batched
        if torch.is_grad_enabled() or batched or _is_observed(grad_out, *inputs):
            content = grad_out.new_empty(0) if content is None else content
            grads = _BACKWARD(grad_out, *inputs, *settings, content, logsumexp, backend)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                grads = _run_backward(grad_out, *inputs, *settings, content, logsumexp, backend)
        return None, None, *grads


def _forward_autograd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = arguments[:_DIFFERENTIABLE]
    if transformed():
        check_transforms(*inputs)
    if Call(*arguments[:_FIELDS]).wants_gradients:
        return _Attention.apply(_FORWARD, arguments[_DIFFERENTIABLE : _FIELDS + 1], *inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return _FORWARD(*arguments)


def _backward_autograd(*arguments: Any) -> tuple[Tensor | None, ...]:
    inputs = arguments[: 1 + _DIFFERENTIABLE]
    if transformed():
        check_transforms(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        grads = _BACKWARD(*arguments)
    return first_order_gradients(inputs, grads)


# ---- autocast ------------------------------------------------------------------------------------------------------

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(torch._C.DispatchKey.AutocastCUDA)


def _forward_autocast(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = autocast_inputs(q, k, v)
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        return _FORWARD(q, k, v, *rest)


for _key in ("CPU", "CUDA"):
    _library.impl("attention_forward", functools.partial(_forward, _run_forward), _key)
    _library.impl("attention_backward", _backward, _key)
    _library.impl("attention_forward", _forward_autocast, f"Autocast{_key}")
_library.impl("attention_forward", _forward_autograd, "Autograd")
_library.impl("attention_backward", _backward_autograd, "Autograd")
register_fake("gpsa::attention_forward", functools.partial(_forward, _empty_forward), lib=_library)
register_fake("gpsa::attention_backward", _backward_fake, lib=_library)
register_vmap("gpsa::attention_forward", functools.partial(_vmap, _FORWARD, _DIFFERENTIABLE), lib=_library)
register_vmap("gpsa::attention_backward", functools.partial(_vmap, _BACKWARD, 1 + _DIFFERENTIABLE), lib=_library)


# ---- without the dispatcher ----------------------------------------------------------------------------------------

_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def _is_observed(*tensors: Tensor) -> bool:
    """Whether anything but the kernels would see an operator on these: a compiler, a mode, a transform, a subclass."""
    return (
        torch.compiler.is_compiling()
        or transformed()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or not _PLAIN.issuperset(map(type, tensors))
        or any(map(Tensor.is_neg, tensors))
    )


def attention(call: Call, backend: Backend) -> Tensor:
    """The result of ``backend``'s kernels."""
    q, k, v, pos_weight, gate, *_ = call
    if _is_observed(q, k, v, pos_weight, gate):
        if are_distributed(q, k, v, pos_weight, gate):
            return on_shards(lambda shards: attention(shards, backend), call)
        return _FORWARD(*call, backend.name)[0]
    if autocast_dtype(q.device.type) is None:
        return _attention(call, backend)
    q, k, v = autocast_inputs(q, k, v)
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        return _attention(call._replace(q=q, k=k, v=v), backend)


_apply = super(torch.autograd.Function, _Attention).apply  # which would look for transforms once more


def _attention(call: Call, backend: Backend) -> Tensor:
    if call.wants_gradients:
        return _apply(_run_forward, (*call[_DIFFERENTIABLE:], backend.name), *call[:_DIFFERENTIABLE])
    assert backend.forward is not None
    with torch._C._AutoDispatchBelowAutograd():
        return backend.forward(call, False).out
