"""Allocates, and puts the kernels of one call in order.

The kernels of a call are first listed, then run, so that the same list can be compiled ahead of time for an
architecture that is not there.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpsa_kernels.backends.base import Call, Forward, Gradients, Saved
from gpsa_kernels.backends.triton import attention_backward as backward_kernels
from gpsa_kernels.backends.triton import attention_forward as forward_kernels
from gpsa_kernels.backends.triton import positional as positional_kernels
from gpsa_kernels.backends.triton.rules import (
    attention_launch,
    head_parts,
    padded,
    position_form,
    positional_launch,
)
from gpsa_kernels.tensors import accumulation_dtype, empty_output, parameter_gradients

_TABLE_ELEMENTS = 4096  # of one program of the table kernel


class KernelCall(NamedTuple):
    """One launch: ``programs`` blocks, and the compiler's options."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, int]


class ForwardPlan(NamedTuple):
    calls: list[KernelCall]
    result: Forward


class BackwardPlan(NamedTuple):
    calls: list[KernelCall]
    grad_q: Tensor
    grad_k: Tensor
    grad_v: Tensor
    sums: Tensor  # (B * H, slots, 4): of the three weights and of the gate


class _Position(NamedTuple):
    """The two tables, the means of the offset and its square under their rows, and how they are used."""

    ax: Tensor
    ay: Tensor
    moments_x: Tensor
    moments_y: Tensor
    form: str  # of rules.position_form


