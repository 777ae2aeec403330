"""Allocates, and puts the kernels of one call in order.

The kernels of a call are first listed, then run, so that the same list can be compiled ahead of time for an
architecture that is not there.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gpsa_kernels.backends.base import Call, Forward, Gradients, Saved
from gpsa_kernels.backends.triton import attention, positional
from gpsa_kernels.backends.triton.rules import attention_launch, head_parts, padded, position_form, positional_launch
from gpsa_kernels.tensors import accumulation_dtype, empty_output, parameter_gradients

_TABLE_ELEMENTS = 4096  # of one program of the table kernel
_MOST_REGISTERS = 255  # of a thread; named where the compiler would rather spill than take a few more

Arguments = dict[str, Any]  # by name; a kernel takes those that it names


class Strides(NamedTuple):
    """Of a (B, H, N, D), in elements; its channels are contiguous."""

    batch: int
    head: int
    token: int


class Tables(NamedTuple):
    """The two factors of the positional softmax, and the means of the offset and of its square under their rows."""

    ax: Tensor  # (H, C, C)
    ay: Tensor  # (H, R, R)
    moments_x: Tensor  # (H, 2, C)
    moments_y: Tensor  # (H, 2, R)


class KernelCall(NamedTuple):
    """One launch: ``programs`` blocks, and the compiler's options."""

    kernel: Any
    programs: int
    arguments: Arguments
    options: dict[str, int]


def _strided(**tensors: Tensor) -> Arguments:
    """Tensors and their strides: q, q_strides, ..."""
    return tensors | {f"{name}_strides": Strides(*t.stride()[:3]) for name, t in tensors.items()}


def _arguments(call: Call) -> Arguments:
    """What follows from the call alone: its fields, and memory for the tables."""
    q, heads, rows, columns = call.q, call.q.size(1), call.rows, call.columns
    dtype, shapes = accumulation_dtype(q.dtype), ((columns, columns), (rows, rows), (2, columns), (2, rows))
    tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "tables": Tables(*(q.new_empty((heads, *shape), dtype=dtype) for shape in shapes)),
        **_strided(q=q, k=call.k, v=call.v),
        "pos_weight": call.pos_weight.contiguous(),
        "gate": call.gate.contiguous(),
        "seed": call.seed,
        "heads": heads,
        "tokens": q.size(2),
        "rows": rows,
        "columns": columns,
        "scale": call.scale,
        "dropout_p": call.dropout_p,
        "keep_scale": 0.0 if call.dropout_p == 1 else 1 / (1 - call.dropout_p),
        "HEAD_DIM": q.size(3),
        "POSITION": position_form(call),
        "PRECISION": "tf32" if tf32 else "ieee",
    }


def _kernel_call(kernel: Any, programs: int, given: Arguments, warps: int, **options: int) -> KernelCall:
    arguments = {name: given[name] for name in kernel.arg_names}
    return KernelCall(kernel, programs, arguments, {"num_warps": warps, **options})


