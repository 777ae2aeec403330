"""timm's ConViT with fused layers, under names of its own in timm's registry.

Importing this module registers ``fused_convit_tiny``, ``_small`` and ``_base``, with timm's constructor arguments,
settings and pretrained weights, and the paper's larger ``_plus`` variants, for which nobody has published weights. All
take the ``backend`` of :func:`gpsa_kernels.fuse`, too. In timm's scripts:
``train.py --device-modules gpsa_kernels.timm --model fused_convit_small``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model
from timm.models.convit import ConVit
from torch import nn

from gpsa_kernels.convert import fuse
from gpsa_kernels.convit import fit_pos_embed

default_cfgs: dict[str, Any] = {}  # where register_model looks for them


def _fit(model: ConVit, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    fit_pos_embed(state_dict, f"{prefix}pos_embed", model.patch_embed.grid_size)


def _fused(backend: str, **kwargs: Any) -> nn.Module:
    model = ConVit(**kwargs)
    model.register_load_state_dict_pre_hook(_fit)  # checkpoints of other image sizes, which timm's refuses
    return fuse(model, backend=backend, grid_size=model.patch_embed.grid_size)


def _register(name: str, settings: PretrainedCfg, **sizes: int) -> None:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        features = {"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"}
        arguments = {"backend": "auto", "local_up_to_layer": 10, **sizes, **kwargs}
        return build_model_with_cfg(_fused, name, pretrained, feature_cfg=features, **arguments)

    create.__name__ = name
    default_cfgs.update(generate_default_cfgs({f"{name}.{settings.tag}" if settings.tag else name: settings}))
    globals()[name] = register_model(create)


for _size, _heads in (("tiny", 4), ("small", 9), ("base", 16)):
    _stock = get_pretrained_cfg(f"convit_{_size}", allow_unregistered=False)
    assert _stock is not None
    _register(f"fused_convit_{_size}", _stock, num_heads=_heads, embed_dim=48)  # timm's embed_dim is that of a head
    _unpublished = replace(_stock, hf_hub_id=None, tag=None)
    _register(f"fused_convit_{_size}_plus", _unpublished, num_heads=_heads, embed_dim=64)