def _plan_tables(call: Call) -> tuple[KernelCall, _Position]:
    pos_weight, heads, element_size = call.pos_weight, call.q.size(1), call.q.element_size()
    dtype = accumulation_dtype(call.q.dtype)
    position = _Position(
        ax=pos_weight.new_empty((heads, call.columns, call.columns), dtype=dtype),
        ay=pos_weight.new_empty((heads, call.rows, call.rows), dtype=dtype),
        moments_x=pos_weight.new_empty((heads, 2, call.columns), dtype=dtype),
        moments_y=pos_weight.new_empty((heads, 2, call.rows), dtype=dtype),
        form=position_form(call.grid_size, call.has_dropout, element_size),
    )
    length = padded(max(call.grid_size))
    tile = max(1, min(16, _TABLE_ELEMENTS // length))
    programs = heads * (triton.cdiv(call.rows, tile) + triton.cdiv(call.columns, tile))
    arguments = {
        "pos_weight": pos_weight.contiguous(),
        **{name: getattr(position, name) for name in ("ax", "ay", "moments_x", "moments_y")},
        "rows": call.rows,
        "columns": call.columns,
        "TILE": tile,
        "LENGTH": length,
        "SUM": _sum_dtype(dtype),
    }
    return KernelCall(positional_kernels.axis_tables, programs, arguments, {"num_warps": 4}), position


def _sum_dtype(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if accumulation_dtype(dtype) == torch.float64 else tl.float32


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Batch, head and token strides as kernel arguments: q_batch, q_head, q_token, ..."""
    return {
        f"{name}_{axis}": t.stride(i)
        for name, t in tensors.items()
        for i, axis in enumerate(("batch", "head", "token"))
    }


def _common(call: Call) -> dict[str, Any]:
    """The arguments that every kernel on the tokens takes."""
    tf32 = call.q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "heads": call.q.size(1),
        "tokens": call.q.size(2),
        "columns": call.columns,
        "HEAD_DIM": call.q.size(3),
        "PRECISION": "tf32" if tf32 else "ieee",
        "SUM": _sum_dtype(call.q.dtype),
    }


def _plan_attention(
    kernel: str, call: Call, position: _Position, capability: int, arguments: dict[str, Any]
) -> KernelCall:
    """An attention kernel: a program for each tile of queries, in backward_key of keys."""
    q = call.q
    launch = attention_launch(kernel, q.size(3), q.element_size(), position.form, capability)
    tile = launch.key_tile if kernel == "backward_key" else launch.query_tile
    module = forward_kernels if kernel == "forward" else backward_kernels
    first, rest = head_parts(q.size(3), kernel)
    arguments |= {
        **_common(call),
        "ax": position.ax,
        "ay": position.ay,
        "seed": call.seed,
        "scale": call.scale,
        "dropout_p": call.dropout_p,
        "keep_scale": 0.0 if call.dropout_p == 1 else 1 / (1 - call.dropout_p),
        "FIRST": first,
        "REST": rest,
        "QUERY_TILE": launch.query_tile,
        "KEY_TILE": launch.key_tile,
        "POSITION": position.form,
        "COLUMN_TILE": 16,
    }
    programs = q.size(0) * q.size(1) * triton.cdiv(q.size(2), tile)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    if launch.registers is not None:
        options["maxnreg"] = launch.registers
    return KernelCall(getattr(module, f"attention_{kernel}"), programs, arguments, options)


def _plan_separable(kernel: Any, call: Call, position: _Position, arguments: dict[str, Any]) -> KernelCall:
    launch = positional_launch(call.columns, call.q.element_size())
    arguments |= {
        **_common(call),
        "ax": position.ax,
        "ay": position.ay,
        "CHANNELS": launch.channels,
        "ROW_TILE": launch.row_tile,
        "COLUMN_TILE": padded(call.columns),
    }
    programs = call.q.size(0) * call.q.size(1) * _separable_slots(call)
    return KernelCall(kernel, programs, arguments, {"num_warps": launch.warps, "num_stages": 2})


def _separable_slots(call: Call) -> int:
    """Programs of the positional kernels for one batch element and head."""
    launch = positional_launch(call.columns, call.q.element_size())
    return triton.cdiv(call.rows, launch.row_tile) * triton.cdiv(call.q.size(3), launch.channels)


def plan_forward(call: Call, save: bool, capability: int) -> ForwardPlan:
    q, k, v = call.q, call.k, call.v
    dtype = accumulation_dtype(q.dtype)
    out = empty_output(q)
    content = empty_output(q) if save else None
    logsumexp = q.new_empty(q.shape[:3], dtype=dtype) if save else None
    tables, position = _plan_tables(call)
    calls = [tables]
    if position.form == "slabs":
        product = {"x": v, "out": out, "gate": None, **_strides(x=v), "TRANSPOSED": False}
        calls.append(_plan_separable(positional_kernels.separable_product, call, position, product))
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "gate": call.gate.contiguous(),
        "out": out,
        "content": content,
        "logsumexp": logsumexp,
        **_strides(q=q, k=k, v=v),
    }
    calls.append(_plan_attention("forward", call, position, capability, arguments))
    return ForwardPlan(calls, Forward(out, content, logsumexp))


def plan_backward(grad_out: Tensor, call: Call, saved: Saved, capability: int) -> BackwardPlan:
    q, k, v, gate = call.q, call.k, call.v, call.gate.contiguous()
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()  # an expanded gradient, out.sum() for one
    grad_q, grad_k, grad_v = empty_output(q), empty_output(q), empty_output(q)
    tables, position = _plan_tables(call)
    calls = [tables]

    launch = attention_launch("backward_query", q.size(3), q.element_size(), position.form, capability)
    query_slots = triton.cdiv(q.size(2), launch.query_tile)
    slots = query_slots + (0 if position.form == "dense" else _separable_slots(call))
    sums = q.new_empty((q.size(0) * q.size(1), slots, 4), dtype=saved.logsumexp.dtype)
    moments = {"moments_x": position.moments_x, "moments_y": position.moments_y}

    if position.form == "slabs":
        product = {"x": grad_out, "out": grad_v, "gate": gate, **_strides(x=grad_out), "TRANSPOSED": True}
        calls.append(_plan_separable(positional_kernels.separable_product, call, position, product))
    if position.form != "dense":
        gradient = {
            "grad_out": grad_out,
            "v": v,
            "gate": gate,
            "sums": sums,
            "slots": slots,
            "first_slot": query_slots,
            "QUERY_COLUMNS": positional_launch(call.columns, q.element_size()).query_columns,
            **moments,
            **_strides(g=grad_out, v=v),
        }
        calls.append(_plan_separable(positional_kernels.separable_gradient, call, position, gradient))

    shared = {
        "grad_out": grad_out,
        "q": q,
        "k": k,
        "v": v,
        "gate": gate,
        "logsumexp": saved.logsumexp,
        "delta": torch.empty_like(saved.logsumexp),
        **_strides(g=grad_out, q=q, k=k, v=v),
    }
    query = shared | {"content": saved.content, "grad_q": grad_q, "sums": sums, "slots": slots} | moments
    calls.append(_plan_attention("backward_query", call, position, capability, query))
    key = shared | {"grad_k": grad_k, "grad_v": grad_v}
    calls.append(_plan_attention("backward_key", call, position, capability, key))
    return BackwardPlan(calls, grad_q, grad_k, grad_v, sums)


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
    plan = plan_forward(call, save, _capability(call.q))
    _run(plan.calls, call.q)
    return plan.result


def backward(grad_out: Tensor, call: Call, saved: Saved) -> Gradients:
    plan = plan_backward(grad_out, call, saved, _capability(call.q))
    _run(plan.calls, call.q)
    # a slot by (batch, head) and not by batch: dividing by the heads would cost the kernels registers
    of_heads = plan.sums.unflatten(0, call.q.shape[:2]).sum((0, 2))
    sums = torch.cat((of_heads[:, :3].flatten(), of_heads[:, 3])).unsqueeze(0)
    return Gradients(plan.grad_q, plan.grad_k, plan.grad_v, *parameter_gradients(sums, call.pos_weight, call.gate))
