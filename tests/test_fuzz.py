"""Ten thousand drawn calls of the backends that need no GPU; tests/kernels has the kernels'."""

import pytest
import torch
from fuzz import fuzz

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("seed", [f"{kind} {part}" for kind in ("fixed", "fresh") for part in range(20)])
def test_whatever_is_drawn_is_as_exact_as_eager(seed):
    fuzz(seed, 250, ("eager", "sdpa", "auto"), DTYPES, 60)
