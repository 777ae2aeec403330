"""Arguments: what is refused, in words that name the argument, what came and what was expected, and what is taken."""

from __future__ import annotations

import pytest

from gpsa_kernels import FusedGPSA, SelfAttention

kinds = pytest.mark.parametrize("kind", [FusedGPSA, SelfAttention])


@kinds
def test_what_timm_and_the_original_have_in_different_orders_goes_by_name(kind):
    """timm's fourth argument is attn_drop, the original's qk_scale."""
    with pytest.raises(TypeError, match="from 2 to 4 positional arguments but 5"):
        kind(24, 4, False, 0.3)


@kinds
def test_a_scale_of_zero_is_the_default_as_in_the_original(kind):
    assert kind(16, 4, qk_scale=0.0).scale == kind(16, 4).scale == 0.5
