"""Calls drawn at random over shapes, layouts, dtypes, structure and extremes, held to the rule of exactness."""

import math
import random
from collections.abc import Sequence

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


def _laid_out(t: Tensor, order: Sequence[int], padding: int, expanded: int) -> Tensor:
    """The same shape in another order of axes in memory, with NaN between rows; along an expanded axis (-1: none) the
    first of all."""
    if expanded >= 0:
        return _laid_out(t.narrow(expanded, 0, 1), order, padding, -1).expand_as(t)
    memory = t.new_full([*(t.size(axis) for axis in order), t.size(3) + padding], torch.nan)
    view = memory[..., padding:].permute(*(order.index(axis) for axis in range(3)), 3)
    return view.copy_(t)


def check(seed: int, backends: Sequence[str], dtypes: Sequence[torch.dtype], tokens: int, step: int = 1) -> None:
    """Output and gradients of a call that follows from the seed, with up to ``tokens`` tokens and 40 channels in
    multiples of ``step``. What is raised ends with what was drawn, and with the call of this function."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = pick.choice([1, 2, 3, pick.randint(1, tokens)])
    grid_size = (rows, pick.randint(1, max(1, tokens // rows)))
    grid_size = grid_size if pick.random() < 0.5 else grid_size[::-1]
    batch, heads, head_dim = pick.choice([1, 1, 1, 2]), pick.choice([1, 1, 2, 3]), step * pick.randint(1, 40 // step)
    shape = batch, heads, math.prod(grid_size), head_dim
    backend, dtype, scale = pick.choice(backends), pick.choice(dtypes), pick.choice([0.25, 0.25, 1.0, 5.0, -0.3, 0.0])
    drawn = f"{backend} {dtype} {shape} {grid_size} scale {scale}"
    tensors: list[Tensor] = []
    for _ in range(4):  # q, k, v and the gradient
        structure, size = pick.choice([*STRUCTURES, "noise", "constant"]), pick.choice([0.1, 1.0, 1.0, 3.0])
        layout = pick.sample(range(3), 3), pick.choice([0, 0, 8, 3]), pick.choice([-1, -1, 0, 1])
        drawn += f", {size} {structure} {layout}"
        tensors.append(_laid_out((size * STRUCTURES[structure](normal(*shape))).to(dtype), *layout))
    *tensors, grad_out = tensors
    weight, gate = 10 ** pick.uniform(-3, 2), pick.choice([0.0, 1.0, 10.0, 100.0])
    tensors += [(weight * normal(heads, 3)).to(dtype), (gate * normal(heads)).to(dtype)]
    parameters = pick.choice([dtype, dtype, torch.float64 if dtype == torch.float64 else torch.float32])
    drawn += f", {parameters} weights {weight} gates {gate}"

    def call(q, k, v, pos_weight, gate, grid_size, scale):
        own = pos_weight.to(parameters), gate.to(parameters)
        return gpsa_attention(q, k, v, *own, grid_size, scale=scale, backend=backend)

    try:
        assert_as_exact_as_eager(call, tensors, grid_size, scale, grad_out=grad_out, structured=True)
    except Exception as error:
        raise AssertionError(f"{error}\n{drawn}\ncheck{seed, backends, dtypes, tokens, step}") from error


def fuzz(seed: str, calls: int, *settings: object) -> None:
    """``calls`` calls, from a seed that is fixed or, where it is called fresh, new in every run."""
    source = random.Random(None if seed.startswith("fresh") else seed)
    for _ in range(calls):
        check(source.getrandbits(32), *settings)
