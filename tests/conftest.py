import pytest
import torch
import torch._functorch.config

torch._functorch.config.enable_autograd_cache = False  # it keeps an operator's backward pass when our code changes


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Every uninitialised tensor starts as NaN, so an element that is read before it is written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
