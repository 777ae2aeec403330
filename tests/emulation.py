"""Builds csrc/ for the host and runs its kernels on CPU tensors, every access checked (see csrc/README.md)."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from gpsa_kernels.tensors import parameter_gradients

ROOT = Path(__file__).resolve().parents[1]
EMULATOR = ROOT / "tests" / "cuda" / "emulator"
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

    def compiled(source: Path) -> Path:
        text = _run([*command, "-x", "c++", "-E", "-P", source])
        name = hashlib.sha256(" ".join([*FLAGS, *flags]).encode() + text).hexdigest()[:16]
        target = folder / f"{name}.o"
        if not target.exists():
            partial = folder / f"{name}.{os.getpid()}.o"
            _run([*command, "-x", "c++", "-c", source, "-o", partial])
            partial.replace(target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sorted([*csrc.glob("*.cu"), *EMULATOR.glob("*.cpp")])))
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


def changed_sources(folder: Path, file: str, text: str, replacement: str) -> Path:
    """A copy of csrc/ in ``folder`` in which a text that occurs once in ``file`` is replaced."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    source = (csrc / file).read_text()
    assert source.count(text) == 1, f"{text!r} occurs {source.count(text)} times in {file}"
    (csrc / file).write_text(source.replace(text, replacement))
    return csrc


