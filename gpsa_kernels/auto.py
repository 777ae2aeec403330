"""Which backend ``backend="auto"`` takes: the one place that says so.

- ``eager``, which alone has all derivatives, in forward mode and inside a transform of torch.func.
- On the CPU ``sdpa``, but ``eager`` where that was measured to be faster (``_EAGER_TOKENS``).
- On an NVIDIA GPU the fastest of those that are proven there for calls of this kind (:mod:`gpsa_kernels.verdict`). The
  first call of a kind that nothing is known about has them proven and timed, in another process. What cannot be checked
  is not taken: ``sdpa`` serves. ``GPSA_CHECK=0`` never checks and takes ``sdpa``; ``GPSA_CHECK=trust`` takes the first
  of BACKENDS that runs, unproven.
- On any other device ``sdpa``.

A backend that cannot run the call gives way to ``sdpa``, and that to ``eager``, which runs everything.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable

import torch

from gpsa_kernels import verdict
from gpsa_kernels.backends import BACKENDS, Backend, Call
from gpsa_kernels.derivatives import transformed
from gpsa_kernels.tensors import cast_dtype
from gpsa_kernels.verdict import ShapeClass, Verdict

_log = logging.getLogger("gpsa_kernels")
_ANY = ""  # the first of BACKENDS that runs
_WAIT = 45.0  # seconds for another process that is checking

# On two CPUs (AVX2, AVX-512), with two threads, eager's forward and backward together took less time than sdpa's, or
# as much, up to so many tokens and 4/3 of head_dim: its maps have N numbers a token and head, where q, k, v have 3 D.
_EAGER_TOKENS = 64


def choose(call: Call) -> Backend:
    """The backend that ``backend="auto"`` takes for a call."""
    if transformed():
        preferred = "eager"
    elif call.q.is_cpu:
        preferred = _on_cpu(call)
    elif call.q.is_cuda:
        preferred = _on_gpu(call)
    else:
        preferred = "sdpa"
    for name in BACKENDS if preferred == _ANY else (preferred, "sdpa", "eager"):
        backend = BACKENDS[name]
        if backend.unavailable() is None and backend.unsupported(call) is None:
            return backend
    raise AssertionError("eager runs every call")


def _on_cpu(call: Call) -> str:
    tokens, head_dim = call.q.shape[2:]
    if torch.compiler.is_compiling() or tokens > _EAGER_TOKENS or not call.wants_gradients:
        return "sdpa"
    traced = torch._C._get_tracing_state() is not None  # and serves other sizes, too
    return "eager" if 3 * tokens <= 4 * head_dim and not traced else "sdpa"


def _on_gpu(call: Call) -> str:
    q = call.q
    batch, heads, tokens, head_dim = q.shape
    mode = "dropout" if call.has_dropout else "training" if call.wants_gradients else "inference"
    holds: Callable[[bool], bool] = bool
    if torch.compiler.is_compiling():  # sizes that are left open stay open, and count as large
        from torch.fx.experimental.symbolic_shapes import statically_known_true as holds
    side, timed_dim = verdict.size(tokens, head_dim, holds)
    large = not holds(batch * heads * tokens < verdict.LARGE)
    return _fastest(q.device.index, cast_dtype(q), mode, side, timed_dim, large)


# ---- what is known about the GPUs of this process ------------------------------------------------------------------

_answers: dict[tuple[int | torch.dtype | str | None, ...], str] = {}  # of _fastest
_verdicts: dict[int, Verdict] = {}
_unchecked: set[int] = set()  # GPUs that could not be checked, which this process tries once


def _fastest(index: int | None, dtype: torch.dtype, mode: str, side: int, head_dim: int, large: bool) -> str:
    key = index, dtype, mode, side, head_dim, large
    answer = _answers.get(key)
    if answer is None:
        shape = ShapeClass(8 * dtype.itemsize, mode, side, head_dim, large)
        answer = _answers[key] = _find_out(index, str(dtype).removeprefix("torch."), shape)
    return answer


# A compiler takes the answer as a constant, and does not look at how it is found.
_fastest._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _setting() -> str:
    setting = os.environ.get("GPSA_CHECK") or "1"
    if setting not in ("0", "1", "trust"):
        raise ValueError(f"GPSA_CHECK must be 0 (never check), 1 (check once) or trust, got {setting!r}")
    return setting


def _kernels() -> list[str]:
    return [name for name, b in BACKENDS.items() if "cuda" in b.kernel_devices and b.unavailable() is None]


def _verdict(index: int) -> Verdict:
    if index not in _verdicts:
        _verdicts[index] = verdict.read(verdict.machine(index))
    return _verdicts[index]


def _find_out(index: int | None, dtype: str, shape: ShapeClass) -> str:
    setting = _setting()
    if setting == "trust":
        return _ANY
    if setting == "0" or shape.bits == 64 or not _kernels():
        return "sdpa"
    index = torch.cuda.current_device() if index is None else index
    try:
        answer = _verdict(index).fastest(shape, dtype)
        if answer is None and index not in _unchecked:
            _verdicts[index] = _checked(index, dtype, shape)
            answer = _verdicts[index].fastest(shape, dtype)
            if answer is None:
                _log.warning("gpsa_kernels: sdpa serves, as time was short: python -m gpsa_kernels check takes more")
    except Exception as error:  # whatever it is, the user's call goes on
        _unchecked.add(index)
        _log.warning("gpsa_kernels: sdpa serves, as cuda:%d cannot be checked: %s", index, error)
        return "sdpa"
    return answer or "sdpa"


def _checked(index: int, dtype: str, shape: ShapeClass) -> Verdict:
    """What is known after calls of this kind have been checked, here or, meanwhile, in another process."""
    about = verdict.machine(index)
    with verdict.lock(_WAIT):
        found = verdict.read(about)
        if found.fastest(shape, dtype) is None:
            from gpsa_kernels import check

            told = "gpsa_kernels: checking cuda:%d once for calls like %s (at most %d s; GPSA_CHECK=0 never does)"
            _log.warning(told, index, shape, check.SHORT)
            new = check.one_kind(torch.device("cuda", index), dtype, shape, found)
            for proof in (key for key, wrong in new.proofs.items() if wrong and key not in found.proofs):
                _log.warning("gpsa_kernels: %s is not taken: %s", proof, new.proofs[proof])
            verdict.write(new)
            found = verdict.read(about)
        return found


def outlook(device: torch.device) -> str:
    """What "auto" takes on a device and why, in words; finds out nothing new."""
    if device.type == "cpu":
        return "sdpa (to train on few tokens eager)"
    if device.type != "cuda":
        return "sdpa"
    if (setting := _setting()) == "0":
        return "sdpa (GPSA_CHECK=0)"
    if not (kernels := _kernels()):
        return "sdpa (none of the kernels can run)"
    if setting == "trust":
        return f"{kernels[0]} (unproven: GPSA_CHECK=trust)"
    found = _verdict(torch.cuda.current_device() if device.index is None else device.index)
    answers = [found.fastest(shape, dtype) for dtype in verdict.DTYPES for shape in verdict.shapes(dtype)]
    counts = Counter(answer for answer in answers if answer)
    if not counts:
        return "what the first call finds to be right and fastest (python -m gpsa_kernels check finds out now)"
    names = " or ".join(name for name, _ in counts.most_common())
    return f"{names} (proven {found.date})"
