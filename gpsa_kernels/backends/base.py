"""The interface that every backend fills in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor


class Forward(NamedTuple):
    """What a kernel's forward pass returns: the result, and what its backward pass needs beside the inputs.

    Attributes:
        out: (B, H, N, D), strides of a (B, N, H, D) contiguous tensor transposed.
        content: the content branch's own output, laid out as ``out``, or an empty tensor from a kernel that does
            without it. Saved for the backward
            pass instead of ``out``: as the gate closes (g near 1) ``out`` holds almost nothing of the content branch,
            and what a 16-bit ``out`` still holds is rounding error.
        logsumexp: (B, H, N) float32 (float64 for float64), log of the content softmax's normaliser.

    Both are empty where the call has no backward pass (``save`` is false).
    """

    out: Tensor
    content: Tensor
    logsumexp: Tensor


class Gradients(NamedTuple):
    """Gradients in the order, shapes and dtypes of the operator's tensors."""

    q: Tensor
    k: Tensor
    v: Tensor
    pos_weight: Tensor
    gate: Tensor


class Compose(Protocol):
    """GPSA in plain, differentiable PyTorch."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pos_weight: Tensor,
        gate: Tensor,
        grid_size: tuple[int, int],
        scale: float,
        dropout_p: float,
    ) -> Tensor: ...


class KernelForward(Protocol):
    """The forward pass behind ``torch.ops.gpsa.attention_forward``.

    ``seed`` is (1,) int64 on q's device, from which the dropout mask is drawn; None without dropout.
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pos_weight: Tensor,
        gate: Tensor,
        seed: Tensor | None,
        grid_size: tuple[int, int],
        scale: float,
        dropout_p: float,
        save: bool,
    ) -> Forward: ...


class KernelBackward(Protocol):
    """The backward pass behind ``torch.ops.gpsa.attention_backward``."""

    def __call__(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pos_weight: Tensor,
        gate: Tensor,
        seed: Tensor | None,
        content: Tensor,
        logsumexp: Tensor,
        grid_size: tuple[int, int],
        scale: float,
        dropout_p: float,
    ) -> Gradients: ...


class Unsupported(Protocol):
    """Why a backend cannot run these tensors, as a clause to follow "backend 'x' cannot run this call: "; or None."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, grid_size: tuple[int, int], dropout_p: float) -> str | None: ...


class SavesContent(Protocol):
    """Whether ``forward`` fills :attr:`Forward.content` for its backward pass. Asked about fake tensors, too."""

    def __call__(self, q: Tensor, grid_size: tuple[int, int], dropout_p: float) -> bool: ...


def empty_output(q: Tensor) -> Tensor:
    """An uninitialised (B, H, N, D) in the memory layout of (B, N, H, D), so that merging the heads is a view."""
    batch, heads, tokens, dim = q.shape
    return q.new_empty((batch, tokens, heads, dim)).transpose(1, 2)


def parameter_gradients(sums: Tensor, pos_weight: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``pos_weight`` and ``gate`` from what each program of a backward kernel has summed.

    Args:
        sums: (B, H, slots, 4), float32 or float64: of g <dO, (dR/dw) V> for the three weights, and of
            g (1 - g) <dO, O_pos - O_content>.
        pos_weight: (H, 3).
        gate: (H,) logits.
    """
    return sums[..., :3].sum((0, 2)).to(pos_weight.dtype), sums[..., 3].sum((0, 2)).to(gate.dtype)


def as_output(t: Tensor) -> Tensor:
    """``t`` in the memory layout of :func:`empty_output`: a copy only where it has another."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


@dataclass(frozen=True)
class Backend:
    """One way to compute GPSA.

    A backend brings ``compose`` (plain PyTorch that autograd and torch.compile see through), or a ``forward`` and
    ``backward`` pair (kernels, reached through the registered operator), or both: then the kernels serve eager mode on
    ``kernel_devices`` and ``compose`` serves everything else.

    Attributes:
        name: what ``backend=`` is given.
        unavailable: why this machine cannot run it at all, or None.
        unsupported: why it cannot run these tensors, or None.
        compose: differentiable PyTorch.
        forward: kernel forward pass.
        backward: kernel backward pass.
        kernel_devices: the device types on which ``forward`` and ``backward`` run.
        saves_content: whether ``forward`` fills :attr:`Forward.content` where there is a backward pass.
        by_name_only: whether ``backend="auto"`` passes it over.
        all_derivatives: whether ``compose`` can be differentiated in every way that PyTorch knows: again, in forward
            mode, by torch.func. Of the others there are first derivatives, and an error for the rest.
    """

    name: str
    unavailable: Callable[[], str | None]
    unsupported: Unsupported
    compose: Compose | None = None
    forward: KernelForward | None = None
    backward: KernelBackward | None = None
    kernel_devices: frozenset[str] = field(default_factory=frozenset)
    saves_content: SavesContent = lambda q, grid_size, dropout_p: True
    by_name_only: bool = False
    all_derivatives: bool = False
