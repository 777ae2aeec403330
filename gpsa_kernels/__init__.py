"""Fused gated positional self-attention (GPSA) for ConViT models."""

from gpsa_kernels import flops  # noqa: F401  (registers formulas)
from gpsa_kernels._version import __version__
from gpsa_kernels.backends import BACKENDS
from gpsa_kernels.convert import fuse, unfuse
from gpsa_kernels.convit import (
    ConViT,
    convit_base,
    convit_base_plus,
    convit_small,
    convit_small_plus,
    convit_tiny,
    convit_tiny_plus,
)
from gpsa_kernels.functional import gpsa_attention
from gpsa_kernels.modules import FusedGPSA, SelfAttention, backend_of

__all__ = [
    "BACKENDS",
    "ConViT",
    "FusedGPSA",
    "SelfAttention",
    "__version__",
    "backend_of",
    "convit_base",
    "convit_base_plus",
    "convit_small",
    "convit_small_plus",
    "convit_tiny",
    "convit_tiny_plus",
    "fuse",
    "gpsa_attention",
    "unfuse",
]
