"""Checks of arguments: an error names the argument, what came and what was expected."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, strided

from gpsa_kernels.backends import BACKENDS
from gpsa_kernels.tensors import autocast_dtype

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_tensors(q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gate: Tensor) -> None:
    """Raises TypeError or ValueError unless these are tensors of :func:`gpsa_kernels.gpsa_attention`."""
    for name, t in (("q", q), ("k", k), ("v", v), ("pos_weight", pos_weight), ("gate", gate)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if t.layout is not strided or t.is_nested:
            raise TypeError(f"{name} must be a dense tensor, got {'nested' if t.is_nested else t.layout}")
        if t.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {t.dtype}")
    shape, dtype, device = q.shape, q.dtype, q.device
    if len(shape) != 4:
        raise ValueError(f"q must have 4 dimensions (batch, heads, tokens, head_dim), got shape {tuple(shape)}")
    _, heads, tokens, head_dim = shape
    if heads == 0 or tokens == 0 or head_dim == 0:
        raise ValueError(f"q must have at least one head, token and channel, got shape {tuple(shape)}")
    for name, t, expected in (
        ("k", k, shape),
        ("v", v, shape),
        ("pos_weight", pos_weight, (heads, 3)),
        ("gate", gate, (heads,)),
    ):
        if t.shape != expected:
            wanted = f"q's shape {tuple(shape)}" if expected is shape else f"shape {expected} for {heads} heads"
            raise ValueError(f"{name} must have {wanted}, got {tuple(t.shape)}")
        if t.device != device:
            raise ValueError(f"{name} must be on q's device {device}, got {t.device}")
    if not dtype == k.dtype == v.dtype:
        # under autocast q, k and v are cast to one dtype before any work, as SDPA's are, unless they are float64
        for name, t in (("k", k), ("v", v)):
            if t.dtype != dtype and (autocast_dtype(device.type) is None or torch.float64 in (t.dtype, dtype)):
                raise TypeError(f"{name} must have q's dtype {dtype}, got {t.dtype}")


def check_backend(name: Any) -> None:
    """Raises ValueError unless ``name`` is "auto" or a backend's."""
    if not isinstance(name, str) or (name != "auto" and name not in BACKENDS):
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {name!r}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, (Integral, torch.SymInt)) and not isinstance(value, bool)


def check_integer(name: str, value: Any, least: int) -> None:
    """Raises TypeError unless ``value`` is an integer, ValueError if it is less than ``least``."""
    if not _is_integer(value):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def as_number(name: str, value: Any) -> float:
    """``value`` as a float: Python's and NumPy's numbers. Raises TypeError for all else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a finite number, got {value!r} ({type(value).__name__})")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def as_pair(name: str, value: Any, meaning: str = "(rows, columns)") -> tuple[int, int]:
    """``value``, a tuple or list, as two integers. Raises ValueError if it is no pair, TypeError for other contents."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be a pair {meaning}, got {value!r}")
    first, second = value
    if (type(first) is int and type(second) is int) or torch._C._is_tracing():  # where sizes are tensors
        return first, second
    if not (_is_integer(first) and _is_integer(second)):
        raise TypeError(f"{name} must hold two integers, got {value!r}")
    return tuple(n if isinstance(n, torch.SymInt) else int(n) for n in value)  # type: ignore[return-value]


def as_grid(value: Any) -> tuple[int, int]:
    """:func:`as_pair` for a token grid, whose sides are positive."""
    grid_size = as_pair("grid_size", value)
    if min(grid_size) < 1:
        raise ValueError(f"grid_size must be a pair (rows, columns) of positive integers or None, got {value!r}")
    return grid_size
