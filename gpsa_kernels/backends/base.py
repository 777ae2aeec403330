"""The interface that every backend fills in: a call comes in, a result or the gradients come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gpsa_kernels.tensors import accumulation_dtype, empty_output


class Call(NamedTuple):
    """One call of the operator, its arguments checked, in the order of the operator's schema.

    Attributes:
        q: (B, H, N, D) queries.
        k: (B, H, N, D) keys.
        v: (B, H, N, D) values.
        pos_weight: (H, 3) weights of dx, dy and dx^2 + dy^2.
        gate: (H,) logits.
        seed: (1,) int64 on q's device, from which a kernel draws the dropout mask; None without dropout and for
            ``compose``.
        rows: of the token grid.
        columns: of the token grid; rows * columns = N.
        scale: factor of the content scores.
        dropout_p: probability with which an entry of the attention map is dropped.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    pos_weight: Tensor
    gate: Tensor
    seed: Tensor | None
    rows: int
    columns: int
    scale: float
    dropout_p: float

    @property
    def grid_size(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def has_dropout(self) -> bool:
        return self.dropout_p > 0

    @property
    def wants_gradients(self) -> bool:
        """Whether autograd records the call."""
        return torch.is_grad_enabled() and (
            self.q.requires_grad
            or self.k.requires_grad
            or self.v.requires_grad
            or self.pos_weight.requires_grad
            or self.gate.requires_grad
        )


def strided_channels(call: Call) -> str | None:
    """Why kernels that read rows of channels cannot run a call, or None."""
    for name, t in (("q", call.q), ("k", call.k), ("v", call.v)):
        if t.stride(-1) != 1 and t.size(-1) > 1:
            return f"{name}'s last dimension has stride {t.stride(-1)}, and it must be contiguous (stride 1)"
    return None


class Forward(NamedTuple):
    """What a kernel's forward pass returns: the result, and what its backward pass needs beside the call.

    Attributes:
        out: (B, H, N, D), strides of a (B, N, H, D) contiguous tensor transposed.
        content: the content branch's own output (of ``sdpa``, for v less what its tokens have in common), laid out as
            ``out``; None from a kernel that does without it. Saved instead of ``out``: as the gate closes (g near 1)
            ``out`` holds almost nothing of the content branch, and what a 16-bit ``out`` still holds is rounding error.
        logsumexp: (B, H, N) float32 (float64 for float64), log of the content softmax's normaliser.

    The last two are None where the call has no backward pass.
    """

    out: Tensor
    content: Tensor | None
    logsumexp: Tensor | None

    @staticmethod
    def empty(q: Tensor, save: bool, saves_content: bool = True) -> Forward:
        """For a kernel to fill."""
        if not save:
            return Forward(empty_output(q), None, None)
        content = empty_output(q) if saves_content else None
        return Forward(empty_output(q), content, q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype)))


class Saved(NamedTuple):
    """What a kernel's backward pass is given beside the call: of :class:`Forward`."""

    content: Tensor | None
    logsumexp: Tensor


class Gradients(NamedTuple):
    """Gradients in the order, shapes and dtypes of the call's tensors."""

    q: Tensor
    k: Tensor
    v: Tensor
    pos_weight: Tensor
    gate: Tensor


@dataclass(frozen=True)
class Backend:
    """One way to compute GPSA.

    A backend brings ``compose`` (plain PyTorch that autograd and torch.compile see through), or ``forward`` and
    ``backward`` (kernels, which a registered operator runs), or both: then the kernels serve eager mode on
    ``kernel_devices`` and ``compose`` serves everything else.

    Attributes:
        name: what ``backend=`` is given.
        unavailable: why this machine cannot run it at all, or None.
        unsupported: why it cannot run a call, as a clause to follow "backend 'x' cannot run this call: "; or None.
        compose: GPSA in differentiable PyTorch.
        forward: the kernels' forward pass; the second argument says whether there will be a backward pass.
        backward: the kernels' backward pass, from the gradient of the output.
        kernel_devices: the device types on which ``forward`` and ``backward`` run.
        saves_content: whether ``forward`` fills :attr:`Forward.content` for the backward pass. Asked about fake
            tensors, too.
        all_derivatives: whether ``compose`` can be differentiated in every way that PyTorch knows: again, in forward
            mode, by torch.func. Of the others there are first derivatives, and an error for the rest.
    """

    name: str
    unavailable: Callable[[], str | None]
    unsupported: Callable[[Call], str | None]
    compose: Callable[[Call], Tensor] | None = None
    forward: Callable[[Call, bool], Forward] | None = None
    backward: Callable[[Tensor, Call, Saved], Gradients] | None = None
    kernel_devices: frozenset[str] = frozenset()
    saves_content: Callable[[Call], bool] = lambda call: True
    all_derivatives: bool = False
