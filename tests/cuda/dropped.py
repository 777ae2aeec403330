"""The formula under attention dropout with a given mask, and the rule of exactness for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import emulation
import torch
from reference import NAMES, literal, with_gradients
from torch import Tensor


def masks(q: Tensor, grid_size: tuple[int, int], dropout_p: float, seed: int) -> Tensor:
    """(B, H, N, N), 1 where the kernels keep an entry: drawn by csrc/dropout.cuh, which test_dropout.py checks."""
    batch, heads = q.shape[:2]
    drawn = [emulation.dropout_mask(grid_size, dropout_p, seed, image, False) for image in range(batch * heads)]
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


def dropped_walks(
    tensors: Sequence[Tensor],
    grad_out: Tensor,
    grid_size: tuple[int, int],
    scale: float,
    mask: Tensor,
    dropout_p: float,
) -> dict[str, float]:
    """reference.rounding_walks, of the terms that are left."""
    q, k, v, pos_weight, gate = (t.detach().double() for t in tensors)
    upstream, kept = grad_out.double(), mask / (1 - dropout_p)
    maps = _maps(q, k, pos_weight, grid_size, scale)
    index = torch.arange(q.size(2))
    y, x = index // grid_size[1], index % grid_size[1]
    dx, dy = (x[None, :] - x[:, None]).double(), (y[None, :] - y[:, None]).double()
    offsets = torch.stack((dx, dy, dx**2 + dy**2), dim=-1)
    content_score = scale**2 * q**2 @ k.mT**2
    position_score = (offsets**2 @ pos_weight.t() ** 2).permute(2, 0, 1)
    g = torch.sigmoid(gate).view(-1, 1, 1)
    content = (1 - g) * maps[0] * (1 + content_score).sqrt()
    position = g * maps[1] * (1 + position_score).sqrt()
    along = kept * (upstream @ v.mT)
    own = [((upstream * ((m * kept) @ v)) ** 2).sum(-1, keepdim=True) for m in maps]
    score = content**2 * (along**2 + own[0])
    place = position**2 * (along**2 + own[1])
    squares = {
        "out": ((content + position) * kept) ** 2 @ v**2,
        "q": scale**2 * score @ k**2,
        "k": scale**2 * score.mT @ q**2,
        "v": ((content + position) * kept).mT ** 2 @ upstream**2,
        "pos_weight": torch.stack([(place * d**2).sum((0, 2, 3)) for d in offsets.unbind(-1)]),
        "gate": (g * (1 - g)).flatten() ** 2 * (own[0] + own[1]).sum((0, 2, 3)),
    }
    return {name: t.max().sqrt().item() for name, t in squares.items()}


def assert_exact_with_dropout(
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    grid_size: tuple[int, int],
    dropout_p: float,
    seed: int,
) -> None:
    """What reference.assert_as_exact_as_eager asks, of ``function(*tensors, grid_size, scale, dropout_p=, seed=)``."""
    q = tensors[0]
    scale, mask = q.size(-1) ** -0.5, masks(q, grid_size, dropout_p, seed)
    grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(q.dtype)
    settings = grid_size, scale, mask, dropout_p
    truth = with_gradients(dropped_out, [t.double() for t in tensors], grad_out.double(), *settings)
    eager = with_gradients(dropped_out, tensors, grad_out, *settings)
    ours = with_gradients(function, tensors, grad_out, grid_size, scale, dropout_p=dropout_p, dropout_seed=seed)
    walks = dropped_walks(tensors, grad_out, *settings)
    stored, summed = torch.finfo(q.dtype).eps, torch.finfo(torch.float32).eps
    batch, _, tokens, head_dim = q.shape
    terms = {"pos_weight": batch * tokens * tokens, "gate": batch * tokens * head_dim}
    for name, expected, low, got in zip(NAMES, truth, eager, ours, strict=True):
        assert got.isfinite().all(), name
        error = (got.double() - expected).abs().max().item()
        allowed = (low.double() - expected).abs().nan_to_num(nan=math.inf).max().item()
        allowed += stored * expected.abs().max().item()
        allowed += (stored + summed * math.sqrt(terms.get(name, max(tokens, head_dim)) / 2)) * walks[name]
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
