"""Drawn calls of the kernels, few and small ones: they are interpreted or emulated."""

from __future__ import annotations

import pytest
from fuzz import fuzz

from gpsa_kernels.backends.triton import INTERPRETED


@pytest.mark.parametrize("seed", ["fixed", "fresh"])
def test_whatever_is_drawn_is_as_exact_as_eager(target, seed):
    fuzz(seed, 12 if INTERPRETED else 100, (target.backend,), target.dtypes, 20, 8)
