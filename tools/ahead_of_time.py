"""Compiles the Triton kernels ahead of time for a named architecture, on any machine.

Needs a process without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gpsa_kernels.backends.base import Call, Saved
from gpsa_kernels.backends.triton.launch import KernelCall, plan_backward, plan_forward
from tools.machine_code import Code, Kernels, read

SHARED_MEMORY_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # bytes a block may use

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
}


class Variant(NamedTuple):
    """One kernel as it is launched for one shape class on one architecture."""

    capability: int
    dtype: str
    head_dim: int
    case: str  # of CASES
    kernel: str

    def __str__(self) -> str:
        return f"{self.kernel} {self.dtype} D={self.head_dim} {self.case}"


# grid and dropout, for every form of the positional branch and every width of its kernels
CASES = {
    "14x14": ((14, 14), 0.0),
    "14x14-dropout": ((14, 14), 0.1),
    "32x32": ((32, 32), 0.0),
    "64x64": ((64, 64), 0.0),
    "128x128": ((128, 128), 0.0),
}


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
    tokens = grid_size[0] * grid_size[1]

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_()

    q, k, v, grad_out = (tensor(batch, tokens, heads, head_dim).transpose(1, 2) for _ in range(4))
    pos_weight, gate = tensor(heads, 3, dtype=torch.float32), tensor(heads, dtype=torch.float32)
    seed = torch.ones(1, dtype=torch.int64, device=device) if dropout_p else None
    call = Call(q, k, v, pos_weight, gate, seed, *grid_size, head_dim**-0.5, dropout_p)
    forward, (_, *saved) = plan_forward(call, True, capability)
    backward, *_ = plan_backward(grad_out, call, Saved(*saved), capability)
    return [*forward, *backward]


def _calls(variant: Variant) -> list[KernelCall]:
    grid_size, dropout_p = CASES[variant.case]
    dtype = getattr(torch, variant.dtype)
    return training_step(2, 3, variant.head_dim, grid_size, dtype, dropout_p, variant.capability)


def _name(call: KernelCall) -> str:
    return call.kernel.__name__ + ("_transposed" if call.arguments.get("TRANSPOSED") else "")


def variants(capabilities: Iterable[int], head_dims: Collection[int] = (32, 48, 64, 128)) -> list[Variant]:
    """What is compiled: each kernel in each form that it is launched in, without repetitions."""
    attention_cases = ("14x14", "14x14-dropout", "32x32")
    shapes = [("bfloat16", head_dim, case) for head_dim in (32, 48, 64, 128) for case in attention_cases]
    shapes += [("bfloat16", 48, "64x64"), ("bfloat16", 48, "128x128")]
    shapes += [("float32", 48, case) for case in (*attention_cases, "64x64")]
    chosen: list[Variant] = []
    for capability, (dtype, head_dim, case) in itertools.product(capabilities, shapes):
        shape = Variant(capability, dtype, head_dim, case, "")
        if head_dim not in head_dims:
            continue
        wanted = {
            "attention": case in attention_cases,  # the same for every grid that takes the same form
            "separable": head_dim == 48,
            "axis": (dtype, head_dim, case) == ("bfloat16", 48, "14x14"),
        }
        names = dict.fromkeys(map(_name, _calls(shape)))
        chosen += [shape._replace(kernel=name) for name in names if wanted[name.partition("_")[0]]]
    return chosen


def measure_all(chosen: Sequence[Variant], workers: int = 2) -> Kernels:
    """The figures of each variant, compiled in ``workers`` processes, in the order given."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        codes = pool.map(measure, chosen)
        return {(f"sm_{v.capability}", str(v)): code for v, code in zip(chosen, codes, strict=True)}


def measure(variant: Variant) -> Code:
    """Compiles one variant and reads its figures."""
    call = next(call for call in _calls(variant) if _name(call) == variant.kernel)
    compiled = compile_call(call, variant.capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (code,) = read(Path(file.name)).values()
    return code._replace(shared=compiled.metadata.shared)


def _source(call: KernelCall) -> ASTSource:
    """The specialisation that Triton itself would compile for these arguments."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def type_of(value: Any, path: tuple[int, ...], parameter: Any) -> Any:
        if isinstance(value, tuple) and not parameter.is_constexpr:
            return type(value)(*(type_of(part, (*path, i), parameter) for i, part in enumerate(value)))
        specialized = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialized and isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, Tensor) or (isinstance(value, int) and specialized and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            return _POINTERS[value.dtype]
        return "i32" if isinstance(value, int) else "fp32"

    for parameter in call.kernel.params:
        signature[parameter.name] = type_of(call.arguments[parameter.name], (parameter.num,), parameter)
    return ASTSource(call.kernel, signature, constants, attributes)


def compile_call(call: KernelCall, capability: int) -> Any:
    """Triton's compiled kernel of ``call`` for ``capability`` (80 for sm_80)."""
    return triton.compile(_source(call), target=GPUTarget("cuda", capability, 32), options=call.options)
