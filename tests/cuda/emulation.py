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

from gpsa_kernels.tensors import parameter_gradients

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).parent / "emulator"
SOURCES = (
    "emulator.cpp",
    "primitives_host.cpp",
    "kernels.cpp",
    "backward_kernels.cpp",
    "tiled_kernels.cpp",
    "tiled_backward_kernels.cpp",
    "bindings.cpp",
)
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
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
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
    inputs["seed"] = torch.tensor([dropout_seed])
    tensors = {name: _argument(t.detach()) for name, t in inputs.items()} | {"out": _argument(out, output=True)}
    if logsumexp is not None:
        tensors["logsumexp"] = _argument(logsumexp, output=True)
    counts = module.forward(_problem(q, grid_size, scale), dropout_p, tensors, parts, seed, deferred_copies)
    return Result(out, logsumexp, counts)


@dataclass(frozen=True)
class Gradients:
    q: Tensor
    k: Tensor
    v: Tensor
    sums: Tensor  # (B, H, slots, 4), as gpsa.h says
    counts: dict[str, int]


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    logsumexp: Tensor,
    grid_size: tuple[int, int],
    scale: float,
    *,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    seed: int = 0,
    deferred_copies: bool = False,
    outputs: Sequence[Tensor] | None = None,
    module: ModuleType | None = None,
) -> Gradients:
    """One launch of the backward kernel; ``outputs``: where to write the gradients of q, k and v, if not into new
    memory; else as :func:`forward`."""
    module = kernels() if module is None else module
    outputs = [empty_like_output(q) for _ in range(3)] if outputs is None else outputs
    sums = torch.full((*q.shape[:2], 1, 4), torch.nan)
    inputs = {"q": q, "k": k, "v": v, "pos_weight": pos_weight.float().contiguous(), "gate": gate.float().contiguous()}
    inputs |= {"grad_out": grad_out, "logsumexp": logsumexp, "seed": torch.tensor([dropout_seed])}
    tensors = {name: _argument(t.detach()) for name, t in inputs.items()}
    for name, t in zip(("grad_q", "grad_k", "grad_v", "sums"), (*outputs, sums), strict=True):
        tensors[name] = _argument(t, output=True)
    counts = module.backward(_problem(q, grid_size, scale), dropout_p, tensors, seed, deferred_copies)
    return Gradients(*outputs, sums, counts)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, pos_weight, gate, grid_size, scale, options):
        result = forward(q, k, v, pos_weight, gate, grid_size, scale, save=True, **options)
        ctx.save_for_backward(q, k, v, pos_weight, gate, result.logsumexp)
        ctx.settings = grid_size, scale, options
        return result.out

    @staticmethod
    def backward(ctx, grad_out):
        *tensors, logsumexp = ctx.saved_tensors
        grid_size, scale, options = ctx.settings
        grads = backward(grad_out, *tensors, logsumexp, grid_size, scale, **options)
        return grads.q, grads.k, grads.v, *parameter_gradients(grads.sums, *tensors[3:]), None, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    grid_size: tuple[int, int],
    scale: float,
    **options: object,
) -> Tensor:
    """The forward kernel, and the backward kernel behind it; ``options`` go to both."""
    return _Attention.apply(q, k, v, pos_weight, gate, grid_size, scale, options)


def forward_parts(q: Tensor, grid_size: tuple[int, int], multiprocessors: int) -> int:
    """Into how many blocks the launcher splits the query rows of a (batch, head)."""
    return kernels().forward_parts(_problem(q, grid_size, 1.0), multiprocessors)


def backward_fits(q: Tensor, grid_size: tuple[int, int], shared_bytes: int) -> bool:
    """Whether the backward kernel serves a problem where a block can have so many bytes of shared memory."""
    return kernels().backward_fits(_problem(q, grid_size, 1.0), shared_bytes)


def forward_shared_bytes(q: Tensor, grid_size: tuple[int, int], parts: int = 1) -> int:
    return kernels().forward_shared_bytes(_problem(q, grid_size, 1.0), parts)


@dataclass(frozen=True)
class TiledResult:
    out: Tensor
    content: Tensor | None
    logsumexp: Tensor | None
    counts: dict[str, int]


