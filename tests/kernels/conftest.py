"""The tests of the kernels: Triton's on the CPU in its interpreter, every backend's on a GPU, with the same code.

``TRITON_INTERPRET=1 python -m pytest tests/kernels`` runs them without a GPU. Triton reads the variable when it is
imported, so one process either interprets or compiles.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from gpsa_kernels import BACKENDS
from gpsa_kernels.backends.triton import INTERPRETED


class Target(NamedTuple):
    """A backend with kernels, a device they run on, and the dtypes they take there."""

    backend: str
    device: str
    dtypes: tuple[torch.dtype, ...]


_GPU_DTYPES = {
    "triton": (torch.float32, torch.float16, torch.bfloat16),
    "cuda": (torch.float16, torch.bfloat16),
}


def _targets() -> list[Target]:
    if INTERPRETED:  # float64 for exact gradient checks; its bfloat16 is wrong
        return [Target("triton", "cpu", (torch.float64, torch.float32, torch.float16))]
    names = [name for name in _GPU_DTYPES if name in BACKENDS and BACKENDS[name].unavailable() is None]
    return [Target(name, "cuda", _GPU_DTYPES[name]) for name in names]


TARGETS = _targets()
collect_ignore_glob = [] if TARGETS else ["test_*.py"]


def pytest_generate_tests(metafunc):
    if "target" in metafunc.fixturenames:
        if "dtype" in metafunc.fixturenames:
            pairs = [(target, dtype) for target in TARGETS for dtype in target.dtypes]
            ids = [f"{target.backend}-{str(dtype).removeprefix('torch.')}" for target, dtype in pairs]
            metafunc.parametrize(("target", "dtype"), pairs, ids=ids)
        else:
            metafunc.parametrize("target", TARGETS, ids=[target.backend for target in TARGETS])


@pytest.fixture
def widest(target):
    """The dtype in which a target computes most exactly."""
    return target.dtypes[0]
