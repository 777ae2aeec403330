"""The launch table: tile sizes and compiler options by architecture and shape class. ``tune.py`` rewrites it."""

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
    warps: int


# (class of configs.launch_class, kernel) -> head_dim up to -> launch
ATTENTION: dict[tuple[str, str], dict[int, Launch]] = {
    ("mma", "forward"): {32: Launch(64, 64, 4, 3), 64: Launch(64, 64, 4, 2), 128: Launch(64, 32, 4, 2)},
    ("mma", "backward_query"): {32: Launch(64, 32, 4, 2), 64: Launch(64, 32, 4, 2), 128: Launch(64, 32, 8, 2)},
    ("mma", "backward_key"): {32: Launch(32, 64, 4, 2), 64: Launch(32, 64, 4, 2), 128: Launch(32, 64, 8, 2)},
    ("wgmma", "forward"): {32: Launch(64, 64, 4, 3), 64: Launch(64, 64, 4, 3), 128: Launch(64, 64, 4, 2)},
    ("wgmma", "backward_query"): {32: Launch(64, 64, 4, 2), 64: Launch(64, 64, 4, 2), 128: Launch(64, 32, 4, 2)},
    ("wgmma", "backward_key"): {32: Launch(64, 64, 4, 2), 64: Launch(64, 64, 4, 2), 128: Launch(32, 64, 4, 2)},
    ("tcgen05", "forward"): {32: Launch(64, 64, 4, 3), 64: Launch(64, 64, 4, 2), 128: Launch(64, 64, 4, 2)},
    ("tcgen05", "backward_query"): {32: Launch(64, 32, 4, 2), 64: Launch(64, 32, 4, 2), 128: Launch(64, 32, 4, 2)},
    ("tcgen05", "backward_key"): {32: Launch(32, 64, 4, 2), 64: Launch(32, 64, 4, 2), 128: Launch(32, 64, 4, 2)},
    ("tiles", "forward"): {32: Launch(64, 32, 8, 1), 64: Launch(64, 32, 8, 1), 128: Launch(32, 32, 4, 1)},
    ("tiles", "backward_query"): {32: Launch(64, 32, 8, 1), 64: Launch(64, 32, 8, 1), 128: Launch(64, 32, 8, 1)},
    ("tiles", "backward_key"): {32: Launch(32, 64, 8, 1), 64: Launch(32, 64, 8, 1), 128: Launch(32, 64, 8, 1)},
    ("float32", "forward"): {32: Launch(32, 32, 8, 1), 64: Launch(32, 32, 8, 1), 128: Launch(32, 32, 8, 1)},
    ("float32", "backward_query"): {32: Launch(32, 32, 8, 1), 64: Launch(32, 32, 8, 1), 128: Launch(32, 32, 8, 1)},
    ("float32", "backward_key"): {32: Launch(32, 32, 8, 1), 64: Launch(32, 32, 8, 1), 128: Launch(32, 32, 8, 1)},
}

# class -> columns of the padded grid -> launch
POSITIONAL: dict[str, dict[int, PositionalLaunch]] = {
    "half": {
        16: PositionalLaunch(16, 16, 4),
        32: PositionalLaunch(16, 16, 8),
        64: PositionalLaunch(16, 8, 8),
        128: PositionalLaunch(16, 8, 8),
    },
    "float32": {
        16: PositionalLaunch(16, 4, 4),
        32: PositionalLaunch(16, 4, 8),
        64: PositionalLaunch(16, 1, 8),
    },
}
