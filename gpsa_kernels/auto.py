"""Which backend ``backend="auto"`` takes: the one place that says so.

- ``eager``, which alone has all derivatives, in forward mode and inside a transform of torch.func.
- On the CPU ``sdpa``, but ``eager`` where that was measured to be faster (``_EAGER_TOKENS``).
- On an NVIDIA GPU the fastest of those that are proven there for calls of this kind (:mod:`gpsa_kernels.verdict`). The
  first such call has that found out; where it cannot be, ``sdpa``. ``GPSA_CHECK`` forbids it, or trusts the kernels.
- On any other device ``sdpa``.

A backend that cannot run the call gives way to ``sdpa``, and that to ``eager``, which runs everything.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from gpsa_kernels import verdict
from gpsa_kernels.backends import BACKENDS, Backend, Call
from gpsa_kernels.derivatives import transformed
from gpsa_kernels.tensors import cast_dtype
from gpsa_kernels.verdict import Kind, Verdict

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
    return _fastest(q.device.index or 0, cast_dtype(q), mode, side, timed_dim, large)


# ---- what is known about the GPUs of this process ------------------------------------------------------------------

_verdicts: dict[int, Verdict] = {}
_unchecked: set[int] = set()  # GPUs that could not be checked, which this process tries once


def _fastest(*kind: Any) -> str:
    return _find_out(*kind)


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


@functools.cache
def _find_out(index: int, dtype: torch.dtype, *about: Any) -> str:
    kind, setting = Kind(str(dtype).removeprefix("torch."), *about), _setting()
    if setting == "trust":
        return _ANY
    if setting == "0" or kind.dtype not in verdict.DTYPES or not _kernels():
        return "sdpa"
    try:
        found = _verdict(index)
        if found.fastest(kind) is None and index not in _unchecked:
            found = _verdicts[index] = _checked(index, kind)
            if found.fastest(kind) is None:
                _log.warning("gpsa_kernels: sdpa serves, as time was short: python -m gpsa_kernels check takes more")
        return found.fastest(kind) or "sdpa"
    except Exception as error:  # whatever it is, the user's call goes on
        _unchecked.add(index)
        _log.warning("gpsa_kernels: sdpa serves, as cuda:%d cannot be checked: %s", index, error)
        return "sdpa"


def _checked(index: int, kind: Kind) -> Verdict:
    """What is known after calls of this kind have been checked, here or, meanwhile, in another process."""
    with verdict.renewed(verdict.machine(index), _WAIT) as found:
        if found.fastest(kind) is None:
            from gpsa_kernels import check

            told = "gpsa_kernels: checking cuda:%d once for calls like %s (at most %d s; GPSA_CHECK=0 never does)"
            _log.warning(told, index, kind, check.SHORT)
            before = dict(found.proofs)
            check.one_kind(torch.device("cuda", index), kind, found)
            for proof, wrong in found.proofs.items():
                if wrong and not before.get(proof):
                    _log.warning("gpsa_kernels: %s is not taken: %s", proof, wrong)
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
    found = _verdict(device.index or 0)
    counts = Counter(answer for kind in verdict.kinds() if (answer := found.fastest(kind)))
    if not counts:
        return "what the first call finds to be right and fastest (python -m gpsa_kernels check finds out now)"
    return f"{' or '.join(name for name, _ in counts.most_common())} (proven {found.date})"
