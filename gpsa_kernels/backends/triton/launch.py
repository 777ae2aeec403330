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

from gpsa_kernels.backends.base import Forward, Gradients, empty_output, parameter_gradients
from gpsa_kernels.backends.triton import attention_backward as backward_kernels
from gpsa_kernels.backends.triton import attention_forward as forward_kernels
from gpsa_kernels.backends.triton import positional as positional_kernels
from gpsa_kernels.backends.triton.configs import (
    attention_launch,
    head_parts,
    padded,
    position_form,
    positional_launch,
)
from gpsa_kernels.positional import accumulation_dtype

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
    sums: Tensor  # (B * H, slots, 4), as base.parameter_gradients says


class _Position(NamedTuple):
    """The two tables, the means of the offset and its square under their rows, and how they are used."""

    ax: Tensor
    ay: Tensor
    moments_x: Tensor
    moments_y: Tensor
    form: str  # of configs.position_form


def _plan_tables(
    pos_weight: Tensor, grid_size: tuple[int, int], element_size: int, dropout_p: float
) -> tuple[KernelCall, _Position]:
    (rows, columns), heads = grid_size, pos_weight.size(0)
    dtype = torch.float64 if element_size == 8 else torch.float32
    position = _Position(
        ax=pos_weight.new_empty((heads, columns, columns), dtype=dtype),
        ay=pos_weight.new_empty((heads, rows, rows), dtype=dtype),
        moments_x=pos_weight.new_empty((heads, 2, columns), dtype=dtype),
        moments_y=pos_weight.new_empty((heads, 2, rows), dtype=dtype),
        form=position_form(grid_size, dropout_p, element_size),
    )
    length = padded(max(rows, columns))
    tile = max(1, min(16, _TABLE_ELEMENTS // length))
    programs = heads * (triton.cdiv(rows, tile) + triton.cdiv(columns, tile))
    arguments = {
        "pos_weight": pos_weight.contiguous(),
        **{name: getattr(position, name) for name in ("ax", "ay", "moments_x", "moments_y")},
        "rows": rows,
        "columns": columns,
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


def _common(q: Tensor, grid_size: tuple[int, int]) -> dict[str, Any]:
    """The arguments that every kernel on images takes."""
    tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "heads": q.size(1),
        "tokens": q.size(2),
        "columns": grid_size[1],
        "HEAD_DIM": q.size(3),
        "PRECISION": "tf32" if tf32 else "ieee",
        "SUM": _sum_dtype(q.dtype),
    }


def _plan_attention(
    kernel: str,
    tiled: str,
    q: Tensor,
    position: _Position,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    capability: int,
    arguments: dict[str, Any],
) -> KernelCall:
    """One attention kernel, its programs over tiles of ``tiled``: "query" or "key"."""
    launch = attention_launch(kernel, q.size(3), q.element_size(), position.form, capability)
    tile = launch.query_tile if tiled == "query" else launch.key_tile
    module = forward_kernels if kernel == "forward" else backward_kernels
    first, rest = head_parts(q.size(3))
    arguments |= {
        "ax": position.ax,
        "ay": position.ay,
        "seed": seed,
        "scale": scale,
        "dropout_p": dropout_p,
        "keep_scale": 0.0 if dropout_p == 1 else 1 / (1 - dropout_p),
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


def _plan_separable(
    kernel: Any, q: Tensor, position: _Position, grid_size: tuple[int, int], arguments: dict[str, Any]
) -> KernelCall:
    launch = positional_launch(grid_size[1], q.element_size())
    arguments |= {
        "ax": position.ax,
        "ay": position.ay,
        "CHANNELS": launch.channels,
        "ROW_TILE": launch.row_tile,
        "COLUMN_TILE": padded(grid_size[1]),
    }
    programs = q.size(0) * q.size(1) * _separable_slots(q, grid_size)
    return KernelCall(kernel, programs, arguments | _common(q, grid_size), {"num_warps": launch.warps, "num_stages": 2})


def _separable_slots(q: Tensor, grid_size: tuple[int, int]) -> int:
    """Programs of the positional kernels for one batch element and head."""
    launch = positional_launch(grid_size[1], q.element_size())
    return triton.cdiv(grid_size[0], launch.row_tile) * triton.cdiv(q.size(3), launch.channels)


def plan_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    seed: Tensor | None,
    grid_size: tuple[int, int],
    scale: float,
    dropout_p: float,
    save: bool,
    capability: int,
) -> ForwardPlan:
    dtype = accumulation_dtype(q.dtype)
    out = empty_output(q)
    content = empty_output(q) if save else None
    logsumexp = q.new_empty(q.shape[:3], dtype=dtype) if save else None
    tables, position = _plan_tables(pos_weight, grid_size, q.element_size(), dropout_p)
    calls = [tables]
    if position.form == "slabs":
        product = {"x": v, "out": out, "gate": None, **_strides(x=v), "TRANSPOSED": False}
        calls.append(_plan_separable(positional_kernels.separable_product, q, position, grid_size, product))
    arguments = {
        **{"q": q, "k": k, "v": v, "gate": gate.contiguous(), "out": out, "content": content, "logsumexp": logsumexp},
        **_strides(q=q, k=k, v=v),
        **_common(q, grid_size),
    }
    calls.append(_plan_attention("forward", "query", q, position, seed, scale, dropout_p, capability, arguments))
    if content is None or logsumexp is None:
        return ForwardPlan(calls, Forward(out, q.new_empty(0), q.new_empty(0, dtype=dtype)))
    return ForwardPlan(calls, Forward(out, content, logsumexp))


def plan_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    seed: Tensor | None,
    content: Tensor,
    logsumexp: Tensor,
    grid_size: tuple[int, int],
    scale: float,
    dropout_p: float,
    capability: int,
) -> BackwardPlan:
    dtype = accumulation_dtype(q.dtype)
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()  # an expanded gradient, out.sum() for one
    grad_q, grad_k, grad_v = empty_output(q), empty_output(q), empty_output(q)
    delta = torch.empty_like(logsumexp)
    tables, position = _plan_tables(pos_weight, grid_size, q.element_size(), dropout_p)
    calls = [tables]

    gate = gate.contiguous()
    launch = attention_launch("backward_query", q.size(3), q.element_size(), position.form, capability)
    query_slots = triton.cdiv(q.size(2), launch.query_tile)
    slots = query_slots + (0 if position.form == "tiles" else _separable_slots(q, grid_size))
    sums = q.new_empty((q.size(0) * q.size(1), slots, 4), dtype=dtype)
    moments = {"moments_x": position.moments_x, "moments_y": position.moments_y}

    if position.form == "slabs":
        product = {"x": grad_out, "out": grad_v, "gate": gate, **_strides(x=grad_out), "TRANSPOSED": True}
        calls.append(_plan_separable(positional_kernels.separable_product, q, position, grid_size, product))
    if position.form != "tiles":
        gradient = {
            **{"grad_out": grad_out, "v": v, "gate": gate},
            **{"sums": sums, "slots": slots, "first_slot": query_slots},
            "QUERY_COLUMNS": positional_launch(grid_size[1], q.element_size()).query_columns,
            **moments,
            **_strides(g=grad_out, v=v),
        }
        calls.append(_plan_separable(positional_kernels.separable_gradient, q, position, grid_size, gradient))

    shared = {
        **{"grad_out": grad_out, "q": q, "k": k, "v": v, "logsumexp": logsumexp, "delta": delta, "gate": gate},
        **_strides(g=grad_out, q=q, k=k, v=v),
        **_common(q, grid_size),
    }
    query = shared | {"content": content, "grad_q": grad_q, "sums": sums, "slots": slots} | moments
    calls.append(_plan_attention("backward_query", "query", q, position, seed, scale, dropout_p, capability, query))
    key = shared | {"grad_k": grad_k, "grad_v": grad_v}
    calls.append(_plan_attention("backward_key", "key", q, position, seed, scale, dropout_p, capability, key))
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


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    seed: Tensor | None,
    grid_size: tuple[int, int],
    scale: float,
    dropout_p: float,
    save: bool,
) -> Forward:
    plan = plan_forward(q, k, v, pos_weight, gate, seed, grid_size, scale, dropout_p, save, _capability(q))
    _run(plan.calls, q)
    return plan.result


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    seed: Tensor | None,
    content: Tensor,
    logsumexp: Tensor,
    grid_size: tuple[int, int],
    scale: float,
    dropout_p: float,
) -> Gradients:
    plan = plan_backward(
        grad_out, q, k, v, pos_weight, gate, seed, content, logsumexp, grid_size, scale, dropout_p, _capability(q)
    )
    _run(plan.calls, q)
    sums = plan.sums.view(q.size(0), q.size(1), plan.sums.size(1), 4)
    return Gradients(plan.grad_q, plan.grad_k, plan.grad_v, *parameter_gradients(sums, pos_weight, gate))
