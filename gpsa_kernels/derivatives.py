"""Which derivatives a call has: all of them on the eager backend, first ones by backward() on the others.

Whatever else would be wrong in silence is an error here that names the way out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad


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


def check_transforms(*tensors: Tensor) -> None:
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


def first_order_gradients(inputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Marks ``grads`` as not differentiable where a graph of the backward pass is being built."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grads
    return _NoSecondDerivative.apply(len(inputs), *inputs, *grads)


def first_order(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``tensors``, with a clear error where what is composed of them is differentiated in another way than once.

    A no-op where nothing records a graph, inside vmap, and under torch.compile, which refuses second derivatives by
    itself.
    """
    if transformed() and _differentiated_by_transform():
        raise _refusal("it is differentiated by torch.func or in forward mode")
    if torch.compiler.is_compiling() or transformed() or not torch.is_grad_enabled():
        return tensors
    views = tuple(t.view_as(t) for t in tensors)
    for view in views:
        if view.requires_grad:
            view.register_hook(lambda grad: first_order_gradients((), (grad,))[0])
    return views
