"""What this installation can do: versions, devices, what "auto" takes, each backend with what it serves or why not."""

from __future__ import annotations

import platform
from collections.abc import Sequence

import torch

from gpsa_kernels import auto
from gpsa_kernels._version import __version__
from gpsa_kernels.backends import BACKENDS, Backend, Call, cuda

_DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "fp16": torch.float16, "bf16": torch.bfloat16}


def report() -> str:
    """The text of ``python -m gpsa_kernels info``."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(count))]
    facts = [
        ("gpsa_kernels", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("device", "\n".join(map(torch.cuda.get_device_name, range(count))) or "cpu only"),
        ("threads", str(torch.get_num_threads())),
        ("library", _library()),
        ("auto", "\n".join(f"{device}: {auto.outlook(device)}" for device in devices)),
    ]
    backends = [("backend", "runs", "serves here, or why not")]
    for name, backend in BACKENDS.items():
        if (reason := backend.unavailable()) is not None:
            backends.append((name, "no", reason))
            continue
        served = [_served(backend, device) for device in ("cuda", "cpu") if device == "cpu" or count]
        backends.append((name, "yes", "\n".join(filter(None, served))))
    return f"{aligned(facts)}\n\n{aligned(backends)}"


def _library() -> str:
    """How the CUDA library of this installation was built."""
    try:
        built = cuda.build()
    except (OSError, ValueError, TypeError) as error:
        return f"build.json cannot be read: {error}"
    if built is None:
        return "none"
    return (
        f"gpsa_kernels {built.version} for CUDA {built.cuda}, torch >= {built.oldest_torch} "
        f"({', '.join(built.architectures)}); built by nvcc {built.nvcc} with torch {built.torch}"
    )


def _served(backend: Backend, device: str) -> str:
    """The dtypes that ``backend`` takes on ``device``, asked of the backend itself; empty if none."""

    def runs(dtype: torch.dtype, dropout_p: float) -> bool:
        q = torch.empty(1, 1, 4, 64, dtype=dtype, device=device)
        return backend.unsupported(Call(q, q, q, q, q, None, 2, 2, 1.0, dropout_p)) is None

    names = [name for name, dtype in _DTYPES.items() if runs(dtype, 0.0)]
    if not names:
        return ""
    with_dropout = all(runs(_DTYPES[name], 0.5) for name in names)
    return f"{device}: {', '.join(names)}" + ("" if with_dropout else "; no attention dropout")


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """``rows`` in columns; a last cell of several lines stays in its column."""
    widths = [max(map(len, column)) for column in zip(*(row[:-1] for row in rows), strict=True)]
    lines = []
    for *cells, last in rows:
        start = "".join(f"{cell:<{width}}  " for cell, width in zip(cells, widths, strict=True))
        lines.append(start + last.replace("\n", "\n" + " " * len(start)))
    return "\n".join(line.rstrip() for line in lines)
