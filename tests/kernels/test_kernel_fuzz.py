"""Drawn calls of the kernels, few and small ones: they are interpreted or emulated."""

from __future__ import annotations

import pytest
from fuzz import fuzz


@pytest.mark.parametrize("seed", ["fixed", "fresh"])
def test_whatever_is_drawn_is_as_exact_as_eager(target, seed):
    fuzz(seed, 20, (target.backend,), target.dtypes, 20, 8)
