"""Runs backends once forward and backward and checks the numbers: what sanitizers and profilers are pointed at.

python -m benchmarks.exercise [--small]       in this process
python -m benchmarks.exercise --seconds 45    a process for each backend and direction, none longer than that

The last line of the second names the backends that are unfit: those that raised, died or did not end. What computes
wrong numbers is told, and fit: it harms nobody.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import product

import torch
from torch import Tensor

from benchmarks.apart import Gone, Worker, said
from benchmarks.measure import timed_call
from benchmarks.peers import Unavailable, allowed, deviation, formula, inputs, ours
from benchmarks.results import command_line
from benchmarks.workloads import Case, headline
from gpsa_kernels import BACKENDS

RIGHT, WRONG, FAILED = 0, 1, 2


def cases(device: str, small: bool) -> list[Case]:
    """Small: an odd grid and one for each family of kernels; otherwise the headline and one of the other family."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    tiled = Case(1, 2, 18, 18, 64, dtype)
    if small:
        return [Case(2, 3, 14, 14, 48, dtype), Case(1, 2, 5, 7, 32, dtype), tiled]
    return [headline(device, "full"), tiled]


@functools.cache
def posed(case: Case, device: str) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """A case's tensors, its output's gradient, and the formula on them, from the CPU, where no kernel of ours runs."""
    tensors = inputs(case, device, 0)
    grad_out = torch.randn_like(tensors[0])
    return tensors, grad_out, formula([t.cpu() for t in tensors], grad_out.cpu(), case, torch.float64)


def exercise(name: str, direction: str, device: str, small: bool) -> Iterator[int]:
    """Runs a backend up to the first failure, after which the device may refuse everything; yields what it was."""
    status = RIGHT
    for case in cases(device, small):
        try:
            tensors, grad_out, truth = posed(case, device)
            got = timed_call(ours(name).prepare(case, tensors), tensors, grad_out, direction)()
            found, limit = deviation([t.cpu() for t in got], truth), allowed(got[0].dtype, 0.0)
            told = "right"
            if not found <= limit:
                told, status = f"{found:.1e} from the formula, {limit:.1e} is allowed", WRONG
        except Unavailable as reason:
            told = f"unavailable: {reason}"
        except Exception as error:  # of whatever kind, it is what we are here to find
            told, status = f"failed: {said(error)}", FAILED
        print(f"{name} {direction}: {case}: {told}", flush=True)
        if status == FAILED:
            break
    yield status


def main(arguments: list[str] | None = None) -> int:
    """Exercises backends; returns 0 only where all are right or cannot run here."""
    parser = command_line("benchmarks.exercise", __doc__)
    parser.add_argument("--small", action="store_true", help="a few tokens, an even grid and an odd one")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), metavar="NAME")
    parser.add_argument("--seconds", type=float, help="limit for all, each in a process of its own")
    options = parser.parse_args(arguments)
    chosen = [(*one, options.device, options.small) for one in product(options.backends, ("forward", "both"))]
    if options.seconds is None:
        return max(status for one in chosen for status in exercise(*one))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(chosen))))
    end, statuses, unfit = time.monotonic() + options.seconds, [], set()
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(exercise, *one)) for one in chosen]
        for (name, direction, *_), worker in zip(chosen, workers, strict=True):
            try:
                statuses.append(worker.receive(max(0.0, end - time.monotonic())))
            except Gone as reason:
                print(f"{name} {direction}: {reason}", flush=True)
                statuses.append(FAILED)
            if statuses[-1] == FAILED:
                unfit.add(name)
    print("unfit:", *sorted(unfit))
    return max(statuses)


if __name__ == "__main__":
    raise SystemExit(main())
