"""What the registered operators compute, for ``torch.utils.flop_counter``: a multiplication and an addition are two.

Attention is counted as torch counts it: two matrix products forward, five backward, the recomputed scores included. The
positional product is counted as what it needs, a contraction along each axis of the grid, whatever a kernel does.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from gpsa_kernels import operators  # noqa: F401  (registers the operators)

_log = logging.getLogger("torch.utils.flop_counter")
_log.disabled = True  # where there is no Triton it warns, when imported, of Triton's own kernels
from torch.utils.flop_counter import register_flop_formula  # noqa: E402

_log.disabled = False


@register_flop_formula(torch.ops.gpsa.attention_forward)
def forward_flops(q: torch.Size, *call: Any, out_shape: Any) -> int:
    rows, columns = call[5:7]
    return 2 * q.numel() * (2 * q[2] + rows + columns)


@register_flop_formula(torch.ops.gpsa.attention_backward)
def backward_flops(grad_out: torch.Size, *call: Any, out_shape: Any) -> int:
    rows, columns = call[6:8]
    # Ay V again, dAy and its part of dV along the rows; dAx and its part along the columns
    return 2 * grad_out.numel() * (5 * grad_out[2] + 3 * rows + 2 * columns)
