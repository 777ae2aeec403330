"""Builds csrc/ for the host and runs its kernels on CPU tensors, every access checked (see csrc/README.md)."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).parent / "emulator"
SOURCES = ("emulator.cpp", "primitives_host.cpp", "kernels.cpp", "bindings.cpp")
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-Wall", "-Wextra")
SANITIZERS = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")


def _run(command: Sequence[str | Path]) -> bytes:
    done = subprocess.run([str(c) for c in command], capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr.decode()}")
    return done.stdout


def build(csrc: Path = ROOT / "csrc", flags: Sequence[str] = ()) -> Path:
    """The extension module of the kernels in ``csrc``; only what changed since the last build is compiled.

    An object file is named after its source's preprocessed text, so that nothing stale is ever used.
    """
    folder = ROOT / "build" / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    installed = [Path(torch.__file__).parent / "include", sysconfig.get_paths()["include"]]  # pybind11, Python
    command = [os.environ.get("CXX", "g++"), *FLAGS, "-Wno-unknown-pragmas", *flags]
    command += [f"-I{csrc}", f"-I{EMULATOR}", *(f"-isystem{i}" for i in installed)]

    def compiled(source: str) -> Path:
        text = _run([*command, "-E", "-P", EMULATOR / source])
        name = hashlib.sha256(" ".join([*FLAGS, *flags]).encode() + text).hexdigest()[:16]
        target = folder / f"{name}.o"
        if not target.exists():
            partial = folder / f"{name}.{os.getpid()}.o"
            _run([*command, "-c", EMULATOR / source, "-o", partial])
            partial.replace(target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, SOURCES))
    name = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:16]
    library = folder / f"{name}.so"
    if not library.exists():
        partial = folder / f"{name}.{os.getpid()}.so"
        _run([*command, "-shared", *objects, "-o", partial])
        partial.replace(library)
    return library


def load(library: Path) -> ModuleType:
    # a name for each library: pybind11 returns the module that it has under a name already
    spec = importlib.util.spec_from_file_location(f"{library.stem}.gpsa_emulated", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def kernels() -> ModuleType:
    """The emulated kernels of this checkout."""
    return load(build())


@dataclass(frozen=True)
class Result:
    out: Tensor
    logsumexp: Tensor | None
    counts: dict[str, int]


def _argument(t: Tensor, output: bool = False) -> tuple[int, int, list[int], list[int], bool]:
    return t.data_ptr(), t.element_size(), list(t.shape), list(t.stride()), output


def _problem(q: Tensor, grid_size: tuple[int, int], scale: float) -> tuple[int, int, int, int, int, bool, float]:
    batch, heads, _, head_dim = q.shape
    return batch, heads, *grid_size, head_dim, q.dtype == torch.bfloat16, scale


def empty_like_output(q: Tensor) -> Tensor:
    """(B, H, N, D) in the memory order (B, N, H, D), poisoned."""
    batch, heads, tokens, head_dim = q.shape
    return q.new_full((batch, tokens, heads, head_dim), torch.nan).transpose(1, 2)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    grid_size: tuple[int, int],
    scale: float,
    *,
    save: bool = False,
    parts: int = 1,
    seed: int = 0,
    deferred_copies: bool = False,
    out: Tensor | None = None,
    module: ModuleType | None = None,
) -> Result:
    """One launch of the forward kernel.

    Args:
        save: whether the logsumexp is wanted.
        parts: blocks that share the query rows of a (batch, head).
        seed: of the thread schedule; 0: threads in turn.
        deferred_copies: whether cp.async moves its bytes when they are waited for, or at once.
        out: where to write, if not into new memory.
        module: other kernels than this checkout's.

    Raises:
        RuntimeError: a kernel broke a rule; the message says which, where and by which thread.
    """
    module = kernels() if module is None else module
    out = empty_like_output(q) if out is None else out
    logsumexp = torch.full(q.shape[:3], torch.nan) if save else None
    inputs = {"q": q, "k": k, "v": v, "pos_weight": pos_weight.float().contiguous(), "gate": gate.float().contiguous()}
    tensors = {name: _argument(t.detach()) for name, t in inputs.items()} | {"out": _argument(out, output=True)}
    if logsumexp is not None:
        tensors["logsumexp"] = _argument(logsumexp, output=True)
    counts = module.forward(_problem(q, grid_size, scale), tensors, parts, seed, deferred_copies)
    return Result(out, logsumexp, counts)


def forward_parts(q: Tensor, grid_size: tuple[int, int], multiprocessors: int) -> int:
    """Into how many blocks the launcher splits the query rows of a (batch, head)."""
    return kernels().forward_parts(_problem(q, grid_size, 1.0), multiprocessors)


def forward_shared_bytes(q: Tensor, grid_size: tuple[int, int], parts: int = 1) -> int:
    return kernels().forward_shared_bytes(_problem(q, grid_size, 1.0), parts)
