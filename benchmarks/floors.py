"""The least that any implementation has to do, and how fast this machine can do it.

Per batch element and head, N tokens, head size D: every input is read once and every output written once (4 N D
elements forward, 7 N D backward: q, k, v, dO read, dQ, dK, dV written); the content takes two matrix products forward
and five backward, 2 N^2 D flops each; the separable position takes 2 N (R + C) D flops forward and three times that
backward; the content softmax takes N^2 exponentials in either direction.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.workloads import Case, ModelWorkload

ELEMENT_SIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class Work(NamedTuple):
    """What has to be done at least."""

    bytes: int
    flops: int
    exponentials: int = 0

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


class Rates(NamedTuple):
    """What this machine does a second, measured."""

    copied_bytes: float  # read and written
    flops: float


class Floor(NamedTuple):
    """The time below which no implementation comes, and what sets it."""

    seconds: float
    bound: str  # memory or matmul


def attention_work(case: Case, direction: str) -> Work:
    """Of the operator, over the whole batch; ``direction`` is forward, backward or both."""
    if direction == "both":
        return attention_work(case, "forward") + attention_work(case, "backward")
    tensors, products, mixes = {"forward": (4, 2, 1), "backward": (7, 5, 3)}[direction]
    tokens, dim = case.tokens, case.head_dim
    pairs = case.batch * case.heads
    return Work(
        bytes=pairs * tensors * tokens * dim * ELEMENT_SIZE[case.dtype],
        flops=pairs * (products * 2 * tokens**2 * dim + mixes * 2 * tokens * (case.rows + case.columns) * dim),
        exponentials=pairs * tokens**2,
    )


def layer_work(case: Case, direction: str) -> Work:
    """Of a whole layer: the attention's matrix products and those of the four C x C projections (C = heads * head_dim).

    Forward reads x and the weights and writes the result; backward reads x, the gradient and the weights and writes
    the gradients of x and the weights. What is in between might stay on the chip.
    """
    if direction == "both":
        return layer_work(case, "forward") + layer_work(case, "backward")
    dim = case.heads * case.head_dim
    tensors, weights, factor = {"forward": (2, 1, 1), "backward": (3, 2, 2)}[direction]
    attention = attention_work(case, direction)
    elements = case.batch * case.tokens * dim * tensors + 4 * dim * dim * weights
    return Work(
        bytes=elements * ELEMENT_SIZE[case.dtype],
        flops=attention.flops + factor * 8 * case.batch * case.tokens * dim * dim,
        exponentials=attention.exponentials,
    )


def model_work(workload: ModelWorkload, dim: int, depth: int) -> Work:
    """Matrix products of a vision transformer of this width and depth, patch 16, MLP ratio 4; training is three times
    inference. Bytes are the parameters' alone: how often activations must be moved depends on the fusion."""
    tokens = (workload.image // 16) ** 2
    layer = 24 * tokens * dim**2 + 4 * tokens**2 * dim
    image = depth * layer + 2 * tokens * dim * 768 + 2 * dim * 1000
    steps = 3 if workload.direction == "training" else 1
    parameters = 12 * depth * dim**2 + 768 * dim + 1000 * dim
    return Work(bytes=steps * parameters * 4, flops=steps * workload.batch * image)


def floor(work: Work, rates: Rates) -> Floor:
    """The larger of the time to move the bytes and the time to multiply."""
    memory, matmul = work.bytes / rates.copied_bytes, work.flops / rates.flops
    return Floor(max(memory, matmul), "memory" if memory >= matmul else "matmul")


def measure_rates(device: str, dtype: str, small: bool = False) -> Rates:
    """The best of ten times five copies of a buffer far larger than any cache, and five large products in ``dtype``.

    ``small`` is for rehearsals: it takes no time and its figures mean nothing.
    """
    elements = 2**16 if small else 2**28 if device == "cuda" else 2**26
    side = 64 if small else 8192 if device == "cuda" else 1024
    source = torch.ones(elements, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, side, side, device=device).to(getattr(torch, dtype)).unbind()
    product = torch.empty_like(a)

    def best(call: Callable[[], object]) -> float:
        seconds = []
        for _ in range(10):
            _finish(device)
            start = time.perf_counter()
            for _ in range(5):  # the wait at the end does not show
                call()
            _finish(device)
            seconds.append((time.perf_counter() - start) / 5)
        return min(seconds)

    copy = best(lambda: target.copy_(source))
    multiply = best(lambda: torch.matmul(a, b, out=product))
    return Rates(copied_bytes=2 * 4 * elements / copy, flops=2 * side**3 / multiply)


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
