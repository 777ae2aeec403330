"""``python -m gpsa_kernels check``: proves and times the backends on this machine, for ``backend="auto"`` to go by.

Every question is put to another process (:mod:`.worker`) with a time limit (:mod:`.apart`). Nothing here computes.
"""

from __future__ import annotations

import copy
import datetime
import math
import sys
import time
from collections.abc import Callable, Sequence
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
# (tiled, head_dim) -> batch, heads, grid and head_dim: a usual call, and one that no tile divides. Two, because Triton
# compiles kernels for each.
_PROBLEMS = {
    (False, 48): [(2, 3, 14, 14, 48), (1, 2, 5, 7, 24)],
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


def _is_kernel(name: str) -> bool:
    return BACKENDS[name].compose is None


def names() -> list[str]:
    """The backends that are there, but Triton's interpreter, the kernels last: what comes before is proven by then."""
    timed = [name for name in BACKENDS if not (name == "triton" and triton.INTERPRETED)]
    return sorted((name for name in timed if BACKENDS[name].unavailable() is None), key=_is_kernel)


def find_out(
    device: torch.device,
    known: Verdict,
    kinds: Sequence[Kind],
    proofs: Sequence[Proof],
    seconds: float,
    command: Sequence[str] = (sys.executable, "-m", "gpsa_kernels.check.worker"),
    tell: Callable[[str], None] = lambda about: None,
) -> Findings:
    """Has the backends timed for kinds of calls, each once it is proven, then more of them proven; until time is over.

    A backend that crashes or does not end is wrong. A class of calls has times where there is one of a kernel, or where
    neither lack of time nor the machine is to blame that there is none.

    Raises:
        Refused: the worker does not come to see the machine that ``known`` is about.
    """
    found = Findings(copy.deepcopy(known))
    found.verdict.date = datetime.date.today().isoformat()
    wrong, end = found.verdict.proofs, time.monotonic() + seconds
    with Worker([*command, str(device)]) as worker:

        def ask(about: object, what: str, *arguments: object) -> Answer:
            tell(str(about))
            limit = min(end - time.monotonic(), _LIMIT)
            answer = worker.ask([what, *arguments], limit) if limit > 0 else None
            if answer is None and limit < _LIMIT:
                return {"skipped": "no time was left"}
            return answer or {"wrong": f"it did not end within {limit:.0f} s"}

        def prove(proof: Proof) -> Answer:
            error = eager = 0.0
            for problem in _PROBLEMS[proof.tiled, proof.head_dim]:
                answer = ask(proof, "prove", proof.backend, proof.dtype, proof.dropout, *problem)
                if "error" not in answer:
                    break
                error, eager = max(error, answer["error"]), max(eager, answer["eager"])
            else:
                answer = {"error": error, "eager": eager}
            if "wrong" in answer or "error" in answer:
                wrong[str(proof)] = answer.get("wrong", "")
            return answer

        def measure(proof: Proof, dtype: str, shape: ShapeClass) -> Answer:
            """The answer of the proof where a backend is not proven."""
            if str(proof) not in wrong and proof not in found.proofs:
                found.proofs[proof] = prove(proof)
            if wrong.get(str(proof)) != "":
                return found.proofs.get(proof, {})
            answer = ask(f"{proof.backend} {shape}", "measure", proof.backend, dtype, *shape)
            wrong[str(proof)] = answer.get("wrong", "")
            return answer

        here = ask(device, "machine")
        if here.get("machine") != known.machine:
            reasons = [here[key] for key in ("wrong", "cannot", "skipped") if key in here]
            raise Refused(*reasons or ["the process that checks sees another GPU"])
        for dtype, shape in kinds:
            answers = {name: measure(shape.proof(name, dtype), dtype, shape) for name in names()}
            times = {name: answer["us"] for name, answer in answers.items() if "us" in answer}
            missing = any("skipped" in answer or "cannot" in answer for answer in answers.values())
            if not missing or any(map(_is_kernel, times)):
                found.verdict.times[str(shape)] = times
            found.alone[str(shape)] = ask(f"{ALONE} {shape}", "measure", ALONE, dtype, *shape).get("us", math.nan)
        found.proofs |= {proof: prove(proof) for proof in proofs if proof not in found.proofs}
    return found


def everything() -> tuple[list[Kind], list[Proof]]:
    """All that ``python -m gpsa_kernels check`` finds out, small grids first."""
    kinds = [(dtype, shape) for dtype in ("bfloat16", "float32") for shape in verdict.shapes(dtype)]
    proofs = {shape.proof(name, dtype): None for dtype in DTYPES for shape in verdict.shapes(dtype) for name in names()}
    return sorted(kinds, key=lambda kind: kind[1].side), list(proofs)


def one_kind(device: torch.device, dtype: str, shape: ShapeClass, known: Verdict, **settings: Any) -> Verdict:
    """What is known after SHORT seconds of checking calls of a kind, and of those that it will meet with.

    Raises:
        Refused: the machine is to blame that nothing can be found out.
    """
    kinds = [(dtype, shape)]
    for other in verdict.shapes(dtype):
        if other[2:4] == shape[2:4] and (other.mode == "dropout") == (shape.mode == "dropout") and other != shape:
            kinds.append((dtype, other))
    found = find_out(device, known, kinds, (), SHORT, **settings)
    reasons = [answer["cannot"] for answer in found.proofs.values() if "cannot" in answer]
    if reasons and found.verdict.fastest(shape, dtype) is None:
        raise Refused(reasons[0])
    return found.verdict