def run_sanitized(script: str, csrc: Path = ROOT / "csrc") -> subprocess.CompletedProcess[str]:
    """Runs a script, which is given the path of the kernels built with the sanitizers.

    In a process of its own, because AddressSanitizer's library must be loaded first.
    """
    library = build(csrc, (*SANITIZERS, "-DGPSA_ONE_KERNEL", "-O1"))
    runtime = _run([os.environ.get("CXX", "g++"), "-print-file-name=libasan.so"]).decode().strip()
    environment = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}  # Python's own
    command = [sys.executable, "-c", script, str(library)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@cache
def kernels() -> ModuleType:
    """The emulated kernels of this checkout."""
    return load(build())


class Device(NamedTuple):
    """What decides which kernels serve a call."""

    multiprocessors: int
    shared_bytes: int  # the most that one block can ask for


H100 = Device(132, 227 * 1024)


class Launch(NamedTuple):
    kernel: str
    grid_x: int
    grid_y: int
    threads: int
    shared_bytes: int


class Sizes(NamedTuple):
    """As gpsa.h says."""

    slots: int
    inference_workspace: int
    forward_workspace: int
    backward_workspace: int
    content: bool


INPUTS, GRADIENTS = ("q", "k", "v", "pos_weight", "gate"), ("grad_q", "grad_k", "grad_v", "sums")
Argument = tuple[int, int, list[int], list[int], bool]  # as bindings.cpp takes a tensor


def _argument(t: Tensor, output: bool = False) -> Argument:
    return t.data_ptr(), t.element_size(), list(t.shape), list(t.stride()), output


def _arguments(inputs: dict[str, Tensor | None], outputs: dict[str, Tensor | None]) -> dict[str, Argument]:
    """By name, without those that are None."""
    both = [(name, t, output) for output, named in enumerate((inputs, outputs)) for name, t in named.items()]
    return {name: _argument(t.detach(), bool(output)) for name, t, output in both if t is not None}


Problem = tuple[int, int, int, int, int, bool, float, float]  # as bindings.cpp takes it


def _problem(q: Tensor, grid_size: tuple[int, int], scale: float = 1.0, dropout_p: float = 0.0) -> Problem:
    batch, heads, _, head_dim = q.shape
    return batch, heads, *grid_size, head_dim, q.dtype == torch.bfloat16, scale, dropout_p


def sizes(q: Tensor, grid_size: tuple[int, int], dropout_p: float = 0.0, device: Device = H100) -> Sizes:
    return Sizes(*kernels().sizes(_problem(q, grid_size, 1.0, dropout_p), device))


def launches(
    q: Tensor, grid_size: tuple[int, int], dropout_p: float = 0.0, device: Device = H100
) -> list[list[Launch]]:
    """What is launched on a device, which has a say in it: by a forward call that saves nothing, by one that saves what
    backward reads, and by a backward call. Nothing runs, and q may have no memory."""
    recorded = kernels().launches(_problem(q, grid_size, 1.0, dropout_p), device)
    return [[Launch(*launch) for launch in call] for call in recorded]


def empty_like_output(q: Tensor) -> Tensor:
    """(B, H, N, D) in the memory order (B, N, H, D), poisoned."""
    batch, heads, tokens, head_dim = q.shape
    return q.new_full((batch, tokens, heads, head_dim), torch.nan).transpose(1, 2)


@dataclass(frozen=True)
class Result:
    tensors: dict[str, Tensor]  # of a forward call out and what it saves, of a backward one the gradients and sums
    counts: dict[str, int]


def _call(
    direction: str,
    problem: Problem,
    inputs: dict[str, Tensor | None],
    outputs: dict[str, Tensor | None],
    *,
    row_blocks: int | None = None,
    dropout_seed: int | Tensor | None = 0,
    device: Device = H100,
    schedule: int = 0,
    deferred_copies: bool = False,
    module: ModuleType | None = None,
) -> Result:
    for name in ("pos_weight", "gate"):
        inputs[name] = inputs[name].float().contiguous()
    inputs["seed"] = torch.tensor([dropout_seed]) if isinstance(dropout_seed, int) else dropout_seed
    if inputs["q"].numel() == 0:
        row_blocks = None  # nothing is launched
    run = getattr(module or kernels(), direction)
    counts = run(problem, _arguments(inputs, outputs), row_blocks, device, schedule, deferred_copies)
    return Result({name: t for name, t in outputs.items() if t is not None}, counts)


def forward(
    tensors: Sequence[Tensor],
    grid_size: tuple[int, int],
    scale: float,
    *,
    save: bool = False,
    row_blocks: int | None = 1,
    dropout_p: float = 0.0,
    out: Tensor | None = None,
    **how: object,
) -> Result:
    """A forward call of q, k, v, pos_weight and gate.

    Args:
        save: whether the logsumexp is wanted, and the content branch's own output from kernels that write it.
        row_blocks: of the whole-image kernel, which share the query rows of a (batch, head); 0: the tiled kernels;
            None: as launch_forward chooses for the device.
        out: where to write, if not into new memory.
        how: ``schedule``, a number from which it is drawn, 0: threads in turn; ``deferred_copies``, whether cp.async
            moves its bytes when they are waited for, or at once; ``module``, other kernels than this checkout's;
            ``dropout_seed``; ``device``.

    Raises:
        RuntimeError: a kernel broke a rule; the message says which, where and by which thread.
    """
    q = tensors[0]
    outputs = {"out": empty_like_output(q) if out is None else out}
    if save:
        outputs["logsumexp"] = torch.full(q.shape[:3], torch.nan)
    problem, inputs = _problem(q, grid_size, scale, dropout_p), dict(zip(INPUTS, tensors, strict=True))
    if save and (row_blocks == 0 or (row_blocks is None and kernels().sizes(problem, H100)[-1])):
        outputs["content"] = empty_like_output(q)
    return _call("forward", problem, inputs, outputs, row_blocks=row_blocks, **how)


def backward(
    grad_out: Tensor,
    tensors: Sequence[Tensor],
    saved: dict[str, Tensor],
    grid_size: tuple[int, int],
    scale: float,
    *,
    dropout_p: float = 0.0,
    outputs: Sequence[Tensor] | None = None,
    **how: object,
) -> Result:
    """A backward call, of the tiled kernels where ``content`` is ``saved``; ``outputs``: where to write the gradients
    of q, k and v, if not into new memory; else as :func:`forward`."""
    q, problem = tensors[0], _problem(tensors[0], grid_size, scale, dropout_p)
    slots = kernels().tiled_slots(problem) if "content" in saved else 1
    outputs = [empty_like_output(q) for _ in range(3)] if outputs is None else outputs
    outputs = dict(zip(GRADIENTS, (*outputs, torch.full((q.size(0) * slots, 4 * q.size(1)), torch.nan)), strict=True))
    inputs = dict(zip(INPUTS, tensors, strict=True)) | saved | {"grad_out": grad_out}
    return _call("backward", problem, inputs, outputs, row_blocks=0 if "content" in saved else None, **how)


class Library:
    """What csrc/register.cpp registers, to stand where ``torch.ops.gpsa_cuda`` does: launch_forward and launch_backward
    on an H100, or the tiled kernels whatever it would choose. They run in a workspace of the emulator's own."""

    def __init__(self, tiled: bool) -> None:
        self.row_blocks = 0 if tiled else None

    def saves_content(self, *shape: float) -> bool:
        *shape, dropout_p, _ = shape
        return self.row_blocks == 0 or Sizes(*kernels().sizes((1, 1, *shape, 1.0, dropout_p), H100)).content

    def forward(self, *arguments: Tensor | float | None) -> tuple[Tensor | None, ...]:
        *tensors, seed, rows, columns, scale, dropout_p, save = arguments
        settings = {"save": save, "dropout_p": dropout_p, "dropout_seed": seed, "row_blocks": self.row_blocks}
        made = forward([*map(_readable, tensors)], (rows, columns), scale, **settings).tensors
        return tuple(made.get(name) for name in ("out", "content", "logsumexp"))

    def backward(self, grad_out: Tensor, *arguments: Tensor | float | None) -> tuple[Tensor, ...]:
        *tensors, seed, rows, columns, scale, dropout_p, content, logsumexp = arguments
        q, saved = tensors[0], {"logsumexp": logsumexp}
        if self.saves_content(rows, columns, q.size(3), q.dtype == torch.bfloat16, dropout_p, -1):
            saved["content"] = content
        settings = {"dropout_p": dropout_p, "dropout_seed": seed}
        made = backward(_readable(grad_out), [*map(_readable, tensors)], saved, (rows, columns), scale, **settings)
        *grads, sums = made.tensors.values()
        return *grads, *parameter_gradients(sums, *tensors[3:])


def _readable(t: Tensor) -> Tensor:
    """As csrc/register.cpp hands it on: in rows that can be read 16 bytes at a time."""
    fits = t.stride(-1) == 1 and all(s % 8 == 0 for s in t.stride()[:-1]) and t.data_ptr() % 16 == 0
    return t if fits else t.clone(memory_format=torch.contiguous_format)


def dropout_mask(grid_size: tuple[int, int], dropout_p: float, seed: int, batch_head: int, transposed: bool) -> Tensor:
    """(N, N), 1 where an entry of the attention map is kept."""
    tokens = grid_size[0] * grid_size[1]
    mask, device_seed = torch.full((1, 1, tokens, tokens), -1, dtype=torch.int16), torch.tensor([seed])
    tensors = {"seed": _argument(device_seed), "mask": _argument(mask, output=True)}
    kernels().dropout_mask(*grid_size, dropout_p, tensors, batch_head, transposed)
    return mask[0, 0]


def masks(q: Tensor, grid_size: tuple[int, int], dropout_p: float, seed: int) -> Tensor:
    """(B, H, N, N), 1 where the kernels keep an entry: drawn by csrc/dropout.cuh, which test_dropout.py checks."""
    drawn = [dropout_mask(grid_size, dropout_p, seed, i, False) for i in range(q.size(0) * q.size(1))]
    return torch.stack(drawn).view(*q.shape[:2], *drawn[0].shape)
