"""What ``python -m gpsa_kernels check`` has found out about a GPU: which backends are right there, and how fast.

A file in the user's cache folder for each kind of GPU and each version of what runs on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from gpsa_kernels._version import __version__
from gpsa_kernels.backends import cuda, triton

_log = logging.getLogger("gpsa_kernels")
_WHOLE_IMAGE_TOKENS = 256  # above, the CUDA kernels are tiled
# tokens of all heads and images from which on a GPU is full: 9 heads of an image have 1,764, of 128 225,792
LARGE = 2**16
DTYPES = ("bfloat16", "float16", "float32")
ALONE = "alone"  # torch's attention without a position, which is timed beside the backends


class Kind(NamedTuple):
    """Calls that one call, which is timed, stands for.

    Attributes:
        dtype: its name; the two of 16 bits share their times.
        mode: "inference", "training", or "dropout" for training with attention dropout.
        side: of the square grid that is timed.
        head_dim: that is timed.
        large: whether the batch fills a GPU.
    """

    dtype: str
    mode: str
    side: int
    head_dim: int
    large: bool

    def __str__(self) -> str:
        size, bits = "large" if self.large else "small", 32 if self.dtype == "float32" else 16
        return f"{self.side}x{self.side} D={self.head_dim} {self.mode}, {size} batch, {bits} bits"

    @property
    def tiled(self) -> bool:
        return self.side**2 > _WHOLE_IMAGE_TOKENS

    def proof(self, backend: str) -> str:
        """What is proven at once before a backend takes such calls: its kernels of one family, forward and backward."""
        family = ("tiled" if self.tiled else "whole image") + " dropout" * (self.mode == "dropout")
        return f"{backend} {self.dtype} {family} D={self.head_dim}"


def size(tokens: int, head_dim: int, holds: Callable[[bool], bool] = bool) -> tuple[int, int]:
    """The side and head_dim that are timed for calls with as many tokens and channels."""
    if holds(tokens <= _WHOLE_IMAGE_TOKENS):
        side = 14
    elif holds(tokens <= 768):
        side = 24
    else:
        side = 32 if holds(tokens <= 2048) else 64
    return side, 48 if head_dim <= 48 else 64


def kinds() -> list[Kind]:
    """All kinds of calls that are told apart, small grids first."""
    modes = "inference", "training", "dropout"
    settings = product((14, 24, 32, 64), DTYPES, (48, 64), modes, (False, True))
    return [Kind(dtype, mode, side, head_dim, large) for side, dtype, head_dim, mode, large in settings]


@dataclasses.dataclass
class Verdict:
    """What was found out on a machine.

    Attributes:
        machine: see :func:`machine`.
        date: when something was last found out, 2026-11-21.
        proofs: for each :meth:`Kind.proof` what is wrong, or "" where all is right.
        times: for each Kind the microseconds of a call on every backend that is proven, and ALONE.
    """

    machine: dict[str, str]
    date: str = ""
    proofs: dict[str, str] = dataclasses.field(default_factory=dict)
    times: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def fastest(self, kind: Kind) -> str | None:
        """The fastest proven backend, "sdpa" where none is; None where that has not been found out."""
        if (times := self.times.get(str(kind))) is None:
            return None
        wrong = {name: self.proofs.get(kind.proof(name)) for name in times if name != ALONE}
        if None in wrong.values():
            return None
        return min((name for name in wrong if not wrong[name]), key=times.__getitem__, default="sdpa")


@functools.cache
def machine(index: int) -> dict[str, str]:
    """What a verdict about a GPU depends on; a change of any of it makes another one."""
    try:
        driver = Path("/proc/driver/nvidia/version").read_text().split("\n")[0]
    except OSError:
        driver = str(getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")())
    try:
        triton_version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton_version = "none"
    kernels = hashlib.sha256()
    for path in [*sorted(Path(triton.__file__).parent.glob("*.py")), cuda.FOLDER / "gpsa_cuda.so"]:
        kernels.update(path.read_bytes() if path.exists() else b"")
    return {
        "gpu": torch.cuda.get_device_name(index),
        "driver": driver,
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton_version + ", interpreted" * triton.INTERPRETED,
        "gpsa_kernels": __version__,
        "kernels": kernels.hexdigest()[:16],
    }


def folder() -> Path:
    """``GPSA_CACHE_DIR``, or gpsa_kernels in the user's cache folder, by the rules of XDG."""
    if chosen := os.environ.get("GPSA_CACHE_DIR"):
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return Path(cache if os.path.isabs(cache) else os.path.expanduser("~/.cache"), "gpsa_kernels")


def _path(about: dict[str, str]) -> Path:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return folder() / f"verdict-{digest[:16]}.json"


_warn_once = functools.cache(_log.warning)


def read(about: dict[str, str]) -> Verdict:
    """The verdict about a machine; an empty one where there is none, or where the file is damaged or of another."""
    path = _path(about)
    try:
        found = Verdict(**json.loads(path.read_text()))
        if found.machine != about:
            raise ValueError("it is about another machine")
        found.proofs = {key: "" + wrong for key, wrong in found.proofs.items()}
        found.times = {key: {name: 0.0 + t for name, t in times.items()} for key, times in found.times.items()}
        return found
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, AttributeError) as error:
        _warn_once("gpsa_kernels: %s is ignored: %s", path, f"{type(error).__name__}: {error}")
    return Verdict(about)


def write(found: Verdict) -> None:
    """Keeps a verdict; the file is replaced as a whole.

    Raises:
        OSError: the folder cannot be written.
    """
    path = _path(found.machine)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(dataclasses.asdict(found), file, indent=1)
    os.replace(file.name, path)


@contextlib.contextmanager
def renewed(about: dict[str, str], seconds: float) -> Iterator[Verdict]:
    """The verdict about a machine, for one process of the user at a time to add to; it is kept afterwards.

    Raises:
        TimeoutError: another process has held it for so long.
        OSError: the folder cannot be written.
    """
    import fcntl

    folder().mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    with (folder() / "lock").open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise TimeoutError(f"another process has been checking for {seconds:.0f} s") from None
                time.sleep(0.05)
        found = read(about)
        yield found
        write(found)
