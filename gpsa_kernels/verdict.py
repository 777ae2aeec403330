"""What ``python -m gpsa_kernels check`` has found out about a GPU: which backends are right there, and how fast.

A file in the user's cache folder for each kind of GPU and each version of what runs on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
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
LARGE = (
    2**16
)  # tokens of all heads and images from which on a GPU is full: 9 heads of an image have 1,764, of 128 225,792
DTYPES = ("bfloat16", "float16", "float32")
MODES = ("inference", "training", "dropout")


class Proof(NamedTuple):
    """What is proven at once: a backend's kernels of one family, in one dtype, forward and backward."""

    backend: str
    dtype: str
    tiled: bool
    dropout: bool
    head_dim: int

    def __str__(self) -> str:
        family = f"{'tiled' if self.tiled else 'whole image'}{' dropout' * self.dropout}"
        return f"{self.backend} {self.dtype} {family} D={self.head_dim}"


class ShapeClass(NamedTuple):
    """Calls that one call, which is timed, stands for.

    Attributes:
        bits: of the dtype, 16 or 32.
        mode: "inference", "training", or "dropout" for training with attention dropout.
        side: of the square grid that is timed.
        head_dim: that is timed.
        large: whether the batch fills a GPU.
    """

    bits: int
    mode: str
    side: int
    head_dim: int
    large: bool

    def __str__(self) -> str:
        size = "large" if self.large else "small"
        return f"{self.side}x{self.side} D={self.head_dim} {self.mode}, {size} batch, {self.bits} bits"

    def proof(self, backend: str, dtype: str) -> Proof:
        """What has to be proven before a backend takes such calls."""
        return Proof(backend, dtype, self.side**2 > _WHOLE_IMAGE_TOKENS, self.mode == "dropout", self.head_dim)


def size(tokens: int, head_dim: int, holds: Callable[[bool], bool] = bool) -> tuple[int, int]:
    """The side and head_dim that are timed for calls with as many tokens and channels."""
    if holds(tokens <= _WHOLE_IMAGE_TOKENS):
        side = 14
    elif holds(tokens <= 768):
        side = 24
    else:
        side = 32 if holds(tokens <= 2048) else 64
    return side, 48 if head_dim <= 48 else 64


def shapes(dtype: str) -> list[ShapeClass]:
    """All classes of calls in a dtype, small grids first."""
    bits = 32 if dtype == "float32" else 16
    sizes = product((14, 24, 32, 64), (48, 64), MODES, (False, True))
    return [ShapeClass(bits, mode, side, head_dim, large) for side, head_dim, mode, large in sizes]


@dataclasses.dataclass
class Verdict:
    """What was found out on a machine.

    Attributes:
        machine: see :func:`machine`.
        date: when something was last found out, 2026-11-21.
        proofs: for each Proof what is wrong, or "" where all is right.
        times: for each ShapeClass the microseconds of a call on every backend that is proven.
    """

    machine: dict[str, str]
    date: str = ""
    proofs: dict[str, str] = dataclasses.field(default_factory=dict)
    times: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def fastest(self, shape: ShapeClass, dtype: str) -> str | None:
        """The fastest proven backend, "sdpa" where none is; None where that has not been found out."""
        times = self.times.get(str(shape))
        if times is None:
            return None
        wrong = {name: self.proofs.get(str(shape.proof(name, dtype))) for name in times}
        if None in wrong.values():
            return None
        return min((name for name in times if not wrong[name]), key=times.__getitem__, default="sdpa")


@functools.cache
def machine(index: int) -> dict[str, str]:
    """What a verdict about a GPU depends on; a change of any of it makes another one."""
    import hashlib

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
    import hashlib

    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return folder() / f"verdict-{digest[:16]}.json"


@functools.cache
def _tell_once(message: str) -> None:
    _log.warning("%s", message)


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
        _tell_once(f"gpsa_kernels: {path} is ignored: {type(error).__name__}: {error}")
    return Verdict(about)


def write(found: Verdict) -> None:
    """Keeps a verdict, with what an earlier one knows beyond it; the file is replaced as a whole.

    Raises:
        OSError: the folder cannot be written.
    """
    path, old = _path(found.machine), read(found.machine)
    whole = dataclasses.replace(found, proofs=old.proofs | found.proofs, times=old.times | found.times)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(dataclasses.asdict(whole), file, indent=1)
    os.replace(file.name, path)


@contextlib.contextmanager
def lock(seconds: float) -> Iterator[None]:
    """Held by one process of the user at a time.

    Raises:
        TimeoutError: another one has held it for so long.
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
        yield
