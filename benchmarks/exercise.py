"""Runs every backend once forward and backward and checks the numbers: what sanitizers and profilers are pointed at.

python -m benchmarks.exercise [--small]
"""

from __future__ import annotations

import argparse

import torch

from benchmarks import check
from benchmarks.measure import gradients
from benchmarks.peers import Unavailable, inputs, ours
from benchmarks.workloads import Case, headline
from gpsa_kernels import BACKENDS


def exercise(name: str, case: Case, device: str) -> str | None:
    """Calls a backend; what is wrong with its numbers, or None.

    Raises:
        Unavailable: it cannot run the case.
    """
    tensors = inputs(case, device, 0)
    grad_out = torch.randn_like(tensors[0])
    got = gradients(ours(name).prepare(case, tensors), tensors, grad_out)
    truth = check.formula(tensors, grad_out, case, torch.float64)
    dtype = getattr(torch, case.dtype)
    eager = check.deviation(check.formula(tensors, grad_out, case, dtype), truth)
    found, allowed = check.deviation(got, truth), check.allowed(dtype, eager)
    return None if found <= allowed else f"{found:.1e} from the formula, {allowed:.1e} is allowed"


def main(arguments: list[str] | None = None) -> int:
    """Exercises all backends; returns 1 where one is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exercise", description=__doc__)
    parser.add_argument("--small", action="store_true", help="a few tokens, an even grid and an odd one")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    dtype = "bfloat16" if options.device == "cuda" else "float32"
    small = [Case(2, 3, 14, 14, 48, dtype), Case(1, 2, 5, 7, 32, dtype), Case(1, 2, 18, 18, 64, dtype)]
    wrong = 0
    for case in small if options.small else [headline(options.device, "full")]:
        for name in BACKENDS:
            try:
                problem = exercise(name, case, options.device)
            except Unavailable as reason:
                print(f"{name}: {case}: unavailable: {reason}")
                continue
            print(f"{name}: {case}: {problem or 'right'}", flush=True)
            wrong += problem is not None
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
