"""The positional softmax of GPSA as a product of two small tables, one per grid axis.

On a full grid of R rows and C columns the positional softmax is separable:

    softmax_j(w0*dx + w1*dy + w2*(dx^2 + dy^2)) = Ay[y_i, y_j] * Ax[x_i, x_j]

    Ax[x, x'] = softmax over x' of w0*(x' - x) + w2*(x' - x)^2      (C x C, per head)
    Ay[y, y'] = softmax over y' of w1*(y' - y) + w2*(y' - y)^2      (R x R, per head)

because the exponential of the sum factors and so does its normaliser. Here dx and dy are key minus query. Multiplying
V by the N x N map is therefore two short contractions along the grid axes: N*(R+C)*D multiply-adds instead of N^2*D.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpsa_kernels.tensors import accumulation_dtype, known


def _axis_offsets(size: int, like: Tensor) -> Tensor:
    """(size, size) table of key coordinate minus query coordinate."""
    coordinate = torch.arange(size, device=like.device, dtype=like.dtype)
    return coordinate - coordinate.unsqueeze(1)


def axis_factors(pos_weight: Tensor, grid_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Ax (H, C, C) and Ay (H, R, R) of weights (H, 3), float32 (float64 for float64 weights); every row sums to 1."""
    rows, columns = grid_size
    weight = pos_weight.to(accumulation_dtype(pos_weight.dtype))
    wx, wy, wd = weight.view(-1, 3, 1, 1).unbind(1)
    dx = _axis_offsets(columns, weight)
    dy = dx if known(rows == columns) else _axis_offsets(rows, weight)
    # w*d + wd*d^2 as d*(w + wd*d): one pass less, and exact at d = 0
    ax = torch.softmax(dx * (wx + wd * dx), dim=-1)
    ay = torch.softmax(dy * (wy + wd * dy), dim=-1)
    return ax, ay


def axis_factors_backward(ax: Tensor, ay: Tensor, grad_ax: Tensor, grad_ay: Tensor) -> Tensor:
    """The gradient of :func:`axis_factors`, (H, 3)."""
    dx, dy = _axis_offsets(ax.size(-1), ax), _axis_offsets(ay.size(-1), ay)
    grad_x = ax * (grad_ax - (ax * grad_ax).sum(-1, keepdim=True)) * dx
    grad_y = ay * (grad_ay - (ay * grad_ay).sum(-1, keepdim=True)) * dy
    wx, wy = grad_x.sum((1, 2)), grad_y.sum((1, 2))
    wd = (grad_x * dx).sum((1, 2)) + (grad_y * dy).sum((1, 2))
    return torch.stack((wx, wy, wd), dim=1)


def separable_product(ax: Tensor, ay: Tensor, v: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """The positional map times v (B, H, N, D) of the factors' dtype, without the map: (B, H, N, D), contiguous."""
    mixed = torch.matmul(ay, v.unflatten(2, grid_size).flatten(3))
    return torch.matmul(ax.unsqueeze(1), mixed.unflatten(3, (grid_size[1], -1))).flatten(2, 3)
