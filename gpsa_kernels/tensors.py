"""The dtypes and memory layouts that all backends agree on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, softmax statistics and sums: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_output(q: Tensor) -> Tensor:
    """An uninitialised (B, H, N, D) in the memory layout of (B, N, H, D), so that merging the heads is a view."""
    batch, heads, tokens, dim = q.shape
    return q.new_empty_strided((batch, heads, tokens, dim), (tokens * heads * dim, dim, heads * dim, 1))


def as_output(t: Tensor) -> Tensor:
    """``t`` in the memory layout of :func:`empty_output`: a copy only where it has another."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def parameter_gradients(sums: Tensor, pos_weight: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``pos_weight`` (H, 3) and ``gate`` (H,), in one memory, from what a kernel's blocks have summed.

    ``sums``: (B * slots, 4 * H), of g <dO, (dR/dw) V> for the three weights of each head, then of
    g (1 - g) <dO, O_pos - O_content> for each head.
    """
    total = sums.sum(0).to(torch.promote_types(pos_weight.dtype, gate.dtype))
    of_weights, of_gates = total.split_with_sizes((pos_weight.numel(), gate.numel()))
    return of_weights.view(pos_weight.shape).to(pos_weight.dtype), of_gates.to(gate.dtype)


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


def cast_dtype(t: Tensor) -> torch.dtype:
    """The dtype that autocast makes of a tensor, by SDPA's rule: float64 stays as it is."""
    return t.dtype if t.dtype == torch.float64 else autocast_dtype(t.device.type) or t.dtype


def autocast_inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in the autocast dtype of their device."""
    if autocast_dtype(q.device.type) is None:
        return q, k, v
    return q.to(cast_dtype(q)), k.to(cast_dtype(k)), v.to(cast_dtype(v))


def known(condition: bool | torch.SymBool) -> bool:
    """A condition on sizes, False where torch.export leaves them open, so that its graph is not tied to an example."""
    if isinstance(condition, torch.SymBool):
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import, and loaded by now

        return statically_known_true(condition)
    return bool(condition)  # a tensor where torch.jit.trace is at work
