"""The command ``python -m gpsa_kernels check``: which device, how far it is, and the table."""

from __future__ import annotations

import re
import sys
import time
from contextlib import nullcontext

import torch

from gpsa_kernels import auto, verdict
from gpsa_kernels._version import __version__
from gpsa_kernels.backends import Call
from gpsa_kernels.check import Refused, find_out, names
from gpsa_kernels.check.apart import Answer
from gpsa_kernels.info import aligned
from gpsa_kernels.verdict import ALONE, DTYPES, Kind, Verdict


def chosen_device(name: str | None) -> torch.device:
    """The device to check: the one that is named, or the GPU.

    Raises:
        ValueError: there is none, or there are several kinds to choose from.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_name(index) for index in range(count)]
    if name is None and not gpus:
        raise ValueError("no CUDA device was found; --device cpu checks what runs on the CPU")
    if name is None and len(set(gpus)) > 1:
        listed = ", ".join(f"cuda:{index} ({gpu})" for index, gpu in enumerate(gpus))
        raise ValueError(f"there are different GPUs, and each is checked by itself: --device takes one of {listed}")
    parts = re.fullmatch(r"(cpu|cuda)(?::(\d+))?", name or "cuda")
    if parts is None:
        raise ValueError(f"--device must be cpu or cuda:0, say, got {name!r}")
    if parts[1] == "cpu":
        return torch.device("cpu")
    index = int(parts[2] or 0)
    if index >= count:
        raise ValueError(f"--device {name}: {count or 'no'} CUDA device{'s were' if count != 1 else ' was'} found")
    return torch.device("cuda", index)


def command(name: str | None, seconds: float) -> int:
    """Checks, keeps the verdict of a GPU and prints the table; returns 0, 1 where a kernel is wrong, 2 for bad use."""
    start, kinds = time.monotonic(), verdict.kinds()

    def tell(about: str) -> None:
        if sys.stderr.isatty():
            line = f"{time.monotonic() - start:3.0f} s of {seconds} at most: {about[:48]}" if about else ""
            print(f"\r{line:<78}{'' if about else chr(13)}", end="", file=sys.stderr, flush=True)

    try:
        device = chosen_device(name)
        machine = verdict.machine(device.index) if device.type == "cuda" else {}
        with verdict.renewed(machine, seconds) if machine else nullcontext(Verdict({})) as kept:
            found = Verdict(machine)
            proofs = find_out(device, found, kinds, seconds, reserved=seconds / 3, tell=tell)
            kept.proofs |= found.proofs
            kept.times |= found.times
            kept.date = found.date
    except (ValueError, OSError, Refused) as error:
        print(f"gpsa_kernels check: {error}", file=sys.stderr)
        return 2
    tell("")
    print(table(found, proofs, device))
    if len(found.times) < len(set(map(str, kinds))):
        print(f"Not all was timed in {seconds} s: the next run is faster, with what is compiled by now; or --seconds")
    return 1 if any(found.proofs.values()) else 0


def table(found: Verdict, proofs: dict[str, Answer], device: torch.device) -> str:
    """What was found out, to be read in ten seconds: proofs, what is wrong, times, and what "auto" takes."""
    machine = found.machine or {"gpu": f"cpu, {torch.get_num_threads()} threads", "torch": torch.__version__}
    facts = [f"{key} {machine[key]}" for key in ("torch", "cuda", "triton") if key in machine]
    lines = [", ".join([machine["gpu"], *facts, f"gpsa_kernels {__version__}"]), ""]
    rows = [(name, *(_proof(proofs, name, dtype) for dtype in DTYPES)) for name in names()]
    lines.append(aligned([("error (eager's)", *DTYPES), *rows]))
    lines += [f"  {key}: {wrong}" for key, wrong in found.proofs.items() if wrong]
    for dtype, title in (("bfloat16", "16 bits"), ("float32", "float32")):
        lines += ["", *_times(found, device, dtype, title)]
    about = f'* what "auto" takes; {ALONE}: torch\'s attention without a position; -: cannot, is wrong, or no time left'
    return "\n".join([*lines, "", about])


def _proof(proofs: dict[str, Answer], name: str, dtype: str) -> str:
    """Of all families of a backend's kernels together."""
    answers = [answer for proof, answer in proofs.items() if proof.startswith(f"{name} {dtype} ")]
    if any("wrong" in answer for answer in answers):
        return "WRONG"
    if reasons := [answer[key] for answer in answers for key in ("cannot", "skipped") if key in answer]:
        return reasons[0][:22]
    errors = [(answer["error"], answer["eager"]) for answer in answers if "error" in answer]
    return "proven {:.1e} ({:.1e})".format(*max(errors)) if errors else "-"


def _times(found: Verdict, device: torch.device, dtype: str, title: str) -> list[str]:
    """A line for each size and mode, a column for each backend and for a small and a large batch."""
    columns = [*names(), ALONE]
    unit, microseconds = ("µs", 1.0) if device.type == "cuda" else ("ms", 1e3)
    head = "".join(name.rjust(9) for name in columns)
    lines = [
        f"{f'{unit} a call, {title}':<24}{head}   {head}",
        f"{'':<24}{'of one image':>{len(head)}}   {'of many':>{len(head)}}",
    ]
    kinds = [kind for kind in verdict.kinds() if kind.dtype == dtype]
    for pair in zip(kinds[::2], kinds[1::2], strict=True):  # a small and a large batch
        if any(str(kind) in found.times for kind in pair):
            cells = f"{pair[0].side}x{pair[0].side} D={pair[0].head_dim} {pair[0].mode}".ljust(24)
            for kind in pair:
                times = {name: us / microseconds for name, us in found.times.get(str(kind), {}).items()}
                taken = _taken(found, device, kind)
                cells += "".join(_cell(times.get(name), name == taken) for name in columns) + "   "
            lines.append(cells.rstrip())
    return lines


def _cell(time: float | None, taken: bool) -> str:
    digits = "-" if time is None else f"{time:.{2 if time < 10 else 1 if time < 100 else 0}f}"
    return f"{digits}{'*' if taken else ' '}".rjust(9)


def _taken(found: Verdict, device: torch.device, kind: Kind) -> str | None:
    if device.type == "cuda":
        return found.fastest(kind)
    row = torch.empty(kind.head_dim, dtype=getattr(torch, kind.dtype), requires_grad=kind.mode != "inference")
    q = row.expand(1, 1, kind.side**2, kind.head_dim)
    return auto.choose(Call(q, q, q, q, q, None, kind.side, kind.side, 1.0, 0.1 * (kind.mode == "dropout"))).name
