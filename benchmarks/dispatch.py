"""What a call costs before any kernel starts: a backend that computes nothing, reached in every way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gpsa_kernels
from benchmarks import timing
from benchmarks.measure import time_all
from benchmarks.results import Row
from gpsa_kernels.backends.base import Backend, Forward, Gradients

Q = torch.randn(1, 1, 4, 8)
POS_WEIGHT, GATE = torch.randn(1, 3), torch.randn(1)
SETTINGS = (2, 2, 1.0, 0.0)
CALLS = 50  # in a sample


def kernel_forward(*_: Any) -> Forward:
    """Allocates what a kernel would fill."""
    return Forward(torch.empty_like(Q), torch.empty_like(Q), Q.new_empty(1, 1, 4))


def kernel_backward(*_: Any) -> Gradients:
    return Gradients(*(torch.empty_like(t) for t in (Q, Q, Q, POS_WEIGHT, GATE)))


NULL = Backend(
    name="null",
    unavailable=lambda: None,
    unsupported=lambda *_: None,
    forward=kernel_forward,
    backward=kernel_backward,
    kernel_devices=frozenset({"cpu"}),
)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])


class Bare(torch.autograd.Function):
    """The thinnest Function around the same kernels."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        output = kernel_forward()
        _keep(ctx, tensors, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Gradients:
        return kernel_backward(*ctx.saved_tensors)


def peers() -> dict[str, dict[str, Callable[[], Any]]]:
    """The calls of each direction: forward without a graph, both with one."""
    tensors = [t.clone().requires_grad_() for t in (Q, Q, Q, POS_WEIGHT, GATE)]
    operator = torch.ops.gpsa.attention_forward

    @torch.library.custom_op("gpsa_bench::forward", mutates_args=())
    def custom_op(q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(kernel_forward())

    custom_op.register_autograd(lambda ctx, *_: tuple(kernel_backward(*ctx.saved_tensors)), setup_context=_keep)

    calls: dict[str, Callable[[], Any]] = {
        "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(*tensors[:3]),
        "bare autograd.Function": lambda: Bare.apply(*tensors),
        "torch.ops.gpsa.attention_forward": lambda: operator(*tensors, None, *SETTINGS, "null")[0],
        "gpsa_attention": lambda: gpsa_kernels.gpsa_attention(*tensors, (2, 2), scale=1.0, backend="null"),
        "torch.library.custom_op": lambda: custom_op(*tensors)[0],
    }

    def both(call: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(call(), tensors, Q, allow_unused=True)

    forward = {name: torch.no_grad()(call) for name, call in calls.items()}
    return {"forward": forward, "both": {name: both(call) for name, call in calls.items()}}


def rows(effort: timing.Effort) -> Iterator[Row]:
    """Microseconds on one thread: on a CPU whatever the device, for it is the CPU that they cost."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gpsa_kernels.BACKENDS["null"] = NULL
    try:
        for direction, calls in peers().items():
            place = {"section": "dispatch", "workload": "no work", "direction": direction, "timer": "wall clock"}
            found: dict[str, Row] = {peer: {**place, "peer": peer} for peer in calls}
            time_all(found, {peer: timing.wall_clock(call, "cpu", CALLS) for peer, call in calls.items()}, effort)
            yield from found.values()
    finally:
        torch.set_num_threads(threads)
        del gpsa_kernels.BACKENDS["null"]
