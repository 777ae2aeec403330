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
from itertools import product
from typing import Any

import torch

from gpsa_kernels import verdict
from gpsa_kernels.backends import BACKENDS, triton
from gpsa_kernels.check.apart import Answer, Worker
from gpsa_kernels.verdict import DTYPES, Proof, ShapeClass, Verdict

SHORT = 30.0  # seconds that the first call of a kind may take
ALONE = "alone"  # torch's attention without a position, which is timed beside the backends
_LIMIT = 20.0  # seconds for one answer
# batch, heads, grid and head_dim: of each family of kernels, whole image and tiled, the usual ones and some odd ones
_PROBLEMS = {
    False: [(2, 3, 14, 14, 48), (1, 2, 5, 7, 64), (1, 1, 16, 13, 24), (1, 2, 9, 7, 128)],
    True: [(1, 2, 24, 24, 48), (1, 1, 7, 50, 64), (1, 1, 130, 2, 128)],
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
    proofs: Sequence[Proof],
    kinds: Sequence[Kind],
    seconds: float,
    command: Sequence[str] = (sys.executable, "-m", "gpsa_kernels.check.worker"),
    tell: Callable[[str], None] = lambda about: None,
) -> Findings:
    """Has backends proven, and those that are proven timed, as far as the time goes.

    A backend that crashes or does not end is wrong. A class of calls has times where every backend was asked, and it is
    not the machine's fault that there is no kernel among them.

    Raises:
        Refused: the worker does not come to see the machine that ``known`` is about.
    """
    found = Findings(copy.deepcopy(known))
    found.verdict.date = datetime.date.today().isoformat()
    right, end = found.verdict.proofs, time.monotonic() + seconds
    with Worker([*command, str(device)]) as worker:

        def ask(what: str, *about: object) -> Answer:
            tell(" ".join(map(str, about)))
            limit = min(end - time.monotonic(), _LIMIT)
            answer = worker.ask([what, *about], limit) if limit > 0 else None
            if answer is None and limit < _LIMIT:
                return {"skipped": "no time was left"}
            return answer or {"wrong": f"it did not end within {limit:.0f} s"}

        def prove(proof: Proof) -> Answer:
            error = eager = 0.0
            for problem in _PROBLEMS[proof.tiled]:
                answer = ask("prove", proof.backend, proof.dtype, proof.dropout, *problem)
                if "error" not in answer:
                    return answer
                error, eager = max(error, answer["error"]), max(eager, answer["eager"])
            return {"error": error, "eager": eager}

        here = ask("machine")
        if here.get("machine") != known.machine:
            raise Refused(here.get("wrong") or here.get("cannot") or "the process that checks sees another GPU")
        for proof in proofs:
            answer = found.proofs[proof] = prove(proof)
            if "wrong" in answer or "error" in answer:
                right[str(proof)] = answer.get("wrong", "")
        for dtype, shape in kinds:
            own = [shape.proof(name, dtype) for name in names()]
            answers = {p: ask("measure", p.backend, dtype, *shape) for p in own if right.get(str(p)) == ""}
            right |= {str(p): answer["wrong"] for p, answer in answers.items() if "wrong" in answer}
            obstacles = {
                key for p in own for key in ("skipped", "cannot") if key in answers.get(p, found.proofs.get(p, {}))
            }
            kernels = any("us" in answers.get(p, {}) for p in own if _is_kernel(p.backend))
            if not obstacles or (kernels and "skipped" not in obstacles):
                found.verdict.times[str(shape)] = {p.backend: a["us"] for p, a in answers.items() if "us" in a}
            found.alone[str(shape)] = ask("measure", ALONE, dtype, *shape).get("us", math.nan)
    return found


def everything() -> tuple[list[Proof], list[Kind]]:
    """All that ``python -m gpsa_kernels check`` finds out, small grids first."""
    proofs = [Proof(*p) for p in product(names(), DTYPES, (False, True), (False, True))]
    kinds = [(dtype, shape) for dtype in ("bfloat16", "float32") for shape in verdict.shapes(dtype)]
    return proofs, sorted(kinds, key=lambda kind: kind[1].side)


def one_kind(device: torch.device, dtype: str, shape: ShapeClass, known: Verdict, **settings: Any) -> Verdict:
    """What is known after calls of a kind have been checked, in SHORT seconds; those that it will meet in time, too.

    Raises:
        Refused: the machine is to blame that nothing can be found out.
    """
    proofs = [shape.proof(name, dtype) for name in names()]
    related = [
        s for s in verdict.shapes(dtype) if s[2:4] == shape[2:4] and (s.mode == "dropout") == (shape.mode == "dropout")
    ]
    kinds = [(dtype, s) for s in sorted(related, key=lambda s: s != shape)]
    new = [proof for proof in proofs if str(proof) not in known.proofs]
    found = find_out(device, known, new, kinds, SHORT, **settings)
    reasons = [answer["cannot"] for answer in found.proofs.values() if "cannot" in answer]
    if reasons and found.verdict.fastest(shape, dtype) is None:
        raise Refused(reasons[0])
    return found.verdict
