"""The process in which ``check`` runs the kernels: proves them by the rule of exactness, and times them.

python -m gpsa_kernels.check.worker DEVICE CONNECTION answers each request, a list, with what was found; {"unsupported":
reason}; {"wrong": what}; {"cannot": what this machine lacks, which is no fault of a kernel}.
"""

from __future__ import annotations

import contextlib
import faulthandler
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpsa_kernels import verdict
from gpsa_kernels.backends import BACKENDS, Call
from gpsa_kernels.check import LIMIT
from gpsa_kernels.check.apart import Answer
from gpsa_kernels.check.exactness import NAMES, deviations, inputs, kept_by_dropout, with_gradients
from gpsa_kernels.functional import gpsa_attention
from gpsa_kernels.verdict import ALONE, Kind

_DROPOUT = 0.3
_HEADS = {"cuda": 9, "cpu": 4}
_TOKENS = {"cuda": 128 * 196, "cpu": 8 * 196}  # of all images of a large batch
_LARGEST_MAPS = {"cuda": 2**28, "cpu": 2**25}  # numbers in the maps of a call that forms them
_SECONDS = 0.1  # for the samples of a time, or one sample if that takes longer


def machine(device: torch.device) -> Answer:
    """What this process sees of the machine, after its first call of the GPU."""
    torch.zeros(1, device=device)
    return {"machine": verdict.machine(device.index or 0) if device.type == "cuda" else {}}


def _unsupported(name: str, tensors: list[Tensor], dropout_p: float) -> str | None:
    backend, (q, k, v, pos_weight, gate) = BACKENDS[name], tensors
    call = Call(q, k, v, pos_weight, gate, None, 1, q.size(2), 1.0, dropout_p)
    return backend.unavailable() or backend.unsupported(call)


def _same_seed(*arguments: Any, **settings: Any) -> Tensor:
    """Every call drops the same."""
    torch.manual_seed(0)
    return gpsa_attention(*arguments, **settings)


def prove(device: torch.device, name: str, dtype_name: str, dropout: bool, problem: Sequence[int]) -> Answer:
    """Judges a backend by the rule of exactness, forward, backward and without gradients, and runs it once more.

    The answer has its largest error, and that of eager in the same dtype, in parts of the largest result.
    """
    batch, heads, rows, columns, head_dim = problem
    dtype, grid_size = getattr(torch, dtype_name), (rows, columns)
    tensors = [t.detach() for t in inputs(batch, heads, grid_size, head_dim, dtype)]
    tensors[3] *= 8 / max(grid_size) ** 2  # no scores so large that 16-bit eager, the yardstick, is off by its size
    there = [t.to(device) for t in tensors]
    settings: dict[str, Any] = {"backend": name, "dropout_p": _DROPOUT if dropout else 0.0}
    if reason := _unsupported(name, there, settings["dropout_p"]):
        return {"unsupported": reason}
    about = f"of {rows}x{columns} tokens, head_dim {head_dim}"
    kept = kept_by_dropout(_same_seed, batch, heads, grid_size, dtype, device, **settings) if dropout else None
    runs = [with_gradients(_same_seed, there, torch.ones_like(there[0]), grid_size, **settings) for _ in range(2)]
    inference = _same_seed(*there, grid_size, **settings)
    error = eager = 0.0
    for gradients in (True,) if torch.equal(inference, runs[0][0]) else (True, False):
        rule: dict[str, Any] = {"device": device, "gradients": gradients, "mask": kept}
        for found in deviations(_same_seed, tensors, grid_size, **rule, **settings):
            if not found.error <= found.allowed:
                return {"wrong": f"{found.name} {about}: error {found.error:.1e}, allowed {found.allowed:.1e}"}
            error, eager = max(error, found.error / found.size), max(eager, found.eager / found.size)
    differ = [name for name, a, b in zip(NAMES, *runs, strict=True) if not torch.equal(a, b)]
    if differ and device.type in BACKENDS[name].kernel_devices:
        return {"wrong": f"{differ[0]} {about}: two runs differ"}
    return {"error": error, "eager": eager}


def measure(device: torch.device, name: str, *about: Any) -> Answer:
    """Times a call of a kind: forward, or both ways."""
    kind = Kind(*about)
    heads, tokens, training = _HEADS[device.type], kind.side**2, kind.mode != "inference"
    batch = max(2, _TOKENS[device.type] // tokens) if kind.large else 1
    has_maps = name == "eager" or (name == ALONE and kind.mode == "dropout")
    if has_maps and batch * heads * tokens**2 > _LARGEST_MAPS[device.type]:
        return {"unsupported": "its maps would take gigabytes"}

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device).to(getattr(torch, kind.dtype)).requires_grad_(training)

    *qkv, grad_out = (normal(batch, heads, tokens, kind.head_dim) for _ in range(4))
    tensors, dropout_p = [*qkv, normal(heads, 3), normal(heads)], 0.1 if kind.mode == "dropout" else 0.0
    if name == ALONE:
        tensors = qkv
        function: Callable[..., Tensor] = partial(F.scaled_dot_product_attention, dropout_p=dropout_p)
    elif reason := _unsupported(name, tensors, dropout_p):
        return {"unsupported": reason}
    else:
        function = partial(gpsa_attention, grid_size=(kind.side,) * 2, dropout_p=dropout_p, backend=name)

    def call() -> None:
        out = function(*tensors)
        if training:
            torch.autograd.grad(out, tensors, grad_out)

    return {"us": 1e6 * _seconds(call, device)}


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    """Of one of several calls in a row, so that on a GPU the slower of launching and running counts."""

    def seconds(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    seconds(1)  # compiles
    once = seconds(1)
    count = max(1, int(_SECONDS / 10 / once))
    return statistics.median(seconds(count) for _ in range(max(1, min(5, int(_SECONDS / once)))))


_ACTIONS: dict[str, Callable[..., Answer]] = {"machine": machine, "prove": prove, "measure": measure}


def answer(device: torch.device, what: str, *arguments: Any) -> Answer:
    """The answer to a request."""
    try:
        found = _ACTIONS[what](device, *arguments)
        if device.type == "cuda":
            torch.cuda.synchronize()  # what failed on the GPU is told here
        return found
    except Exception as error:  # of whatever kind, it is what we are here to find
        of_the_machine = isinstance(error, (torch.OutOfMemoryError, OSError, subprocess.CalledProcessError))
        reason = f"{type(error).__name__}: {error}".strip().split("\n")[0]
        return {"cannot" if of_the_machine or "C compiler" in str(error) else "wrong": reason}


def main() -> None:
    """Answers until the process that asks is gone; what that would have killed by then ends by itself."""
    device, connection = torch.device(sys.argv[1]), Connection(int(sys.argv[2]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with contextlib.suppress(EOFError):
        while True:
            request = connection.recv()
            faulthandler.dump_traceback_later(2 * LIMIT, exit=True)
            connection.send(answer(device, *request))
            faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
