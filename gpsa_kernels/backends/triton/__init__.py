"""Fused GPSA kernels in Triton, forward and backward.

Importing this costs nothing: Triton itself is loaded at the first call. With ``TRITON_INTERPRET=1`` in the environment
from the start of the process the kernels run on CPU tensors in Triton's interpreter, to be checked without a GPU.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from gpsa_kernels.backends.base import Backend, Call, Forward, Gradients, Saved, strided_channels

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
_INSTALLED = importlib.util.find_spec("triton") is not None


def forward(call: Call, save: bool) -> Forward:
    from gpsa_kernels.backends.triton import launch

    return launch.forward(call, save)


def backward(grad_out: Tensor, call: Call, saved: Saved) -> Gradients:
    from gpsa_kernels.backends.triton import launch

    return launch.backward(grad_out, call, saved)


def unavailable() -> str | None:
    if not _INSTALLED:
        return "triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available():
        return "no CUDA device was found (with TRITON_INTERPRET=1 in the environment it runs on the CPU, to be checked)"
    return None


def unsupported(call: Call) -> str | None:
    q = call.q
    if not INTERPRETED:
        if q.device.type != "cuda":
            return f"its kernels run on CUDA tensors, and q is on {q.device}"
        if q.dtype == torch.float64:
            return "its kernels take float64 only in Triton's interpreter (TRITON_INTERPRET=1)"
    elif q.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly"
    if q.size(-1) % 8 or q.size(-1) > 128:
        return f"head_dim must be a multiple of 8 from 8 to 128, got {q.size(-1)}"
    return strided_channels(call)


BACKEND = Backend(
    name="triton",
    unavailable=unavailable,
    unsupported=unsupported,
    forward=forward,
    backward=backward,
    kernel_devices=frozenset({"cuda", "cpu"} if INTERPRETED else {"cuda"}),
)
