"""Builds csrc/ for the host and runs its kernels on CPU tensors, every access checked (see csrc/README.md)."""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from gpsa_kernels import BACKENDS
from gpsa_kernels.backends import cuda

ROOT = Path(__file__).resolve().parents[1]
CSRC, EMULATOR = ROOT / "csrc", ROOT / "tests" / "cuda" / "emulator"
KEPT = ROOT / "build" / "emulator"
COMPILER = (os.environ.get("CXX", "g++"), "-std=c++17", "-O2", "-fPIC", "-fno-gnu-unique", "-Wall", "-Wextra")
ONE_KERNEL = ("-DGPSA_ONE_KERNEL", "-O1")  # of each kind: 48 channels, float16, up to 64 tokens of a whole image
SANITIZED = (*ONE_KERNEL, "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
SANITIZED += ("-fno-omit-frame-pointer",)
# what register.cpp knows of CUDA devices
ON_THE_HOST = {
    "(gpsa_cuda,": "(gpsa_emulated,",
    'STD_TORCH_CHECK(q.is_cuda(), "q must be on a CUDA device");': "",
    "const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());": "",
    "TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(q.get_device_index(), &stream));": "",
}


def _made(command: Sequence[str | Path], key: bytes, suffix: str) -> Path:
    """What a command compiles or links: kept under a hash of all that it depends on, so that nothing stale is used."""
    target = KEPT / (hashlib.sha256(key).hexdigest()[:16] + suffix)
    if not target.exists():
        unfinished = KEPT / f"{os.getpid()}.{target.name}"
        subprocess.run([*command, "-o", unfinished], check=True)
        unfinished.replace(target)
    return target


def built(sources: Sequence[Path], flags: Sequence[str], includes: Sequence[Path], link: Sequence[str]) -> Path:
    """A library or program; only what changed since the last build is compiled."""
    KEPT.mkdir(parents=True, exist_ok=True)
    command = [*COMPILER, *flags, *(f"-I{path}" for path in includes)]

    def compiled(source: Path) -> Path:
        text = subprocess.check_output([*command, "-x", "c++", "-E", "-P", source])
        return _made([*command, "-x", "c++", "-c", source], " ".join([*COMPILER, *flags]).encode() + text, ".o")

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    return _made([*command, *objects, *link], " ".join([*flags, *link, *(o.name for o in objects)]).encode(), "")


def build(csrc: Path = CSRC, flags: Sequence[str] = (), program: str = "") -> Path:
    """The emulated kernels of ``csrc``, as a library or in a program of tests/cuda."""
    sources = [*csrc.glob("*.cu"), EMULATOR / "calls.cpp", EMULATOR / "emulator.cpp"]
    sources += [EMULATOR.parent / program] if program else []
    flags = ("-fvisibility=hidden", "-Wno-unknown-pragmas", *flags)
    return built(sorted(sources), flags, [csrc, EMULATOR], [] if program else ["-shared"])


def run_exercise(csrc: Path = CSRC, *flags: str) -> subprocess.CompletedProcess[str]:
    """exercise.cpp with the kernels of ``csrc``."""
    program = build(csrc, flags, "exercise.cpp")
    quiet = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}  # of fibers that are not run to their ends
    return subprocess.run([program], env=quiet, capture_output=True, text=True, check=False)


def changed_sources(folder: Path, file: str, change: str) -> Path:
    """A copy of csrc/ in ``folder``; in ``file``, in a text that occurs once, ``[-this goes-]{+this comes+}``. White
    space is any white space."""
    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc)
    kept, goes, comes = (re.split(r"\[-(.*?)-\]|\{\+(.*?)\+\}", change)[n::3] for n in range(3))
    pattern = f"({_loose(kept[0])})" + "".join(map("{}({})".format, map(_loose, goes), map(_loose, kept[1:])))
    source = (csrc / file).read_text()
    found, *others = re.finditer(pattern, source)
    assert not others, f"{change!r} fits {1 + len(others)} times in {file}"
    text = found[1] + "".join((new or "") + found[n] for n, new in enumerate(comes, 2))
    (csrc / file).write_text(source[: found.start()] + text + source[found.end() :])
    return csrc


def _loose(text: str | None) -> str:
    return r"\s+".join(map(re.escape, re.split(r"\s+", text or "")))


# What the libraries take and give, as gpsa.h and tests/cuda/emulator say it.


class Problem(ctypes.Structure):
    _fields_ = (
        ("batch", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("heads", "rows", "columns", "head_dim")),
        *((name, ctypes.c_float) for name in ("scale", "dropout_p")),
        ("seed", ctypes.c_void_p),
        ("bfloat16", ctypes.c_int),
    )


class Sizes(ctypes.Structure):
    _fields_ = (
        ("slots", ctypes.c_int),
        *((f"{call}_workspace", ctypes.c_int64) for call in ("inference", "forward", "backward")),
        ("content", ctypes.c_bool),
    )


class Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char_p),
        *((name, ctypes.c_int) for name in ("grid_x", "grid_y", "threads", "shared_bytes")),
    )


class Settings(ctypes.Structure):
    _fields_ = (
        ("schedule", ctypes.c_uint64),
        ("deferred_copies", ctypes.c_bool),
        *((name, ctypes.c_int) for name in ("row_blocks", "multiprocessors", "shared_bytes")),
    )


class Device(NamedTuple):
    """What decides which kernels serve a call."""

    multiprocessors: int
    shared_bytes: int  # the most that one block can ask for


