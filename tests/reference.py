"""Oracles and assertions that the tests share; the rule of exactness itself is in gpsa_kernels/check/exactness.py."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gpsa_kernels import gpsa_attention
from gpsa_kernels.check.exactness import (  # noqa: F401
    NAMES,
    deviations,
    inputs,
    literal,
    offsets,
    rounding_walks,
    roundings,
    with_gradients,
)


def loops(
    q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gate: Tensor, grid_size: tuple[int, int], scale: float
) -> Tensor:
    """The formula one number at a time, in Python floats: slow, and hard to get wrong."""
    _, columns = grid_size
    batch, heads, tokens, _ = q.shape
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b, h, i in itertools.product(range(batch), range(heads), range(tokens)):
        w0, w1, w2 = pos_weight[h].tolist()
        g = 1 / (1 + math.exp(-gate[h].item()))
        content, position = [], []
        for j in range(tokens):
            dx, dy = j % columns - i % columns, j // columns - i // columns
            content.append(math.exp(scale * (q[b, h, i] @ k[b, h, j]).item()))
            position.append(math.exp(w0 * dx + w1 * dy + w2 * (dx * dx + dy * dy)))
        for j in range(tokens):
            weight = (1 - g) * content[j] / sum(content) + g * position[j] / sum(position)
            out[b, h, i] += weight * v[b, h, j]
    return out


SEED = 5


def attention(*arguments: object, seed: int = SEED, **kwargs: object) -> Tensor:
    """gpsa_attention, with the dropout mask of a seed."""
    torch.manual_seed(seed)
    return gpsa_attention(*arguments, **kwargs)


def assert_same_bits(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Of a result and its gradients."""
    for name, a, b in zip(NAMES, got, expected, strict=True):
        assert torch.equal(a, b), name


def assert_as_exact_as_eager(function: Callable[..., Tensor], tensors: Sequence[Tensor], *args, **kwargs) -> None:
    """That every result of :func:`deviations`, which has the rule of exactness and its arguments, is allowed."""
    for name, error, _, allowed, _ in deviations(function, tensors, *args, **kwargs):
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def assert_what_backward_reads_is_exact(
    content: Tensor,
    logsumexp: Tensor,
    tensors: Sequence[Tensor],
    grid_size: tuple[int, int],
    scale: float,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> None:
    """The content branch's own output, if there is one, by the rule of exactness; the logsumexp by its scores'."""
    q, k, v, pos_weight, gate = (t.detach() for t in tensors)
    if content.numel():
        branch, settings = [q, k, v, pos_weight, torch.full_like(gate, -math.inf)], (grid_size, scale, mask, dropout_p)
        expected, low = literal(*(t.double() for t in branch), *settings), literal(*branch, *settings)
        walk = rounding_walks(branch, torch.zeros_like(q), *settings)["out"]
        error = (content.cpu().double() - expected).abs().max()
        of_eager = (low.double() - expected).abs().nan_to_num(nan=math.inf).max()
        assert error <= of_eager + roundings(q, "out", expected, walk)
    # a score of d terms is off by at most d roundings of each
    tokens, head_dim = q.shape[2:]
    summed = torch.finfo(logsumexp.dtype).eps
    scores = scale * q.double() @ k.double().mT
    bound = (head_dim + 4) * summed * (abs(scale) * q.double().abs() @ k.double().abs().mT).max()
    error = (logsumexp.cpu().double() - scores.logsumexp(-1)).abs().max()
    assert error <= bound + tokens * summed * (1 + math.log(tokens))
