"""The command ``python -m gpsa_kernels check``: which device, how far it is, and the table."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

from gpsa_kernels import auto, verdict
from gpsa_kernels._version import __version__
from gpsa_kernels.backends import Call
from gpsa_kernels.check import ALONE, Findings, Refused, everything, find_out, names
from gpsa_kernels.verdict import DTYPES, ShapeClass, Verdict


def chosen_device(name: str | None) -> torch.device:
    """The device to check: the one that is named, or the GPU.

    Raises:
        ValueError: there is none, or there are several kinds to choose from.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        if count == 0:
            raise ValueError("no CUDA device was found; --device cpu checks what runs on the CPU")
        gpus = [torch.cuda.get_device_name(index) for index in range(count)]
        if len(set(gpus)) > 1:
            listed = ", ".join(f"cuda:{index} ({gpu})" for index, gpu in enumerate(gpus))
            raise ValueError(f"there are different GPUs, and each is checked by itself: --device takes one of {listed}")
        return torch.device("cuda", 0)
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda:0, say, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"--device {name}: {count or 'no'} CUDA device{'s were' if count != 1 else ' was'} found")
    return device if device.type == "cpu" else torch.device("cuda", device.index or 0)


def command(name: str | None, seconds: float) -> int:
    """Checks, keeps the verdict of a GPU and prints the table; returns 0, 1 where a kernel is wrong, 2 for bad use."""
    try:
        device = chosen_device(name)
        known = Verdict(verdict.machine(device.index) if device.type == "cuda" else {})
        proofs, kinds = everything()
        tell = _progress(1 + 2 * len(proofs) + len(kinds) * (1 + len(names())), sys.stderr.isatty())
        # the lock comes first, as it tells a folder that cannot be written
        with verdict.lock(seconds) if device.type == "cuda" else nullcontext():
            found = find_out(device, known, proofs, kinds, seconds, reserved=seconds / 3, tell=tell)
            if device.type == "cuda":
                verdict.write(found.verdict)
    except (ValueError, OSError, Refused) as error:
        print(f"gpsa_kernels check: {error}", file=sys.stderr)
        return 2
    tell("")
    print(table(found, device))
    if len(found.verdict.times) < len(kinds):
        print(f"Not all was timed in {seconds} s: the next run is faster, with what is compiled by now; or --seconds")
    return 1 if any(found.verdict.proofs.values()) else 0


def _progress(total: int, shown: bool) -> Callable[[str], None]:
    """Draws a bar on a terminal, a step with each call; the call without words wipes it out."""
    done, start = -1, time.monotonic()

    def tell(about: str) -> None:
        nonlocal done
        done += 1
        if shown:
            bar = "#" * (20 * min(done, total) // total)
            line = f"[{bar:<20}] {time.monotonic() - start:3.0f} s  {about[:48]}" if about else ""
            print(f"\r{line:<78}{'' if about else chr(13)}", end="", file=sys.stderr, flush=True)

    return tell


def table(found: Findings, device: torch.device) -> str:
    """What was found out, to be read in ten seconds: proofs, what is wrong, times, and what "auto" takes."""
    machine = found.verdict.machine or {"gpu": f"cpu, {torch.get_num_threads()} threads", "torch": torch.__version__}
    facts = [f"{key} {machine[key]}" for key in ("torch", "cuda", "triton") if key in machine]
    lines = [", ".join([machine["gpu"], *facts, f"gpsa_kernels {__version__}"]), ""]
    lines.append("error (eager's)".ljust(24) + "".join(dtype.ljust(26) for dtype in DTYPES).rstrip())
    for name in names():
        lines.append(name.ljust(24) + "".join(_proof(found, name, dtype).ljust(26) for dtype in DTYPES).rstrip())
    lines += [f"  {key}: {wrong}" for key, wrong in found.verdict.proofs.items() if wrong]
    for dtype, title in (("bfloat16", "16 bits"), ("float32", "float32")):
        lines += ["", *_times(found, device, dtype, title)]
    lines += [
        "",
        f'* what "auto" takes; {ALONE}: torch\'s attention without a position; -: cannot, is wrong, or no time left',
    ]
    return "\n".join(lines)


def _proof(found: Findings, name: str, dtype: str) -> str:
    """Of all families of a backend's kernels together."""
    answers = [answer for proof, answer in found.proofs.items() if proof[:2] == (name, dtype)]
    if any("wrong" in answer for answer in answers):
        return "WRONG"
    if reasons := [answer[key] for answer in answers for key in ("cannot", "skipped") if key in answer]:
        return reasons[0][:22]
    errors = [(answer["error"], answer["eager"]) for answer in answers if "error" in answer]
    return "proven {:.1e} ({:.1e})".format(*map(max, zip(*errors, strict=True))) if errors else "-"


def _times(found: Findings, device: torch.device, dtype: str, title: str) -> list[str]:
    """A line for each size and mode, a column for each backend and for a small and a large batch."""
    columns = [*names(), ALONE]
    unit, microseconds = ("µs", 1.0) if device.type == "cuda" else ("ms", 1e3)
    head = "".join(name.rjust(9) for name in columns)
    lines = [
        f"{f'{unit} a call, {title}':<24}{head}   {head}",
        f"{'':<24}{'of one image':>{len(head)}}   {'of many':>{len(head)}}",
    ]
    shapes, known = verdict.shapes(dtype), found.verdict.times
    for pair in zip(shapes[::2], shapes[1::2], strict=True):  # a small and a large batch
        if not any(str(shape) in known for shape in pair):
            continue
        line = f"{pair[0].side}x{pair[0].side} D={pair[0].head_dim} {pair[0].mode}".ljust(24)
        for shape in pair:
            times = {**known.get(str(shape), {}), ALONE: found.alone.get(str(shape), math.nan)}
            taken = _taken(found, device, dtype, shape)
            line += "".join(_cell(times.get(name, math.nan) / microseconds, name == taken) for name in columns) + "   "
        lines.append(line.rstrip())
    return lines


def _cell(time: float, taken: bool) -> str:
    digits = "-" if math.isnan(time) else f"{time:.{2 if time < 10 else 1 if time < 100 else 0}f}"
    return f"{digits}{'*' if taken else ' '}".rjust(9)


def _taken(found: Findings, device: torch.device, dtype: str, shape: ShapeClass) -> str | None:
    if device.type == "cuda":
        return found.verdict.fastest(shape, dtype)
    row = torch.empty(shape.head_dim, dtype=getattr(torch, dtype), requires_grad=shape.mode != "inference")
    q = row.expand(1, 1, shape.side**2, shape.head_dim)
    return auto.choose(Call(q, q, q, q, q, None, shape.side, shape.side, 1.0, 0.1 * (shape.mode == "dropout"))).name
