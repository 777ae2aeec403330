"""The launch table: tile sizes and compiler options by architecture and shape class; ``tools/tune.py`` rewrites it."""

from __future__ import annotations

from typing import NamedTuple


class Launch(NamedTuple):
    """Tile sizes and compiler options of one attention kernel."""

    query_tile: int
    key_tile: int
    warps: int
    stages: int
    registers: int | None = None  # of a thread; named where the compiler would rather spill than take a few more


class PositionalLaunch(NamedTuple):
    """Tile sizes and compiler options of the positional kernels; all grid columns are in the tile."""

    row_tile: int
    channels: int
    query_columns: int  # of a step of the gradient
    warps: int


# (class of rules.launch_class, kernel, head_dim up to)
ATTENTION: dict[tuple[str, str, int], Launch] = {
    ("mma", "forward", 32): Launch(query_tile=64, key_tile=64, warps=4, stages=3, registers=None),
    ("mma", "forward", 64): Launch(query_tile=64, key_tile=64, warps=4, stages=2, registers=None),
    ("mma", "forward", 128): Launch(query_tile=64, key_tile=32, warps=4, stages=2, registers=None),
    ("mma", "backward_query", 32): Launch(query_tile=64, key_tile=32, warps=4, stages=2, registers=None),
    ("mma", "backward_query", 64): Launch(query_tile=64, key_tile=32, warps=4, stages=2, registers=None),
    ("mma", "backward_query", 128): Launch(query_tile=64, key_tile=32, warps=8, stages=2, registers=None),
    ("mma", "backward_key", 32): Launch(query_tile=32, key_tile=64, warps=4, stages=2, registers=None),
    ("mma", "backward_key", 64): Launch(query_tile=32, key_tile=64, warps=4, stages=2, registers=None),
    ("mma", "backward_key", 128): Launch(query_tile=32, key_tile=64, warps=8, stages=2, registers=None),
    ("wgmma", "forward", 32): Launch(query_tile=64, key_tile=64, warps=4, stages=3, registers=None),
    ("wgmma", "forward", 64): Launch(query_tile=64, key_tile=64, warps=4, stages=3, registers=None),
    ("wgmma", "forward", 128): Launch(query_tile=64, key_tile=64, warps=4, stages=2, registers=None),
    ("wgmma", "backward_query", 32): Launch(query_tile=64, key_tile=32, warps=4, stages=3, registers=None),
    ("wgmma", "backward_query", 64): Launch(query_tile=64, key_tile=32, warps=4, stages=3, registers=None),
    ("wgmma", "backward_query", 128): Launch(query_tile=64, key_tile=32, warps=4, stages=2, registers=None),
    ("wgmma", "backward_key", 32): Launch(query_tile=32, key_tile=64, warps=4, stages=1, registers=None),
    ("wgmma", "backward_key", 64): Launch(query_tile=32, key_tile=64, warps=4, stages=1, registers=None),
    ("wgmma", "backward_key", 128): Launch(query_tile=32, key_tile=64, warps=4, stages=2, registers=None),
    ("tcgen05", "forward", 32): Launch(query_tile=64, key_tile=64, warps=4, stages=3, registers=None),
    ("tcgen05", "forward", 64): Launch(query_tile=64, key_tile=64, warps=4, stages=2, registers=None),
    ("tcgen05", "forward", 128): Launch(query_tile=64, key_tile=64, warps=4, stages=2, registers=None),
    ("tcgen05", "backward_query", 32): Launch(query_tile=64, key_tile=32, warps=4, stages=2, registers=None),
    ("tcgen05", "backward_query", 64): Launch(query_tile=64, key_tile=32, warps=4, stages=2, registers=None),
    ("tcgen05", "backward_query", 128): Launch(query_tile=64, key_tile=32, warps=4, stages=2, registers=None),
    ("tcgen05", "backward_key", 32): Launch(query_tile=32, key_tile=64, warps=4, stages=2, registers=None),
    ("tcgen05", "backward_key", 64): Launch(query_tile=32, key_tile=64, warps=4, stages=2, registers=None),
    ("tcgen05", "backward_key", 128): Launch(query_tile=32, key_tile=64, warps=4, stages=2, registers=None),
    ("dense", "forward", 32): Launch(query_tile=64, key_tile=32, warps=8, stages=1, registers=None),
    ("dense", "forward", 64): Launch(query_tile=64, key_tile=32, warps=8, stages=1, registers=None),
    ("dense", "forward", 128): Launch(query_tile=32, key_tile=32, warps=4, stages=1, registers=None),
    ("dense", "backward_query", 32): Launch(query_tile=64, key_tile=32, warps=8, stages=1, registers=None),
    ("dense", "backward_query", 64): Launch(query_tile=64, key_tile=32, warps=8, stages=1, registers=None),
    ("dense", "backward_query", 128): Launch(query_tile=64, key_tile=32, warps=8, stages=1, registers=None),
    ("dense", "backward_key", 32): Launch(query_tile=32, key_tile=64, warps=8, stages=1, registers=None),
    ("dense", "backward_key", 64): Launch(query_tile=32, key_tile=64, warps=8, stages=1, registers=None),
    ("dense", "backward_key", 128): Launch(query_tile=32, key_tile=64, warps=8, stages=1, registers=None),
    ("float32", "forward", 32): Launch(query_tile=32, key_tile=32, warps=8, stages=1, registers=255),
    ("float32", "forward", 64): Launch(query_tile=32, key_tile=32, warps=8, stages=1, registers=255),
    ("float32", "forward", 128): Launch(query_tile=32, key_tile=32, warps=8, stages=1, registers=None),
    ("float32", "backward_query", 32): Launch(query_tile=32, key_tile=32, warps=8, stages=1, registers=255),
    ("float32", "backward_query", 64): Launch(query_tile=32, key_tile=32, warps=8, stages=1, registers=255),
    ("float32", "backward_query", 128): Launch(query_tile=32, key_tile=32, warps=8, stages=1, registers=None),
    ("float32", "backward_key", 32): Launch(query_tile=32, key_tile=32, warps=8, stages=1, registers=255),
    ("float32", "backward_key", 64): Launch(query_tile=32, key_tile=32, warps=8, stages=1, registers=255),
    ("float32", "backward_key", 128): Launch(query_tile=32, key_tile=32, warps=8, stages=1, registers=None),
}

# (class, columns of the padded grid)
POSITIONAL: dict[tuple[str, int], PositionalLaunch] = {
    ("half", 16): PositionalLaunch(row_tile=16, channels=16, query_columns=16, warps=4),
    ("half", 32): PositionalLaunch(row_tile=16, channels=16, query_columns=32, warps=8),
    ("half", 64): PositionalLaunch(row_tile=16, channels=8, query_columns=64, warps=8),
    ("half", 128): PositionalLaunch(row_tile=16, channels=8, query_columns=64, warps=8),
    ("float32", 16): PositionalLaunch(row_tile=16, channels=4, query_columns=16, warps=4),
    ("float32", 32): PositionalLaunch(row_tile=16, channels=2, query_columns=32, warps=8),
    ("float32", 64): PositionalLaunch(row_tile=16, channels=1, query_columns=32, warps=8),
}