def tiled_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    grid_size: tuple[int, int],
    scale: float,
    *,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    save: bool = False,
    seed: int = 0,
    deferred_copies: bool = False,
    out: Tensor | None = None,
    module: ModuleType | None = None,
) -> TiledResult:
    """All launches of the tiled forward pass; arguments as for ``forward``."""
    module = kernels() if module is None else module
    out = empty_like_output(q) if out is None else out
    inputs = {"q": q, "k": k, "v": v, "pos_weight": pos_weight.float().contiguous(), "gate": gate.float().contiguous()}
    inputs["seed"] = torch.tensor([dropout_seed])
    outputs = {"out": out}
    if save:
        outputs |= {"content": empty_like_output(q), "logsumexp": torch.full(q.shape[:3], torch.nan)}
    tensors = {name: _argument(t.detach()) for name, t in inputs.items()}
    tensors |= {name: _argument(t, output=True) for name, t in outputs.items()}
    counts = module.tiled_forward(_problem(q, grid_size, scale), dropout_p, tensors, seed, deferred_copies)
    return TiledResult(out, outputs.get("content"), outputs.get("logsumexp"), counts)


def tiled_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    content: Tensor,
    logsumexp: Tensor,
    grid_size: tuple[int, int],
    scale: float,
    *,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    seed: int = 0,
    deferred_copies: bool = False,
    outputs: Sequence[Tensor] | None = None,
    module: ModuleType | None = None,
) -> Gradients:
    """All launches of the tiled backward pass; arguments as for ``backward``."""
    module = kernels() if module is None else module
    outputs = [empty_like_output(q) for _ in range(3)] if outputs is None else outputs
    problem = _problem(q, grid_size, scale)
    sums = torch.full((*q.shape[:2], module.tiled_slots(problem, dropout_p), 4), torch.nan)
    inputs = {"q": q, "k": k, "v": v, "pos_weight": pos_weight.float().contiguous(), "gate": gate.float().contiguous()}
    inputs |= {"grad_out": grad_out, "content": content, "logsumexp": logsumexp, "seed": torch.tensor([dropout_seed])}
    tensors = {name: _argument(t.detach()) for name, t in inputs.items()}
    for name, t in zip(("grad_q", "grad_k", "grad_v", "sums"), (*outputs, sums), strict=True):
        tensors[name] = _argument(t, output=True)
    counts = module.tiled_backward(problem, dropout_p, tensors, seed, deferred_copies)
    return Gradients(*outputs, sums, counts)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, pos_weight, gate, grid_size, scale, options):
        result = tiled_forward(q, k, v, pos_weight, gate, grid_size, scale, save=True, **options)
        ctx.save_for_backward(q, k, v, pos_weight, gate, result.content, result.logsumexp)
        ctx.settings = grid_size, scale, options
        return result.out

    @staticmethod
    def backward(ctx, grad_out):
        *tensors, content, logsumexp = ctx.saved_tensors
        grid_size, scale, options = ctx.settings
        grads = tiled_backward(grad_out, *tensors, content, logsumexp, grid_size, scale, **options)
        return grads.q, grads.k, grads.v, *parameter_gradients(grads.sums, *tensors[3:]), None, None, None


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    grid_size: tuple[int, int],
    scale: float,
    **options: object,
) -> Tensor:
    """The tiled kernels, forward and backward; ``options`` go to both."""
    return _TiledAttention.apply(q, k, v, pos_weight, gate, grid_size, scale, options)


def dropout_mask(grid_size: tuple[int, int], dropout_p: float, seed: int, image: int, transposed: bool) -> Tensor:
    """(N, N), 1 where an entry of the attention map is kept."""
    tokens = grid_size[0] * grid_size[1]
    mask, device_seed = torch.full((1, 1, tokens, tokens), -1, dtype=torch.int16), torch.tensor([seed])
    tensors = {"seed": _argument(device_seed), "mask": _argument(mask, output=True)}
    kernels().dropout_mask(*grid_size, dropout_p, tensors, image, transposed)
    return mask[0, 0]
