"""What a ConViT has learned: how far its heads look, and how much they rely on position."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpsa_kernels.formula import relative_offsets


def non_locality(attention: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """The mean distance, in grid steps, between a query and the keys it attends to (arXiv 2103.10697, section 4).

    ``attention`` are maps (B, H, N, N) or (H, N, N), rows summing to one, of a grid (rows, columns) with rows * columns
    = N. The result is (H,), averaged over queries and over the batch. Raises ValueError for maps of another grid.
    """
    rows, columns = grid_size
    if attention.dim() not in (3, 4) or attention.shape[-2:] != (rows * columns, rows * columns):
        raise ValueError(
            f"attention must be (B, H, N, N) or (H, N, N) with N = {rows} * {columns}, got {tuple(attention.shape)}"
        )
    squared = relative_offsets(grid_size, attention.device, attention.dtype)[..., 2]
    distance = (attention * squared.sqrt()).sum(-1).mean(-1)
    return distance.mean(0) if attention.dim() == 4 else distance


@torch.no_grad()
def gates(model: nn.Module) -> dict[str, Tensor]:
    """The gate sigmoid(gating_param), (H,), of every GPSA layer of ``model``, by the layer's name.

    1 is a head that looks at position only, 0 one that looks at content only. Works on fused and unfused models.
    """
    return {
        name: torch.sigmoid(layer.gating_param)
        for name, layer in model.named_modules()
        if isinstance(getattr(layer, "gating_param", None), Tensor)
    }
