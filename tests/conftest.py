"""What all tests share: poisoned memory, seeds, and the two tiers."""

import pytest
import torch
import torch._functorch.config
from tiers import pytest_collection_modifyitems, pytest_terminal_summary  # noqa: F401

torch._functorch.config.enable_autograd_cache = False  # it keeps an operator's backward pass when our code changes


@pytest.fixture(scope="session")
def architectures(pytestconfig: pytest.Config) -> tuple[int, ...]:
    """What kernels are compiled for: every day one architecture."""
    return (90,) if "not proof" in pytestconfig.option.markexpr else (80, 90, 100, 120)


@pytest.fixture(autouse=True)
def _poisoned_and_seeded():
    """Every uninitialised tensor starts as NaN, so an element that is read before it is written shows."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def _no_vmap_fallback():
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)
