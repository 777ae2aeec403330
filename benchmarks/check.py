"""Does a peer compute what the formula says? Decided before anything is timed, on the tensors that are timed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.workloads import Case
from gpsa_kernels.formula import attention_map

NAMES = ("out", "q", "k", "v", "pos_weight", "gate")
HOPELESS = 1e30  # JSON has no infinity
_LARGEST_MAP = 2**24  # entries, that float64 maps and what autograd keeps of them fit anywhere


def literal(
    q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gate: Tensor, grid_size: tuple[int, int], scale: float
) -> Tensor:
    """The formula, every step in q's dtype."""
    return attention_map(q, k, pos_weight, gate, grid_size, scale) @ v


def formula(tensors: Sequence[Tensor], grad_out: Tensor, case: Case, dtype: torch.dtype) -> list[Tensor]:
    """The formula's result and its five gradients, in the order of NAMES, computed in ``dtype``.

    A head and a slice of the batch at a time: they are independent but for the sums over the batch.
    """
    out, q, k, v = (torch.empty_like(tensors[0], dtype=dtype) for _ in range(4))
    weights = [torch.zeros_like(t, dtype=torch.float64) for t in tensors[3:]]
    step = max(1, _LARGEST_MAP // case.tokens**2)
    for head in range(case.heads):
        for start in range(0, case.batch, step):
            part = slice(start, start + step), slice(head, head + 1)
            leaves = [t.detach()[part].to(dtype).requires_grad_() for t in tensors[:3]]
            leaves += [t.detach()[head : head + 1].to(dtype).requires_grad_() for t in tensors[3:]]
            result = literal(*leaves, case.grid_size, case.scale)
            grads = torch.autograd.grad(result, leaves, grad_out[part].to(dtype))
            for whole, piece in zip((out, q, k, v), (result.detach(), *grads[:3]), strict=True):
                whole[part] = piece
            for whole, piece in zip(weights, grads[3:], strict=True):
                whole[head : head + 1] += piece
    return [out, q, k, v, *weights]


def deviation(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of any tensor, relative to that tensor's largest entry; HOPELESS where one is not finite.

    ``got`` may be shorter: a peer without a backward pass has a result alone.
    """
    worst = 0.0
    for a, b in zip(got, expected, strict=False):
        if a.shape != b.shape or not bool(a.isfinite().all()):
            return HOPELESS
        worst = max(worst, ((a.double() - b.double()).abs().max() / b.double().abs().max()).item())
    return worst


def allowed(dtype: torch.dtype, eager: float) -> float:
    """Half of the dtype's digits, or as many as the formula itself keeps in that dtype (``eager``, its deviation).

    It tells another function from rounding, no more; how exact each backend is, accuracy.py says.
    """
    return max(float(torch.finfo(dtype).eps) ** 0.5, eager)
