"""The interface that every backend fills in: a call comes in, a result or the gradients come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gpsa_kernels.tensors import accumulation_dtype, empty_output


class Call(NamedTuple):
    """One call of the operator, its arguments checked, in the order of the operator's schema."""

    q: Tensor  # (B, H, N, D)
    k: Tensor
    v: Tensor
    pos_weight: Tensor  # (H, 3), of dx, dy and dx^2 + dy^2
    gate: Tensor  # (H,) logits
    seed: Tensor | None  # (1,) int64 on q's device, of the dropout mask; None without dropout and for ``compose``
    rows: int  # of the token grid
    columns: int
    scale: float  # of the content scores
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
    """What a kernel's forward pass returns: the result and, where there is one, what the backward pass needs.

    The content branch's own output is saved instead of ``out``: as the gate closes (g near 1) ``out`` holds almost
    nothing of the content branch, and what a 16-bit ``out`` still holds is rounding error.
    """

    out: Tensor  # (B, H, N, D), strides of a (B, N, H, D) contiguous tensor transposed
    content: Tensor | None  # like it; of ``sdpa``, for v less what its tokens have in common; None: not needed
    logsumexp: Tensor | None  # (B, H, N), of the content scores; float32 (float64 for float64)

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
    """

    name: str  # what ``backend=`` is given
    # why this machine cannot run it at all, or None
    unavailable: Callable[[], str | None]
    # why it cannot run a call, as a clause to follow "backend 'x' cannot run this call: "; or None
    unsupported: Callable[[Call], str | None]
    compose: Callable[[Call], Tensor] | None = None
    # the second argument says whether there will be a backward pass
    forward: Callable[[Call, bool], Forward] | None = None
    # from the gradient of the output
    backward: Callable[[Tensor, Call, Saved], Gradients] | None = None
    # the types of device on which both run
    kernel_devices: frozenset[str] = frozenset()
    # whether ``forward`` fills ``content`` for the backward pass; asked about fake tensors, too
    saves_content: Callable[[Call], bool] = lambda call: True
    # whether ``compose`` has all derivatives; of the others there are first ones, and an error for the rest
    all_derivatives: bool = False
