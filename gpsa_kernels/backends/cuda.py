"""The CUDA C++ kernels of ``csrc/``: finds, loads and calls the compiled library.

Importing this loads nothing. The library lies in ``gpsa_kernels/_cuda`` if this installation was built with it, beside
a file that says how, so that what does not fit is told before the dynamic loader is asked.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from gpsa_kernels._version import __version__
from gpsa_kernels.backends.base import Backend, Call, Forward, Gradients, Saved, strided_channels
from gpsa_kernels.tensors import cast_dtype

FOLDER = Path(__file__).parents[1] / "_cuda"
_WHOLE_IMAGE_TOKENS = 256  # above which every kernel is tiled, and backward reads the content branch's own output


class Build(NamedTuple):
    """How the library was built."""

    version: str  # of gpsa_kernels
    cuda: str  # "13.0"
    nvcc: str  # "13.0.88"
    architectures: list[str]  # "sm_90" for machine code, "compute_120" for PTX
    torch: str  # the version it was built with
    oldest_torch: str  # the first that has all it needs


def build() -> Build | None:
    """How the library was built, None where there is none. Raises what comes of a file that cannot be read."""
    path = FOLDER / "build.json"
    return Build(**json.loads(path.read_text())) if path.exists() else None


@functools.cache
def _load() -> str | None:
    """Loads the library; or why it cannot be used here."""
    try:
        built = build()
    except (OSError, ValueError, TypeError) as error:
        return f"its library's build.json cannot be read: {error}"
    if built is None:
        return (
            "this installation was built without the CUDA library (GPSA_BUILD_CUDA=1 pip install -v "
            "--no-build-isolation . builds it from source, or says what is missing)"
        )
    if built.version != __version__:
        return f"its library is of gpsa_kernels {built.version}, and this is {__version__}: build it again"
    if torch.version.cuda is None:
        return f"its library was built for CUDA {built.cuda}, and torch {torch.__version__} has no CUDA"
    if torch.version.cuda.split(".")[0] != built.cuda.split(".")[0]:
        return f"its library was built for CUDA {built.cuda}, and torch {torch.__version__} for {torch.version.cuda}"
    if torch.__version__ < built.oldest_torch:
        return f"its library needs torch >= {built.oldest_torch}, and this is {torch.__version__}"
    try:
        torch.ops.load_library(str(FOLDER / "gpsa_cuda.so"))
    except OSError as error:
        return f"its library cannot be loaded: {error.__cause__ or error}"
    if not torch.cuda.is_available():
        return "no CUDA device was found"
    return None


def unavailable() -> str | None:
    return _load()


@functools.cache
def _code_for(device: int | None) -> str | None:
    """Why a device cannot run the library's code; None also where there is no device, for fake tensors."""
    built = build()
    if built is None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    for name in built.architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        assert match is not None, name
        code = int(match[2]), int(match[3])
        forward = match[1] == "compute" and not match[4]  # PTX for whatever comes later
        same = (major, minor) == code if match[4] == "a" else major == code[0]
        if (major, minor) >= code and (same or forward):
            return None
    return (
        f"its library was built for {', '.join(built.architectures)}, and the device has compute capability "
        f"{major}.{minor}"
    )


def _unsupported_device(device: int | None) -> str | None:
    return _code_for(device)


# What torch.compiler.assume_constant_result does, which would load the whole compiler: both are asked while a call is
# traced, and neither can be.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]
_unsupported_device._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unsupported(call: Call) -> str | None:
    if call.q.device.type != "cuda":
        return f"its kernels run on CUDA tensors, and q is on {call.q.device}"
    return unsupported_tensors(call) or _unsupported_device(call.q.device.index)


def unsupported_tensors(call: Call) -> str | None:
    """Why the kernels could not run a call on any device, or None."""
    q = call.q
    dtype = cast_dtype(q)
    if dtype != torch.float16 and dtype != torch.bfloat16:
        return f"its kernels take float16 and bfloat16, and q is {dtype}"
    if q.size(-1) % 8 or q.size(-1) > 128:
        return f"head_dim must be a multiple of 8 from 8 to 128, got {q.size(-1)}"
    return strided_channels(call)


@functools.lru_cache(maxsize=1024)
def _saves_content(rows: int, columns: int, head_dim: int, bfloat16: bool, dropout_p: float, device: int) -> bool:
    return torch.ops.gpsa_cuda.saves_content(rows, columns, head_dim, bfloat16, dropout_p, device)


def saves_content(call: Call) -> bool:
    q = call.q
    if q.size(2) > _WHOLE_IMAGE_TOKENS:  # the library says so, too; not asked, it leaves the sizes symbolic
        return True
    shape, device = (int(call.rows), int(call.columns), int(q.size(3))), q.device.index
    if device is None:
        device = torch.cuda.current_device() if torch.cuda.is_available() else -1
    with _disable_current_modes():  # which are for operators on tensors
        return _saves_content(*shape, q.dtype == torch.bfloat16, call.dropout_p, device)


def forward(call: Call, save: bool) -> Forward:
    return Forward(*torch.ops.gpsa_cuda.forward(*call, save))


def backward(grad_out: Tensor, call: Call, saved: Saved) -> Gradients:
    return Gradients(*torch.ops.gpsa_cuda.backward(grad_out, *call, *saved))


BACKEND = Backend(
    name="cuda",
    unavailable=unavailable,
    unsupported=unsupported,
    forward=forward,
    backward=backward,
    kernel_devices=frozenset({"cuda"}),
    saves_content=saves_content,
)
