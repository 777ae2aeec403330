"""The rule of exactness: no result may be further from the float64 formula than eager PyTorch's in the same dtype.

Written from the formula, and sharing nothing with what is judged by it; a backend is given as a function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

NAMES = ("out", "q", "k", "v", "pos_weight", "gate")


def inputs(
    batch: int, heads: int, grid_size: tuple[int, int], head_dim: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    """Random q, k, v, pos_weight and gate, all of ``dtype``, requiring gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, math.prod(grid_size), head_dim)] * 3 + [(heads, 3), (heads,)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    tensors[3] *= 0.5
    return [t.requires_grad_() for t in tensors]


def offsets(grid_size: tuple[int, int]) -> Tensor:
    """(N, N, 3): dx, dy and dx² + dy², key minus query."""
    y, x = torch.cartesian_prod(*map(torch.arange, grid_size)).unbind(-1)
    dx, dy = x[None, :] - x[:, None], y[None, :] - y[:, None]
    return torch.stack((dx, dy, dx**2 + dy**2), dim=-1)


def literal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    grid_size: tuple[int, int],
    scale: float,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    one_minus: bool = True,
) -> Tensor:
    """The formula as models spell it out, every step in the inputs' dtype; ``mask``: (B, H, N, N), what is kept.

    Without ``one_minus`` the content has a sigmoid of its own: as g -> 1, 1 - g loses its digits in float64, too.
    """
    content = ((q @ k.transpose(-2, -1)) * scale).softmax(-1)
    position = (offsets(grid_size).to(q.dtype) @ pos_weight.t()).permute(2, 0, 1).softmax(-1)
    g = torch.sigmoid(gate).view(-1, 1, 1)
    closed = 1 - g if one_minus else torch.sigmoid(-gate).view(-1, 1, 1)
    mixed = closed * content + g * position
    attention = mixed / mixed.sum(-1, keepdim=True)
    return (attention if mask is None else attention * mask / (1 - dropout_p)) @ v


def with_gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], grad_out: Tensor, *args: object, **kwargs: object
) -> list[Tensor]:
    """The result of ``function(*tensors, *args, **kwargs)`` and its gradients, in the order of NAMES."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    out = function(*leaves, *args, **kwargs)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]


def rounding_walks(
    tensors: Sequence[Tensor],
    grad_out: Tensor,
    grid_size: tuple[int, int],
    scale: float,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    structured: bool = False,
) -> dict[str, float]:
    """For every result, how far one rounding of each term of each sum on the way moves it, in units of eps.

    To first order and in float64: the root sum of squares of the terms that the result sums, each of which carries
    the rounding of its score, exp(s) moving by eps times the root sum of squares of the terms of s. Of what is rounded
    alike, as in ``structured`` tensors, the sum counts as well.
    """
    q, k, v, pos_weight, gate = (t.detach().double() for t in tensors)
    tokens = q.size(2)
    eye = torch.eye(tokens, dtype=torch.float64)
    ends = torch.full_like(gate, -math.inf), torch.full_like(gate, math.inf)
    maps = [literal(q, k, eye.expand(*q.shape[:2], -1, -1), pos_weight, end, grid_size, scale) for end in ends]
    distances = offsets(grid_size).double()
    content_score = scale**2 * q**2 @ k.mT**2
    position_score = (distances**2 @ pos_weight.t() ** 2).permute(2, 0, 1)
    g, closed = torch.sigmoid(gate).view(-1, 1, 1), torch.sigmoid(-gate).view(-1, 1, 1)
    content = closed * maps[0] * (1 + content_score).sqrt()
    position = g * maps[1] * (1 + position_score).sqrt()
    kept = 1.0 if mask is None else mask.double() / (1 - dropout_p)
    along = kept * (grad_out.double() @ v.mT)
    products = [grad_out.double() * ((kept * m) @ v) for m in maps]  # dO * O
    own = [(p**2).sum(-1, keepdim=True) for p in products]
    score = content**2 * (along**2 + own[0])
    place = position**2 * (along**2 + own[1])
    squares = {
        "out": (kept * (content + position)) ** 2 @ v**2,
        "q": scale**2 * score @ k**2,
        "k": scale**2 * score.mT @ q**2,
        "v": (kept * (content + position)).mT ** 2 @ grad_out.double() ** 2,
        "pos_weight": torch.stack([(place * d**2).sum((0, 2, 3)) for d in distances.unbind(-1)]),
        "gate": (g * closed).flatten() ** 2 * (own[0] + own[1]).sum((0, 2, 3)),
    }
    if structured:
        squares["q"] += scale**2 * (score.sqrt() @ k) ** 2
        squares["k"] += scale**2 * (score.sqrt().mT @ q) ** 2
        squares["gate"] += (((g * content) ** 2 + (closed * position) ** 2) * along**2).sum((0, 2, 3))
        squares["gate"] += (g * closed).flatten() ** 2 * sum((p.sum(2) ** 2).sum((0, 2)) for p in products)
    return {name: t.max().sqrt().item() if t.numel() else 0.0 for name, t in squares.items()}


def roundings(q: Tensor, name: str, expected: Tensor, walk: float, largest_logsumexp: float | None = None) -> float:
    """Of a result in q's dtype: what rounding alone explains, as :func:`deviations` says it."""
    stored = torch.finfo(q.dtype).eps
    summed = torch.finfo(torch.float64 if q.dtype == torch.float64 else torch.float32).eps
    batch, _, tokens, head_dim = q.shape
    terms = {"pos_weight": batch * tokens * tokens, "gate": batch * tokens * head_dim}
    count, size = terms.get(name, max(tokens, head_dim)), expected.abs().max().item()
    explained = stored * size + (stored + summed * math.sqrt(count / 2)) * walk
    if largest_logsumexp is not None:
        explained += summed * math.hypot(math.sqrt(count / 3) * size, largest_logsumexp * (size + walk))
        explained += stored * torch.finfo(q.dtype).tiny
        if q.dtype == torch.float64:
            explained *= 2
    return explained


