"""The formula of GPSA, literally: what everything else is checked against.

    A = (1 - g) softmax(scale q k^T) + g softmax(w . (dx, dy, dx^2 + dy^2)),   g = sigmoid(gate)
    out = (A / rowsum(A)) v

d'Ascoli et al., ConViT, arXiv 2103.10697, section 3. The division by the row sum is the paper's code's; both rows sum
to one, so it changes nothing but rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relative_offsets(
    grid_size: tuple[int, int], device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """(N, N, 3) table of dx, dy and dx^2 + dy^2, key minus query, for tokens numbered row by row."""
    rows, columns = grid_size
    y = torch.arange(rows, device=device, dtype=dtype).repeat_interleave(columns)
    x = torch.arange(columns, device=device, dtype=dtype).repeat(rows)
    dx, dy = x - x.unsqueeze(1), y - y.unsqueeze(1)
    return torch.stack((dx, dy, dx**2 + dy**2), dim=-1)


def attention_map(
    q: Tensor, k: Tensor, pos_weight: Tensor, gate: Tensor, grid_size: tuple[int, int], scale: float
) -> Tensor:
    """The gated mixture of the two softmaxes: (B, H, N, N), rows summing to one, in the dtype of q.

    q and k are (B, H, N, D), pos_weight (H, 3), gate (H,); ``scale`` is a factor of the content scores.
    """
    return gated_map(q, k, position_scores(pos_weight.to(q.dtype), grid_size), gate, scale)


def position_scores(pos_weight: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """(H, N, N) scores of the positional softmax, in pos_weight's dtype."""
    offsets = relative_offsets(grid_size, pos_weight.device, pos_weight.dtype)
    return torch.einsum("ijc,hc->hij", offsets, pos_weight)


def gated_map(q: Tensor, k: Tensor, position: Tensor, gate: Tensor, scale: float) -> Tensor:
    """:func:`attention_map`, from scores (H, N, N) of the positional softmax."""
    content = (scale * (q @ k.transpose(-2, -1))).softmax(dim=-1)
    position = position.softmax(dim=-1)
    g = torch.sigmoid(gate.to(q.dtype)).view(-1, 1, 1)
    mixed = (1 - g) * content + g * position
    return mixed / mixed.sum(dim=-1, keepdim=True)
