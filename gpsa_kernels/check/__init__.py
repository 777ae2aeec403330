"""``python -m gpsa_kernels check``: proves and times the backends on this machine, for ``backend="auto"`` to go by.

Every question is put to another process (:mod:`.worker`) with a time limit (:mod:`.apart`). Nothing here computes.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import queue
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from gpsa_kernels import verdict
from gpsa_kernels.backends import BACKENDS, triton
from gpsa_kernels.check.apart import Answer, Worker
from gpsa_kernels.verdict import ALONE, Kind, Verdict

SHORT = 30.0  # seconds that the first call of a kind may take
LIMIT = 20.0  # seconds for one answer
WORKER: Sequence[str] = (sys.executable, "-m", "gpsa_kernels.check.worker")
_WORKERS = 6  # which prove at a time: most of that is compiling
# (tiled, head_dim) -> batch, heads, grid and head_dim: a usual call, and one that no tile divides; few, because Triton
# compiles kernels for each. Of few tokens in long lines the CUDA kernels are whole-image forward and tiled backward.
_PROBLEMS = {
    (False, 48): [(2, 3, 14, 14, 48), (1, 2, 5, 7, 24), (1, 1, 3, 60, 48)],
    (False, 64): [(1, 2, 14, 14, 64), (1, 2, 9, 7, 128)],
    (True, 48): [(1, 2, 24, 24, 48), (1, 1, 130, 2, 40)],
    (True, 64): [(1, 2, 24, 24, 64), (1, 1, 7, 50, 128)],
}


class Refused(Exception):
    """Why this machine cannot be checked now, which is no fault of a kernel."""


def names() -> list[str]:
    """The backends that are there; not Triton's interpreter, whose times mean nothing."""
    timed = [name for name in BACKENDS if not (name == "triton" and triton.INTERPRETED)]
    return [name for name in timed if BACKENDS[name].unavailable() is None]


def find_out(
    device: torch.device,
    found: Verdict,
    kinds: Sequence[Kind],
    seconds: float,
    reserved: float,
    tell: Callable[[str], None] = lambda about: None,
) -> dict[str, Answer]:
    """Adds to a verdict, and returns what the worker answered for each proof that the verdict lacked.

    Has backends proven, several at a time, then those that are right timed, for which the last seconds are reserved.
    A backend that crashes or does not end is wrong. A kind of calls has times where there is one of a kernel, or where
    neither lack of time nor the machine is to blame that there is none.

    Raises:
        Refused: the workers do not come to see the machine that the verdict is about.
    """
    end, backends = time.monotonic() + seconds, names()
    unproven = {kind.proof(name): (name, kind) for kind in kinds for name in backends}
    unproven = {proof: about for proof, about in unproven.items() if proof not in found.proofs}
    free: queue.SimpleQueue[Worker] = queue.SimpleQueue()

    def ask(until: float, about: object, what: str, *arguments: object) -> Answer:
        tell(str(about))
        worker = free.get()
        try:
            limit = min(until - time.monotonic(), LIMIT)
            answer = worker.ask([what, *arguments], limit) if limit > 0 else None
        finally:
            free.put(worker)
        if answer is None and limit < LIMIT:
            return {"skipped": "no time was left"}
        return answer or {"wrong": f"it did not end within {limit:.0f} s"}

    def prove(proof: str) -> Answer:
        name, kind = unproven[proof]
        answers = []
        for problem in _PROBLEMS[kind.tiled, kind.head_dim]:
            answers.append(ask(end - reserved, proof, "prove", name, kind.dtype, kind.mode == "dropout", problem))
            if "error" not in answers[-1]:
                return answers[-1]
        return max(answers, key=lambda answer: answer["error"])

    def measure(name: str, kind: Kind) -> Answer:
        """The answer of the proof where a backend is not proven."""
        proof = kind.proof(name)
        if found.proofs.get(proof) != "":
            return proofs.get(proof, {})
        answer = ask(end, f"{name} {kind}", "measure", name, *kind)
        found.proofs[proof] = answer.get("wrong", "")
        return answer

    with contextlib.ExitStack() as stack:
        count = max(1, min(_WORKERS, os.cpu_count() or 1, len(unproven)))
        for _ in range(count):
            free.put(worker := Worker([*WORKER, str(device)]))
            stack.callback(worker.stop)
        pool = ThreadPoolExecutor(count)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)  # before the workers go, whatever happens
        machine = pool.submit(ask, end, device, "machine")
        proofs = dict(zip(unproven, pool.map(prove, unproven), strict=True))
        if (here := machine.result()).get("machine") != found.machine:
            reasons = [here[key] for key in ("wrong", "cannot", "skipped") if key in here]
            raise Refused(*reasons or ["the process that checks sees another GPU"])
        found.date = datetime.date.today().isoformat()
        found.proofs |= {proof: a.get("wrong", "") for proof, a in proofs.items() if "wrong" in a or "error" in a}
        timed: set[str] = set()
        for kind in kinds:
            if str(kind) in timed:  # as another dtype of 16 bits
                continue
            timed.add(str(kind))
            answers = {name: measure(name, kind) for name in backends}
            times = {name: answer["us"] for name, answer in answers.items() if "us" in answer}
            missing = any("skipped" in answer or "cannot" in answer for answer in answers.values())
            if not missing or any(BACKENDS[name].compose is None for name in times):
                alone = ask(end, f"{ALONE} {kind}", "measure", ALONE, *kind).get("us")
                found.times[str(kind)] = times if alone is None else {**times, ALONE: alone}
    return proofs


def one_kind(device: torch.device, kind: Kind, found: Verdict) -> None:
    """Adds what SHORT seconds of checking calls of a kind find out, and those that it will meet with.

    Raises:
        Refused: the machine is to blame that nothing can be found out.
    """
    related = [k for k in verdict.kinds() if k.proof("") == kind.proof("") and k.side == kind.side]
    proofs = find_out(device, found, sorted(related, key=lambda k: k != kind), SHORT, reserved=5.0)
    reasons = [answer["cannot"] for answer in proofs.values() if "cannot" in answer]
    if reasons and found.fastest(kind) is None:
        raise Refused(reasons[0])
