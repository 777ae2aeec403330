"""What a call costs before any kernel starts: a backend that computes nothing, reached in every way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gpsa_kernels
from benchmarks import timing
from benchmarks.measure import Effort, failed
from benchmarks.results import Row
from gpsa_kernels.backends.base import Backend, Forward, Gradients

Q = torch.randn(1, 1, 4, 8)
POS_WEIGHT, GATE = torch.randn(1, 3), torch.randn(1)
SETTINGS = (2, 2, 1.0, 0.0)


def kernel_forward(*_: Any) -> Forward:
    """Allocates what a kernel would fill."""
    return Forward(torch.empty_like(Q), torch.empty_like(Q), Q.new_empty(1, 1, 4))


def kernel_backward(*_: Any) -> Gradients:
    """Allocates what a kernel would fill."""
    return Gradients(*(torch.empty_like(t) for t in (Q, Q, Q, POS_WEIGHT, GATE)))


class Bare(torch.autograd.Function):
    """The thinnest Function around the same kernels."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        out, content, logsumexp = kernel_forward()
        ctx.save_for_backward(*tensors, content, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Gradients:
        return kernel_backward(*ctx.saved_tensors)


CALLS = 200


def rows(effort: Effort) -> Iterator[Row]:
    """Microseconds on one thread: on a CPU whatever the device, for it is the CPU that they cost."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for direction, calls in peers().items():
            timed = timing.Interleaved({peer: timing.inner(call, CALLS) for peer, call in calls.items()})
            timed.run(max(effort.least, effort.rounds // 4), effort.budget, least=effort.least)
            header = {"section": "dispatch", "workload": "no work", "direction": direction}
            for peer, seconds in timed.seconds.items():
                yield {**header, "peer": peer, "status": "ok", "timer": "wall clock", **timing.summary(seconds)}
            for peer, error in timed.failures.items():
                yield failed({**header, "peer": peer}, error)
    finally:
        torch.set_num_threads(threads)
        gpsa_kernels.BACKENDS.pop("null", None)


def peers() -> dict[str, dict[str, Callable[[], Any]]]:
    """The calls of each direction: forward without a graph, both with one."""
    null = Backend(
        name="null",
        unavailable=lambda: None,
        unsupported=lambda *_: None,
        forward=kernel_forward,
        backward=kernel_backward,
        kernel_devices=frozenset({"cpu"}),
    )
    gpsa_kernels.BACKENDS["null"] = null
    tensors = [t.clone().requires_grad_() for t in (Q, Q, Q, POS_WEIGHT, GATE)]
    operator = torch.ops.gpsa.attention_forward

    @torch.library.custom_op("gpsa_bench::forward", mutates_args=())
    def custom_op(q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(kernel_forward())

    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, *output[1:])

    custom_op.register_autograd(lambda ctx, *_: tuple(kernel_backward(*ctx.saved_tensors)), setup_context=setup_context)

    calls: dict[str, Callable[[], Any]] = {
        "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(*tensors[:3]),
        "bare autograd.Function": lambda: Bare.apply(*tensors),
        "torch.ops.gpsa.attention_forward": lambda: operator(*tensors, None, *SETTINGS, "null")[0],
        "gpsa_attention": lambda: gpsa_kernels.gpsa_attention(*tensors, (2, 2), scale=1.0, backend="null"),
        "torch.library.custom_op": lambda: custom_op(*tensors)[0],
    }

    return {
        "forward": {name: torch.no_grad()(call) for name, call in calls.items()},
        "both": {
            name: lambda call=call: torch.autograd.grad(call(), tensors, Q, allow_unused=True)
            for name, call in calls.items()
        },
    }
