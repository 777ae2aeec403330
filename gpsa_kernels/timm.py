"""timm's ConViT with fused layers, under names of its own in timm's registry.

Importing this module registers ``fused_convit_tiny``, ``_small`` and ``_base``, with timm's constructor arguments,
settings and pretrained weights, and the paper's larger ``_plus`` variants, for which nobody has published weights. In
timm's scripts: ``train.py --device-modules gpsa_kernels.timm --model fused_convit_small``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model
from timm.models.convit import ConVit
from torch import nn

from gpsa_kernels.convert import fuse
from gpsa_kernels.convit import fit_pos_embed


def _settings() -> dict[str, dict[str, Any] | PretrainedCfg]:
    settings: dict[str, dict[str, Any] | PretrainedCfg] = {}
    for size in ("tiny", "small", "base"):
        stock = get_pretrained_cfg(f"convit_{size}", allow_unregistered=False)
        assert stock is not None
        settings[f"fused_convit_{size}.{stock.tag}"] = stock
        settings[f"fused_convit_{size}_plus"] = replace(stock, hf_hub_id=None, tag=None)
    return settings


default_cfgs = generate_default_cfgs(_settings())  # where register_model looks for them


def _fit(model: ConVit, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    fit_pos_embed(state_dict, f"{prefix}pos_embed", model.patch_embed.grid_size)


def _fused(backend: str, **kwargs: Any) -> nn.Module:
    model = ConVit(**kwargs)
    model.register_load_state_dict_pre_hook(_fit)  # checkpoints of other image sizes, which timm's refuses
    return fuse(model, backend=backend, grid_size=model.patch_embed.grid_size)


def _create(variant: str, pretrained: bool, sizes: dict[str, int], kwargs: dict[str, Any]) -> nn.Module:
    features = {"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"}
    arguments = {"backend": "auto", "local_up_to_layer": 10, **sizes, **kwargs}
    return build_model_with_cfg(_fused, variant, pretrained, feature_cfg=features, **arguments)


@register_model
def fused_convit_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's ``convit_tiny``, fused: ``kwargs`` are timm's, and the ``backend`` of :func:`gpsa_kernels.fuse`."""
    return _create("fused_convit_tiny", pretrained, {"embed_dim": 48, "num_heads": 4}, kwargs)


@register_model
def fused_convit_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's ``convit_small``, fused; see :func:`fused_convit_tiny`."""
    return _create("fused_convit_small", pretrained, {"embed_dim": 48, "num_heads": 9}, kwargs)


@register_model
def fused_convit_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's ``convit_base``, fused; see :func:`fused_convit_tiny`."""
    return _create("fused_convit_base", pretrained, {"embed_dim": 48, "num_heads": 16}, kwargs)


@register_model
def fused_convit_tiny_plus(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ConViT-Ti+ (arXiv 2103.10697, table 1), with 64 channels a head; see :func:`fused_convit_tiny`."""
    return _create("fused_convit_tiny_plus", pretrained, {"embed_dim": 64, "num_heads": 4}, kwargs)


@register_model
def fused_convit_small_plus(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ConViT-S+ (arXiv 2103.10697, table 1), with 64 channels a head; see :func:`fused_convit_tiny`."""
    return _create("fused_convit_small_plus", pretrained, {"embed_dim": 64, "num_heads": 9}, kwargs)


@register_model
def fused_convit_base_plus(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ConViT-B+ (arXiv 2103.10697, table 1), with 64 channels a head; see :func:`fused_convit_tiny`."""
    return _create("fused_convit_base_plus", pretrained, {"embed_dim": 64, "num_heads": 16}, kwargs)
