"""``python -m gpsa_kernels check``: proves and times the backends on this machine, for ``backend="auto"`` to go by.

Every question is put to another process (:mod:`.worker`) with a time limit (:mod:`.apart`). Nothing here computes.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import math
import os
import queue
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from gpsa_kernels import verdict
from gpsa_kernels.backends import BACKENDS, triton
from gpsa_kernels.check.apart import Answer, Worker
from gpsa_kernels.verdict import DTYPES, Proof, ShapeClass, Verdict

SHORT = 30.0  # seconds that the first call of a kind may take
ALONE = "alone"  # torch's attention without a position, which is timed beside the backends
_LIMIT = 20.0  # seconds for one answer
_WORKERS = 6  # which prove at a time: most of that is compiling
# (tiled, head_dim) -> batch, heads, grid and head_dim: a usual call, and one that no tile divides; few, because Triton
# compiles kernels for each. Of few tokens in long lines the CUDA kernels are whole-image forward and tiled backward.
_PROBLEMS = {
    (False, 48): [(2, 3, 14, 14, 48), (1, 2, 5, 7, 24), (1, 1, 3, 60, 48)],
    (False, 64): [(1, 2, 14, 14, 64), (1, 2, 9, 7, 128)],
    (True, 48): [(1, 2, 24, 24, 48), (1, 1, 130, 2, 40)],
    (True, 64): [(1, 2, 24, 24, 64), (1, 1, 7, 50, 128)],
}
Kind = tuple[str, ShapeClass]  # of calls: dtype and class


class Refused(Exception):
    """Why this machine cannot be checked now, which is no fault of a kernel."""


@dataclass
class Findings:
    """What was found out.

    Attributes:
        verdict: what is kept of it.
        proofs: what the worker answered.
        alone: microseconds of torch's attention without a position, for each class of calls.
    """

    verdict: Verdict
    proofs: dict[Proof, Answer] = field(default_factory=dict)
    alone: dict[str, float] = field(default_factory=dict)


def names() -> list[str]:
    """The backends that are there; not Triton's interpreter, whose times mean nothing."""
    timed = [name for name in BACKENDS if not (name == "triton" and triton.INTERPRETED)]
    return [name for name in timed if BACKENDS[name].unavailable() is None]


def find_out(
    device: torch.device,
    known: Verdict,
    proofs: Sequence[Proof],
    kinds: Sequence[Kind],
    seconds: float,
    reserved: float,
    command: Sequence[str] = (sys.executable, "-m", "gpsa_kernels.check.worker"),
    tell: Callable[[str], None] = lambda about: None,
) -> Findings:
    """Has backends proven, several at a time, then those that are right timed, for which the last seconds are reserved.

    A backend that crashes or does not end is wrong. A class of calls has times where there is one of a kernel, or where
    neither lack of time nor the machine is to blame that there is none.

    Raises:
        Refused: the workers do not come to see the machine that ``known`` is about.
    """
    found = Findings(copy.deepcopy(known))
    found.verdict.date = datetime.date.today().isoformat()
    wrong, end = found.verdict.proofs, time.monotonic() + seconds
    count = max(1, min(_WORKERS, os.cpu_count() or 1, len(proofs)))
    free: queue.SimpleQueue[Worker] = queue.SimpleQueue()

    def ask(until: float, about: object, what: str, *arguments: object) -> Answer:
        tell(str(about))
        worker = free.get()
        try:
            limit = min(until - time.monotonic(), _LIMIT)
            answer = worker.ask([what, *arguments], limit) if limit > 0 else None
        finally:
            free.put(worker)
        if answer is None and limit < _LIMIT:
            return {"skipped": "no time was left"}
        return answer or {"wrong": f"it did not end within {limit:.0f} s"}

    def prove(proof: Proof) -> Answer:
        error = eager = 0.0
        for problem in _PROBLEMS[proof.tiled, proof.head_dim]:
            answer = ask(end - reserved, proof, "prove", proof.backend, proof.dtype, proof.dropout, *problem)
            if "error" not in answer:
                return answer
            error, eager = max(error, answer["error"]), max(eager, answer["eager"])
        return {"error": error, "eager": eager}

    def measure(proof: Proof, shape: ShapeClass) -> Answer:
        """The answer of the proof where a backend is not proven."""
        if wrong.get(str(proof)) != "":
            return found.proofs.get(proof, {})
        answer = ask(end, f"{proof.backend} {shape}", "measure", proof.backend, proof.dtype, *shape)
        wrong[str(proof)] = answer.get("wrong", "")
        return answer

    with contextlib.ExitStack() as stack:
        for _ in range(count):
            free.put(stack.enter_context(Worker([*command, str(device)])))
        pool = ThreadPoolExecutor(count)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)  # before the workers go, whatever happens
        machine = pool.submit(ask, end, device, "machine")
        found.proofs = dict(zip(proofs, pool.map(prove, proofs), strict=True))
        if (here := machine.result()).get("machine") != known.machine:
            reasons = [here[key] for key in ("wrong", "cannot", "skipped") if key in here]
            raise Refused(*reasons or ["the process that checks sees another GPU"])
        wrong |= {str(p): a.get("wrong", "") for p, a in found.proofs.items() if "wrong" in a or "error" in a}
        for dtype, shape in kinds:
            answers = {name: measure(shape.proof(name, dtype), shape) for name in names()}
            times = {name: answer["us"] for name, answer in answers.items() if "us" in answer}
            missing = any("skipped" in answer or "cannot" in answer for answer in answers.values())
            if not missing or any(BACKENDS[name].compose is None for name in times):
                found.verdict.times[str(shape)] = times
            alone = ask(end, f"{ALONE} {shape}", "measure", ALONE, dtype, *shape)
            found.alone[str(shape)] = alone.get("us", math.nan)
    return found


def everything() -> tuple[list[Proof], list[Kind]]:
    """All that ``python -m gpsa_kernels check`` finds out, small grids first."""
    kinds = [(dtype, shape) for dtype in DTYPES for shape in verdict.shapes(dtype)]
    kinds.sort(key=lambda kind: kind[1].side)
    proofs = {shape.proof(name, dtype): None for dtype, shape in kinds for name in names()}
    return list(proofs), [kind for kind in kinds if kind[0] != "float16"]  # which takes as long as bfloat16


def one_kind(device: torch.device, dtype: str, shape: ShapeClass, known: Verdict, **settings: Any) -> Verdict:
    """What is known after SHORT seconds of checking calls of a kind, and of those that it will meet with.

    Raises:
        Refused: the machine is to blame that nothing can be found out.
    """
    proofs = [proof for name in names() if str(proof := shape.proof(name, dtype)) not in known.proofs]
    related = [
        s for s in verdict.shapes(dtype) if s.proof("", dtype) == shape.proof("", dtype) and s.side == shape.side
    ]
    kinds = [(dtype, s) for s in sorted(related, key=lambda s: s != shape)]
    found = find_out(device, known, proofs, kinds, SHORT, reserved=5.0, **settings)
    reasons = [answer["cannot"] for answer in found.proofs.values() if "cannot" in answer]
    if reasons and found.verdict.fastest(shape, dtype) is None:
        raise Refused(reasons[0])
    return found.verdict