H100 = Device(132, 227 * 1024)
COUNTS = ["global_read", "global_written", "mma", "exp2"]  # bytes, and instructions of a warp or a thread
COUNTS += [kind + what for kind in ("ldmatrix", "copy", "load", "store") for what in ("", "_conflicts")]


def load(library: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library))
    loaded.emulated_sizes.restype = Sizes
    return loaded


@cache
def kernels() -> ctypes.CDLL:
    """The emulated kernels of this checkout."""
    return load(build())


@cache
def operators() -> ctypes.CDLL:
    """torch.ops.gpsa_emulated: csrc/register.cpp on CPU tensors, for the kernels that :func:`using` chooses."""
    text = (CSRC / "register.cpp").read_text()
    for on_a_device, on_the_host in ON_THE_HOST.items():
        assert on_a_device in text
        text = text.replace(on_a_device, on_the_host)
    KEPT.mkdir(parents=True, exist_ok=True)
    unfinished = KEPT / f"{os.getpid()}.cpp"
    unfinished.write_text(text)
    sources = [unfinished.replace(KEPT / "register.cpp"), EMULATOR / "operators.cpp"]
    torch_folder = Path(torch.__file__).parent
    link = ["-shared", f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    flags, includes = ["-DTORCH_TARGET_VERSION=0x020a000000000000"], [CSRC, torch_folder / "include"]
    library = str(built(sources, flags, includes, link))
    torch.ops.load_library(library)
    return ctypes.CDLL(library)


def _set(library: ctypes.CDLL, device: Device, **settings: int) -> None:
    defaults = {"schedule": 0, "deferred_copies": False, "row_blocks": -1}
    Settings.in_dll(library, "settings").__init__(**defaults | device._asdict() | settings)


@contextmanager
def using(
    library: ctypes.CDLL | None = None, name: str = "emulated", device: Device = H100, **settings: int
) -> Iterator[Callable[[], dict[str, int]]]:
    """Emulated kernels in the CUDA library's place, for CPU tensors, and a backend of them. A call raises RuntimeError
    where a kernel breaks a rule: the message says which, where and by which thread.

    Args:
        library: of the kernels; by default this checkout's.
        name: of the backend.
        settings: ``row_blocks`` of the whole-image forward kernel, which share the query rows of a (batch, head), or 0
            for the tiled kernels, where launch_forward and launch_backward shall not choose; ``schedule``, a number
            from which it is drawn, 0: threads in turn; ``deferred_copies``, whether cp.async moves its bytes when they
            are waited for, or at once.

    Yields:
        What the last call counted, to be asked.
    """
    library = library or kernels()
    _set(library, device, **settings)
    functions = library.emulated_sizes, library.emulated_forward, library.emulated_backward
    addresses = [ctypes.cast(function, ctypes.c_void_p).value for function in functions]
    (ctypes.c_void_p * 3).in_dll(operators(), "chosen")[:] = addresses
    backend = replace(
        cuda.BACKEND,
        name=name,
        unavailable=lambda: None,
        unsupported=cuda.unsupported_tensors,
        kernel_devices=frozenset({"cpu"}),
    )
    counters = (ctypes.c_int64 * len(COUNTS)).in_dll(library, "counters")
    cuda._saves_content.cache_clear()
    with (
        mock.patch.dict(BACKENDS, {name: backend}),
        mock.patch.object(torch.ops, "gpsa_cuda", torch.ops.gpsa_emulated),
    ):
        yield lambda: dict(zip(COUNTS, counters, strict=True))
    cuda._saves_content.cache_clear()


def _problem(q: Tensor, grid_size: tuple[int, int], dropout_p: float) -> Problem:
    batch, heads, _, head_dim = q.shape
    return Problem(batch, heads, *grid_size, head_dim, 1.0, dropout_p, None, q.dtype == torch.bfloat16)


def sizes(q: Tensor, grid_size: tuple[int, int], dropout_p: float = 0.0, device: Device = H100) -> Sizes:
    _set(kernels(), device)
    return kernels().emulated_sizes(ctypes.byref(_problem(q, grid_size, dropout_p)))


def launches(
    q: Tensor, grid_size: tuple[int, int], dropout_p: float = 0.0, device: Device = H100
) -> list[list[Launch]]:
    """What is launched on a device, which has a say in it: by a forward call that saves nothing, by one that saves what
    backward reads, and by a backward call. Nothing runs, and q may have no memory."""
    _set(kernels(), device)
    problem, recorded = _problem(q, grid_size, dropout_p), []
    for call in range(3):
        found = (Launch * 8)()
        recorded.append(found[: kernels().emulated_launches(ctypes.byref(problem), call, found)])
    return recorded


def dropout_mask(grid_size: tuple[int, int], dropout_p: float, seed: int, batch_head: int, transposed: bool) -> Tensor:
    """(N, N), 1 where an entry of the attention map is kept."""
    tokens, device_seed = grid_size[0] * grid_size[1], torch.tensor([seed])
    mask = torch.full((tokens, tokens), -1, dtype=torch.int16)
    problem = Problem(1, 1, *grid_size, 8, 1.0, dropout_p, device_seed.data_ptr(), False)
    to = ctypes.c_void_p(mask.data_ptr())
    kernels().dropout_mask(ctypes.byref(problem), ctypes.c_int64(batch_head), transposed, to)
    return mask
