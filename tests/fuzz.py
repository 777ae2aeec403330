"""Calls drawn at random over shapes, layouts, dtypes, structure and extremes, held to the rule of exactness."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from reference import assert_as_exact_as_eager
from torch import Tensor

from gpsa_kernels import gpsa_attention

STRUCTURES = {
    "noise": lambda t: t,
    "zero": lambda t: 0 * t,
    "constant": lambda t: t[:, :, :1].expand_as(t),
    "almost constant": lambda t: t[:, :, :1] + 1e-3 * t,
    "two regions": lambda t: torch.where(
        (torch.arange(t.size(2)) < t.size(2) // 2)[:, None], t[:, :, :1], t[:, :, -1:]
    ),
    "far from zero": lambda t: t + 8 * t[:, :, :1],
    "one outlier": lambda t: t * (1 + 99.0 * (torch.arange(t.size(2)) == t.size(2) // 2)[:, None]) / 10,
    "one channel": lambda t: t * (torch.arange(t.size(3)) == 0),
}


class Drawn(NamedTuple):
    """A call; what is not a number or a name follows from the seed."""

    seed: int
    backend: str
    dtype: torch.dtype
    batch: int
    heads: int
    grid_size: tuple[int, int]
    head_dim: int
    scale: float
    structures: tuple[str, ...]  # of q, k, v and the gradient
    sizes: tuple[float, ...]
    layouts: tuple[tuple[tuple[int, ...], int, int], ...]  # order of the axes in memory, padding, axis that is expanded
    pos_weight: float
    gate: float
    parameters: torch.dtype


def draw(seed: int, backends: Sequence[str], dtypes: Sequence[torch.dtype], tokens: int, step: int = 1) -> Drawn:
    """Up to ``tokens`` tokens, and 40 channels in multiples of ``step``."""
    pick = random.Random(seed)
    rows = pick.choice([1, 2, 3, pick.randint(1, tokens)])
    grid_size = (rows, pick.randint(1, max(1, tokens // rows)))
    dtype = pick.choice(dtypes)
    return Drawn(
        seed,
        pick.choice(backends),
        dtype,
        pick.choice([1, 1, 1, 2]),
        pick.choice([1, 1, 2, 3]),
        grid_size if pick.random() < 0.5 else grid_size[::-1],
        step * pick.randint(1, 40 // step),
        pick.choice([0.25, 0.25, 1.0, 5.0, -0.3, 0.0]),
        tuple(pick.choice([*STRUCTURES, "noise", "constant"]) for _ in range(4)),
        tuple(pick.choice([0.1, 1.0, 1.0, 3.0]) for _ in range(4)),
        tuple(
            (tuple(pick.sample(range(3), 3)), pick.choice([0, 0, 8, 3]), pick.choice([-1, -1, 0, 1])) for _ in range(4)
        ),
        10 ** pick.uniform(-3, 2),
        pick.choice([0.0, 1.0, 10.0, 100.0]),
        pick.choice([dtype, dtype, torch.float64 if dtype == torch.float64 else torch.float32]),
    )


def _laid_out(t: Tensor, order: tuple[int, ...], padding: int, expanded: int) -> Tensor:
    """The same shape in another layout, with NaN in what lies between; along an expanded axis the first of all."""
    if expanded >= 0:
        return _laid_out(t.narrow(expanded, 0, 1), order, padding, -1).expand_as(t)
    memory = t.new_full([*(t.size(axis) for axis in order), t.size(3) + padding], torch.nan)
    view = memory[..., padding:].permute(*(order.index(axis) for axis in range(3)), 3)
    return view.copy_(t)


def check(drawn: Drawn) -> None:
    """Output and gradients of a drawn call. What is raised ends with the call, as it can be given to this function."""
    generator = torch.Generator().manual_seed(drawn.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = drawn.batch, drawn.heads, math.prod(drawn.grid_size), drawn.head_dim
    *tensors, grad_out = (
        _laid_out((size * STRUCTURES[structure](normal(*shape))).to(drawn.dtype), *layout)
        for structure, size, layout in zip(drawn.structures, drawn.sizes, drawn.layouts, strict=True)
    )
    tensors += [(drawn.pos_weight * normal(drawn.heads, 3)).to(drawn.dtype)]
    tensors += [(drawn.gate * normal(drawn.heads)).to(drawn.dtype)]

    def call(q, k, v, pos_weight, gate, grid_size, scale):
        parameters = pos_weight.to(drawn.parameters), gate.to(drawn.parameters)
        return gpsa_attention(q, k, v, *parameters, grid_size, scale=scale, backend=drawn.backend)

    try:
        assert_as_exact_as_eager(call, tensors, drawn.grid_size, drawn.scale, grad_out=grad_out, structured=True)
    except Exception as error:
        raise AssertionError(f"{error}\n{drawn}") from error


def fuzz(seed: str, calls: int, *settings: object) -> None:
    """``calls`` calls, from a seed that is fixed or, where it is called fresh, new in every run."""
    source = random.Random(None if seed.startswith("fresh") else seed)
    for _ in range(calls):
        check(draw(source.getrandbits(32), *settings))
