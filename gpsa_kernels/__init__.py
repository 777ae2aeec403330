"""Fused gated positional self-attention (GPSA) for ConViT models."""

from gpsa_kernels._version import __version__
from gpsa_kernels.backends import BACKENDS
from gpsa_kernels.functional import gpsa_attention
from gpsa_kernels.modules import FusedGPSA, SelfAttention

__all__ = ["BACKENDS", "FusedGPSA", "SelfAttention", "__version__", "gpsa_attention"]