class Deviation(NamedTuple):
    """How far one result is from the formula in float64, by its largest entry."""

    name: str  # of NAMES
    error: float  # nan, which nothing allows, where an entry is not finite
    eager: float  # the error of the formula run in the tensors' own dtype
    allowed: float
    size: float  # the formula's largest entry


def deviations(
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    grid_size: tuple[int, int],
    scale: float | None = None,
    device: torch.device | str = "cpu",
    eager: Callable[..., Tensor] = literal,
    loss_scale: float = 1.0,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    gradients: bool = True,
    structured: bool = False,
    grad_out: Tensor | None = None,
    **kwargs: object,
) -> list[Deviation]:
    """Judges the result and the gradients of ``function`` by the rule of exactness.

    ``function`` runs on ``device``, what it is compared with on the CPU. A stricter ``eager`` makes a stricter rule.
    The upstream gradient is ``grad_out`` or normal noise times ``loss_scale``; without ``gradients`` a call that has
    none is asked for ``out``. ``mask`` says what ``function``, given ``dropout_p``, drops.

    To eager's error is added what rounding alone explains, since eager is sometimes luckier than anybody has to be (a
    softmax over one token has an exact gradient; float64 eager is the truth itself): one rounding of the result and of
    each term summed on the way, in the tensors' dtype, and one of each of the n partial sums, in the dtype that sums,
    which walk sqrt(n / 2) as far as one (Higham and Mary, A new approach to probabilistic rounding error analysis).

    That holds for noise. In ``structured`` tensors (tokens alike, scores in the thousands) rounding is a bias:

    - tokens that are alike round alike (:func:`rounding_walks`), and n partial sums of terms of one sign, which grow to
      the sum S, add up to sqrt(n / 3) S roundings;
    - each row is moved by one rounding of its logsumexp, which all flash attention pays that forms
      exp(score - logsumexp) and does not keep the map;
    - in float64 the truth is rounded as much, and a result that the dtype cannot hold is not judged.

    Raises:
        ValueError: a result is of the wrong shape or dtype.
    """
    q = tensors[0]
    scale = q.size(-1) ** -0.5 if scale is None else scale
    if grad_out is None:
        grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        grad_out = (loss_scale * grad_out).to(q.dtype)
    dropout: dict[str, Any] = {} if mask is None else {"mask": mask, "dropout_p": dropout_p}
    doubles = [t.double() for t in tensors]
    truth = with_gradients(literal, doubles, grad_out.double(), grid_size, scale, one_minus=False, **dropout)
    low_precision = with_gradients(eager, tensors, grad_out, grid_size, scale, **dropout)
    there = [t.detach().to(device) for t in tensors]
    kwargs |= {"scale": scale} if mask is None else {"scale": scale, "dropout_p": dropout_p}
    if gradients:
        ours = with_gradients(function, there, grad_out.to(device), grid_size, **kwargs)
    else:
        ours = [function(*there, grid_size, **kwargs)]
    walks, largest = rounding_walks(tensors, grad_out, grid_size, scale, **dropout, structured=structured), None
    if structured:
        scores = scale * q.detach().double() @ tensors[1].detach().double().mT
        largest = scores.logsumexp(-1).abs().max().item() if q.numel() else 0.0
    found = []
    for name, expected, low, got in zip(NAMES, truth, low_precision, [t.cpu() for t in ours], strict=gradients):
        if got.dtype != q.dtype or got.shape != expected.shape:
            raise ValueError(
                f"{name} is {got.dtype} of shape {tuple(got.shape)}, not {q.dtype} of {tuple(expected.shape)}"
            )
        if got.numel() == 0 or (structured and expected.abs().max() > torch.finfo(got.dtype).max):
            continue
        error = (got.double() - expected).abs().max().item() if got.isfinite().all() else math.nan
        of_eager = (low.double() - expected).abs().nan_to_num(nan=math.inf).max().item()
        allowed = of_eager + roundings(q, name, expected, walks[name], largest)
        found.append(Deviation(name, error, of_eager, allowed, expected.abs().max().item()))
    return found


def dropped_map(
    function: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    grid_size: tuple[int, int],
    **kwargs: object,
) -> Tensor:
    """The attention map after dropout, read off ``function`` with columns of the identity for v: (B, H, N, N)."""
    tokens, head_dim = q.shape[2:]
    identity = torch.eye(tokens, math.ceil(tokens / head_dim) * head_dim, dtype=q.dtype, device=q.device)
    values = [v.expand_as(q) for v in identity.split(head_dim, dim=1)]
    out = [function(q, k, v, pos_weight, gate, grid_size, **kwargs) for v in values]
    return torch.cat(out, -1)[..., :tokens].cpu()


def kept_by_dropout(
    function: Callable[..., Tensor],
    batch: int,
    heads: int,
    grid_size: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device | str,
    **kwargs: object,
) -> Tensor:
    """(B, H, N, N): whether dropout keeps an entry, read off a map whose entries are all 1 / N."""
    q = torch.zeros(batch, heads, math.prod(grid_size), 64, dtype=dtype, device=device)
    return dropped_map(function, q, q, q.new_zeros(heads, 3), q.new_zeros(heads), grid_size, **kwargs) != 0
