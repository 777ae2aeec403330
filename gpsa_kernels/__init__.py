"""Fused gated positional self-attention (GPSA) for ConViT models."""

from gpsa_kernels._version import __version__
from gpsa_kernels.backends import BACKENDS
from gpsa_kernels.functional import gpsa_attention

__all__ = ["BACKENDS", "__version__", "gpsa_attention"]
