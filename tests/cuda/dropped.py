"""The formula under attention dropout with the mask that the CUDA kernels draw."""

from __future__ import annotations

import math

import emulation
import torch
from reference import literal
from torch import Tensor


def masks(q: Tensor, grid_size: tuple[int, int], dropout_p: float, seed: int) -> Tensor:
    """(B, H, N, N), 1 where the kernels keep an entry: drawn by csrc/dropout.cuh, which test_dropout.py checks."""
    batch, heads = q.shape[:2]
    drawn = [emulation.dropout_mask(grid_size, dropout_p, seed, i, False) for i in range(batch * heads)]
    return torch.stack(drawn).view(batch, heads, *drawn[0].shape)


def _maps(q: Tensor, k: Tensor, pos_weight: Tensor, grid_size: tuple[int, int], scale: float) -> list[Tensor]:
    """The content's and the position's attention map, in the dtype of the inputs."""
    eye = torch.eye(q.size(2), dtype=q.dtype).expand(*q.shape[:2], -1, -1)
    logits = (q.new_full((q.size(1),), logit) for logit in (-math.inf, math.inf))
    return [literal(q, k, eye, pos_weight, logit, grid_size, scale) for logit in logits]


def dropped_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    grid_size: tuple[int, int],
    scale: float,
    mask: Tensor,
    dropout_p: float,
) -> Tensor:
    """Attention with a mask on the combined map, every step in the dtype of the inputs."""
    content, position = _maps(q, k, pos_weight, grid_size, scale)
    g = torch.sigmoid(gate).view(-1, 1, 1)
    return (((1 - g) * content + g * position) * mask / (1 - dropout_p)) @ v
