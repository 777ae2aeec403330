"""Compiles the Triton kernels ahead of time for a named architecture, on any machine.

Needs a process without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from gpsa_kernels.backends.base import Call, Saved
from gpsa_kernels.backends.triton.launch import KernelCall, plan_backward, plan_forward
from tools.machine_code import Code, Kernels, read

SHARED_MEMORY_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # bytes a block may use


class Variant(NamedTuple):
    """One kernel as it is launched on a square grid on one architecture."""

    capability: int
    dtype: str
    head_dim: int
    side: int
    dropout: bool
    kernel: str

    def __str__(self) -> str:
        return f"{self.kernel} {self.dtype} D={self.head_dim} {self.side}x{self.side}{'-dropout' * self.dropout}"


def training_step(
    batch: int,
    heads: int,
    head_dim: int,
    grid_size: tuple[int, int],
    dtype: torch.dtype,
    dropout_p: float,
    capability: int,
    device: str = "meta",
) -> list[KernelCall]:
    """Every launch of a forward and a backward pass on random numbers, or on tensors without memory."""
    qkvg = torch.empty(4, batch, math.prod(grid_size), heads, head_dim, dtype=dtype, device=device).normal_()
    q, k, v, grad_out = qkvg.transpose(2, 3)
    pos_weight = torch.empty(heads, 3, device=device).normal_()
    gate = torch.empty(heads, device=device).normal_()
    seed = torch.ones(1, dtype=torch.int64, device=device) if dropout_p else None
    call = Call(q, k, v, pos_weight, gate, seed, *grid_size, head_dim**-0.5, dropout_p)
    forward, (_, *saved) = plan_forward(call, True, capability)
    backward, *_ = plan_backward(grad_out, call, Saved(*saved), capability)
    return [*forward, *backward]


def _calls(variant: Variant) -> dict[str, KernelCall]:
    """The launches of a training step, by the kernel's name."""
    capability, dtype, head_dim, side, dropout, _ = variant
    calls = training_step(2, 3, head_dim, (side, side), getattr(torch, dtype), 0.1 * dropout, capability)
    return {call.kernel.__name__ + "_transposed" * bool(call.arguments.get("TRANSPOSED")): call for call in calls}


def variants(capabilities: Iterable[int], head_dims: Collection[int] = (32, 48, 64, 128)) -> list[Variant]:
    """What is compiled: each kernel for every form of the positional branch and every width, without repetitions."""
    forms = [(14, False), (14, True), (32, False)]
    shapes = [("bfloat16", head_dim, *form) for head_dim in (32, 48, 64, 128) for form in forms]
    shapes += [("bfloat16", 48, 64, False), ("bfloat16", 48, 128, False)]
    shapes += [("float32", 48, *form) for form in (*forms, (64, False))]
    chosen: list[Variant] = []
    for capability, shape in itertools.product(capabilities, shapes):
        variant = Variant(capability, *shape, "")
        wanted = {
            "attention": variant.side <= 32,  # the same for every grid that takes the same form
            "separable": variant.head_dim == 48,
            "axis": shape == ("bfloat16", 48, 14, False),
        }
        if variant.head_dim in head_dims:
            names = [name for name in _calls(variant) if wanted[name.partition("_")[0]]]
            chosen += [variant._replace(kernel=name) for name in names]
    return chosen


def measure_all(chosen: Sequence[Variant], workers: int = 2) -> Kernels:
    """The figures of each variant, compiled in ``workers`` processes, in the order given."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        codes = pool.map(measure, chosen)
        return {(f"sm_{v.capability}", str(v)): code for v, code in zip(chosen, codes, strict=True)}


class _Architecture(NamedTuple):
    """What Triton asks of a driver before it compiles; the GPU that it answers for need not be there."""

    capability: int

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def measure(variant: Variant) -> Code:
    """Compiles one variant, in a process that does nothing else, and reads its figures."""
    call = _calls(variant)[variant.kernel]
    triton.runtime.driver.set_active(_Architecture(variant.capability))
    compiled = call.kernel.warmup(**call.arguments, **call.options, grid=(call.programs,))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (code,) = read(Path(file.name)).values()
    return code._replace(shared=compiled.metadata.shared)
