"""The backends, fastest first. Adding one is a module (or folder) here and a line in ``BACKENDS``."""

from __future__ import annotations

from gpsa_kernels.backends import cuda, eager, sdpa, triton
from gpsa_kernels.backends.base import Backend, Call

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (cuda.BACKEND, triton.BACKEND, sdpa.BACKEND, eager.BACKEND)
}

__all__ = ["BACKENDS", "Backend", "Call"]
