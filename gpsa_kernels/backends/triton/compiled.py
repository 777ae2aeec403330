"""Compiles the kernels ahead of time for a named architecture, on any machine, and reads what became of them.

Needs a process without ``TRITON_INTERPRET``. Registers, spills and shared memory are read from the binary with the
``cuobjdump`` that comes with Triton: without a driver Triton itself leaves them unset.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gpsa_kernels.backends.base import Call, Saved
from gpsa_kernels.backends.triton.launch import KernelCall, plan_backward, plan_forward

ARCHITECTURES = (80, 90, 100, 120)
SHARED_MEMORY_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # bytes a block may use

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
}
_MATRIX_INSTRUCTION = re.compile(r"^\s*(?:@!?U?P\d+ )?(HMMA|HGMMA|UTCHMMA|UTCOMMA|UTCQMMA|DMMA)\b", re.MULTILINE)


class Usage(NamedTuple):
    """What one block of a compiled kernel takes, and how much tensor-core work its code holds."""

    registers: int  # of a thread
    spills: int  # bytes of a thread's registers kept in local memory
    shared: int  # bytes
    matrix_instructions: int  # in the code, loops counted once
    instructions: int


class Variant(NamedTuple):
    """One kernel as it is launched for one shape class on one architecture."""

    capability: int
    dtype: str
    head_dim: int
    case: str  # of CASES
    kernel: str

    def __str__(self) -> str:
        return f"sm_{self.capability} {self.dtype} D={self.head_dim} {self.case} {self.kernel}"


# grid and dropout, for every form of the positional branch and every width of its kernels
CASES = {
    "14x14": ((14, 14), 0.0),
    "14x14-dropout": ((14, 14), 0.1),
    "32x32": ((32, 32), 0.0),
    "64x64": ((64, 64), 0.0),
    "128x128": ((128, 128), 0.0),
}


def _calls(variant: Variant) -> list[KernelCall]:
    """Every launch of a training step with this variant's shape, on tensors without memory."""
    grid_size, dropout_p = CASES[variant.case]
    batch, heads, tokens = 2, 3, grid_size[0] * grid_size[1]
    dtype = getattr(torch, variant.dtype)

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = (tensor(batch, tokens, heads, variant.head_dim).transpose(1, 2) for _ in range(3))
    pos_weight, gate = tensor(heads, 3, dtype=torch.float32), tensor(heads, dtype=torch.float32)
    seed = tensor(1, dtype=torch.int64) if dropout_p else None
    call = Call(q, k, v, pos_weight, gate, seed, *grid_size, 1.0, dropout_p)
    forward = plan_forward(call, True, variant.capability)
    out, *saved = forward.result
    backward = plan_backward(out, call, Saved(*saved), variant.capability)
    return [*forward.calls, *backward.calls]


def _name(call: KernelCall) -> str:
    return call.kernel.__name__ + ("_transposed" if call.arguments.get("TRANSPOSED") else "")


def variants(capability: int) -> list[Variant]:
    """What is compiled for an architecture: each kernel in each form that it is launched in, without repetitions."""
    attention_cases = ("14x14", "14x14-dropout", "32x32")
    shapes = [("bfloat16", head_dim, case) for head_dim in (32, 48, 64, 128) for case in attention_cases]
    shapes += [("bfloat16", 48, "64x64"), ("bfloat16", 48, "128x128")]
    shapes += [("float32", 48, case) for case in (*attention_cases, "64x64")]
    chosen: list[Variant] = []
    for dtype, head_dim, case in shapes:
        shape = Variant(capability, dtype, head_dim, case, "")
        for name in dict.fromkeys(map(_name, _calls(shape))):
            of_attention = name.startswith("attention")  # the same for every grid that takes the same form
            if (of_attention and case in attention_cases) or (name.startswith("separable") and head_dim == 48):
                chosen.append(shape._replace(kernel=name))
    return [*chosen, Variant(capability, "bfloat16", 48, "14x14", "axis_tables")]


def measure(variant: Variant) -> Usage:
    """Compiles one variant and reads its resources."""
    call = next(call for call in _calls(variant) if _name(call) == variant.kernel)
    return usage(compile_call(call, variant.capability))


def _source(call: KernelCall) -> ASTSource:
    """The specialisation that Triton itself would compile for these arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for parameter in call.kernel.params:
        value = call.arguments[parameter.name]
        specialized = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialized and isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
        if isinstance(value, Tensor) or (isinstance(value, int) and specialized and value % 16 == 0):
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    return ASTSource(call.kernel, signature, constants, attributes)


def compile_call(call: KernelCall, capability: int) -> Any:
    """Triton's compiled kernel of ``call`` for ``capability`` (80 for sm_80)."""
    return triton.compile(_source(call), target=GPUTarget("cuda", capability, 32), options=call.options)


def usage(compiled: Any) -> Usage:
    """Resources of a compiled kernel, from its binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def dump(option: str) -> str:
            return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout

        resources, assembly = dump("-res-usage"), dump("-sass")
    figures = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", resources)}
    body = re.sub(r"/\*[0-9a-fx]+\*/", "", assembly)
    return Usage(
        registers=figures["REG"],
        spills=figures["STACK"] + figures["LOCAL"],
        shared=compiled.metadata.shared,
        matrix_instructions=len(_MATRIX_INSTRUCTION.findall(body)),
        instructions=len(re.findall(r"^ +\S.*;", body, re.MULTILINE)),
    )