def _axis_tables(given: Arguments) -> KernelCall:
    length = padded(max(given["rows"], given["columns"]))
    tile = max(1, min(16, _TABLE_ELEMENTS // length))
    programs = given["heads"] * (triton.cdiv(given["rows"], tile) + triton.cdiv(given["columns"], tile))
    return _kernel_call(positional.axis_tables, programs, given | {"TILE": tile, "LENGTH": length}, warps=4)


def _attention(kernel: str, call: Call, given: Arguments, capability: int) -> KernelCall:
    """An attention kernel: a program for each tile of queries, in backward_key of keys."""
    q = call.q
    launch = attention_launch(kernel, call, capability)
    tile = launch.key_tile if kernel == "backward_key" else launch.query_tile
    programs = q.size(0) * q.size(1) * triton.cdiv(q.size(2), tile)
    parts = head_parts(q.size(3), kernel)
    tiles = {"PARTS": parts, "QUERY_TILE": launch.query_tile, "KEY_TILE": launch.key_tile}
    options = {"num_stages": launch.stages}
    if q.element_size() > 2 and q.size(3) <= 64:
        options["maxnreg"] = _MOST_REGISTERS
    return _kernel_call(getattr(attention, f"attention_{kernel}"), programs, given | tiles, launch.warps, **options)


def _separable(kernel: Any, call: Call, given: Arguments) -> KernelCall:
    """A kernel of the separable product: a program for each slab."""
    q, launch = call.q, positional_launch(call)
    tiles = {
        "CHANNELS": launch.channels,
        "ROW_TILE": launch.row_tile,
        "COLUMN_TILE": padded(call.columns),
        "QUERY_COLUMNS": launch.query_columns,
    }
    programs = q.size(0) * q.size(1) * _slabs(call)
    return _kernel_call(kernel, programs, given | tiles, launch.warps, num_stages=2)


def _slabs(call: Call) -> int:
    """Of one pair."""
    launch = positional_launch(call)
    return triton.cdiv(call.rows, launch.row_tile) * triton.cdiv(call.q.size(3), launch.channels)


def plan_forward(call: Call, save: bool, capability: int) -> tuple[list[KernelCall], Forward]:
    """The launches for compute capability ``capability`` (80 for sm_80), and what they fill."""
    result = Forward.empty(call.q, save)
    given = _arguments(call) | result._asdict()
    calls = [_axis_tables(given)]
    if given["POSITION"] == "slabs":
        mixed = {**_strided(x=call.v), "TRANSPOSED": False}
        calls.append(_separable(positional.separable_product, call, given | mixed))
    return [*calls, _attention("forward", call, given, capability)], result


def plan_backward(
    grad_out: Tensor, call: Call, saved: Saved, capability: int
) -> tuple[list[KernelCall], tuple[Tensor, Tensor, Tensor], Tensor]:
    """The launches; the gradients of q, k and v; and (B * H, slots, 4) sums, of the three weights and of the gate."""
    q = call.q
    grads = empty_output(q), empty_output(q), empty_output(q)
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()  # an expanded gradient, out.sum() for one
    given = _arguments(call) | saved._asdict() | dict(zip(("grad_q", "grad_k", "grad_v"), grads, strict=True))
    form = given["POSITION"]
    query_slots = triton.cdiv(q.size(2), attention_launch("backward_query", call, capability).query_tile)
    slots = query_slots + (0 if form == "dense" else _slabs(call))
    sums = q.new_empty((q.size(0) * q.size(1), slots, 4), dtype=saved.logsumexp.dtype)
    given |= {
        **_strided(grad_out=grad_out),
        "delta": torch.empty_like(saved.logsumexp),
        "sums": sums,
        "slots": slots,
        "first_slot": query_slots,
    }

    calls = [_axis_tables(given)]
    if form == "slabs":
        mixed = {**_strided(x=grad_out), "out": grads[2], "TRANSPOSED": True}
        calls.append(_separable(positional.separable_product, call, given | mixed))
    if form != "dense":
        calls.append(_separable(positional.separable_gradient, call, given))
    calls += [_attention(kernel, call, given, capability) for kernel in ("backward_query", "backward_key")]
    return calls, grads, sums


def _capability(q: Tensor) -> int:
    if not q.is_cuda:
        return 80  # the interpreter
    major, minor = torch.cuda.get_device_capability(q.device)
    return 10 * major + minor


def _run(calls: list[KernelCall], q: Tensor) -> None:
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        for call in calls:
            if call.programs:
                call.kernel[(call.programs,)](**call.arguments, **call.options)


def forward(call: Call, save: bool) -> Forward:
    calls, result = plan_forward(call, save, _capability(call.q))
    _run(calls, call.q)
    return result


def backward(grad_out: Tensor, call: Call, saved: Saved) -> Gradients:
    calls, grads, sums = plan_backward(grad_out, call, saved, _capability(call.q))
    _run(calls, call.q)
    # a slot by (batch, head) and not by batch: dividing by the heads would cost the kernels registers
    of_heads = sums.unflatten(0, call.q.shape[:2]).sum((0, 2))
    sums = torch.cat((of_heads[:, :3].flatten(), of_heads[:, 3])).unsqueeze(0)
    return Gradients(*grads, *parameter_gradients(sums, call.pos_weight, call.gate))
