"""Runs backends once forward and backward and checks the numbers: what sanitizers and profilers are pointed at.

python -m benchmarks.exercise [--small]       in this process
python -m benchmarks.exercise --seconds 45    a process for each backend and direction, none longer than that

The last line of the second names the backends that are unfit: those that raised, died or did not end. What computes
wrong numbers is told, and fit: it harms nobody.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import torch
from torch import Tensor

from benchmarks.measure import gradients
from benchmarks.peers import Unavailable, allowed, deviation, formula, inputs, ours
from benchmarks.results import command_line
from benchmarks.workloads import Case, headline
from gpsa_kernels import BACKENDS

DIRECTIONS = ("forward", "backward")
RIGHT, FAILED, WRONG = 0, 1, 3  # 1 is also what Python itself ends with


def cases(device: str, small: bool) -> list[Case]:
    """Small: an odd grid and one for each family of kernels; otherwise the headline and one of the other family."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    tiled = Case(1, 2, 18, 18, 64, dtype)
    if small:
        return [Case(2, 3, 14, 14, 48, dtype), Case(1, 2, 5, 7, 32, dtype), tiled]
    return [headline(device, "full"), tiled]


@functools.cache
def posed(case: Case, device: str) -> tuple[list[Tensor], Tensor]:
    """A case's tensors and its output's gradient."""
    tensors = inputs(case, device, 0)
    return tensors, torch.randn_like(tensors[0])


@functools.cache
def truth(case: Case, device: str) -> list[Tensor]:
    """The formula on what is posed: computed on the CPU, where no kernel of ours has a part."""
    tensors, grad_out = posed(case, device)
    return formula([t.cpu() for t in tensors], grad_out.cpu(), case, torch.float64)


def exercise(name: str, case: Case, device: str, direction: str) -> str | None:
    """Calls a backend; what is wrong with its numbers, or None.

    Raises:
        Unavailable: it cannot run the case.
    """
    tensors, grad_out = posed(case, device)
    function = ours(name).prepare(case, tensors)
    if direction == "forward":
        with torch.no_grad():
            got = [function(*tensors)]
    else:
        got = gradients(function, tensors, grad_out)
    found, limit = deviation([t.cpu() for t in got], truth(case, device)), allowed(got[0].dtype, 0.0)
    return None if found <= limit else f"{found:.1e} from the formula, {limit:.1e} is allowed"


def here(name: str, direction: str, device: str, small: bool) -> int:
    """Exercises a backend in this process, up to the first failure, after which the device may refuse everything."""
    status = RIGHT
    for case in cases(device, small):
        about = f"{name} {direction}: {case}"
        try:
            problem = exercise(name, case, device, direction)
        except Unavailable as reason:
            print(f"{about}: unavailable: {reason}", flush=True)
            continue
        except Exception as error:  # of whatever kind, it is what we are here to find
            print(f"{about}: failed: {type(error).__name__}: {error}", flush=True)
            return FAILED
        print(f"{about}: {problem or 'right'}", flush=True)
        status = WRONG if problem else status
    return status


def apart(name: str, direction: str, device: str, small: bool, seconds: float) -> int | None:
    """Exercises a backend in a process of its own; its exit status, or None where it did not end."""
    words = ["--backends", name, "--directions", direction, "--device", device, *(["--small"] if small else [])]
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.exercise", *words])
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(seconds)
    print(f"{name} {direction}: did not end within {seconds:.0f} s", flush=True)
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    return None


def main(arguments: list[str] | None = None) -> int:
    """Exercises backends; returns 0 only where all are right or cannot run here."""
    parser = command_line("benchmarks.exercise", __doc__)
    parser.add_argument("--small", action="store_true", help="a few tokens, an even grid and an odd one")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), metavar="NAME")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    parser.add_argument("--seconds", type=float, help="limit for each backend and direction, apart from each other")
    options = parser.parse_args(arguments)
    chosen = list(product(options.backends, options.directions))
    where = options.device, options.small
    if options.seconds is None:
        return max(here(*one, *where) for one in chosen)
    processors = os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, processors // len(chosen))))
    with ThreadPoolExecutor(min(processors, len(chosen))) as pool:
        statuses = list(pool.map(lambda one: apart(*one, *where, options.seconds), chosen))
    unfit = {name for (name, _), status in zip(chosen, statuses, strict=True) if status not in (RIGHT, WRONG)}
    print("unfit:", *sorted(unfit))
    return 0 if set(statuses) == {RIGHT} else 1


if __name__ == "__main__":
    raise SystemExit(main())
