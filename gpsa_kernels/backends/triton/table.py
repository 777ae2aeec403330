"""The launch table: tile sizes and compiler options by architecture and shape class; ``tools/tune.py`` rewrites it."""

from __future__ import annotations

from typing import NamedTuple


class Launch(NamedTuple):
    """Tile sizes and compiler options of one attention kernel."""

    query_tile: int
    key_tile: int
    warps: int
    stages: int


class PositionalLaunch(NamedTuple):
    """Tile sizes and compiler options of the positional kernels; all grid columns are in the tile."""

    row_tile: int
    channels: int
    query_columns: int  # of a step of the gradient
    warps: int


# class of rules.launch_class, kernel: for head_dim up to 32, 64 and 128
_ATTENTION: dict[tuple[str, str], list[Launch]] = {
    ("mma", "forward"): [Launch(64, 64, 4, 3), Launch(64, 64, 4, 2), Launch(64, 32, 4, 2)],
    ("mma", "backward_query"): [Launch(64, 32, 4, 2), Launch(64, 32, 4, 2), Launch(64, 32, 8, 2)],
    ("mma", "backward_key"): [Launch(32, 64, 4, 2), Launch(32, 64, 4, 2), Launch(32, 64, 8, 2)],
    ("wgmma", "forward"): [Launch(64, 64, 4, 3), Launch(64, 64, 4, 3), Launch(64, 64, 4, 2)],
    ("wgmma", "backward_query"): [Launch(64, 32, 4, 3), Launch(64, 32, 4, 3), Launch(64, 32, 4, 2)],
    ("wgmma", "backward_key"): [Launch(32, 64, 4, 1), Launch(32, 64, 4, 1), Launch(32, 64, 4, 2)],
    ("tcgen05", "forward"): [Launch(64, 64, 4, 3), Launch(64, 64, 4, 2), Launch(64, 64, 4, 2)],
    ("tcgen05", "backward_query"): [Launch(64, 32, 4, 2), Launch(64, 32, 4, 2), Launch(64, 32, 4, 2)],
    ("tcgen05", "backward_key"): [Launch(32, 64, 4, 2), Launch(32, 64, 4, 2), Launch(32, 64, 4, 2)],
    ("dense", "forward"): [Launch(64, 32, 8, 1), Launch(64, 32, 8, 1), Launch(32, 32, 4, 1)],
    ("dense", "backward_query"): [Launch(64, 32, 8, 1), Launch(64, 32, 8, 1), Launch(64, 32, 8, 1)],
    ("dense", "backward_key"): [Launch(32, 64, 8, 1), Launch(32, 64, 8, 1), Launch(32, 64, 8, 1)],
    ("float32", "forward"): [Launch(32, 32, 8, 1), Launch(32, 32, 8, 1), Launch(32, 32, 8, 1)],
    ("float32", "backward_query"): [Launch(32, 32, 8, 1), Launch(32, 32, 8, 1), Launch(32, 32, 8, 1)],
    ("float32", "backward_key"): [Launch(32, 32, 8, 1), Launch(32, 32, 8, 1), Launch(32, 32, 8, 1)],
}
ATTENTION: dict[tuple[str, str, int], Launch] = {
    (*key, head_dim): launch
    for key, launches in _ATTENTION.items()
    for head_dim, launch in zip((32, 64, 128), launches, strict=True)
}

# width of an element, columns of the padded grid
POSITIONAL: dict[tuple[str, int], PositionalLaunch] = {
    ("half", 16): PositionalLaunch(16, 16, 16, 4),
    ("half", 32): PositionalLaunch(16, 16, 32, 8),
    ("half", 64): PositionalLaunch(16, 8, 64, 8),
    ("half", 128): PositionalLaunch(16, 8, 64, 8),
    ("float32", 16): PositionalLaunch(16, 4, 16, 4),
    ("float32", 32): PositionalLaunch(16, 2, 32, 8),
    ("float32", 64): PositionalLaunch(16, 1, 32, 8),
}
