"""Tensor parallelism: the heads of an attention layer divided among GPUs.

Not imported by the package itself: it needs a torch that is built with ``torch.distributed``.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel, parallelize_module

from gpsa_kernels.modules import Attention, FusedGPSA, SelfAttention, position_weight


class HeadwiseParallel(ParallelStyle):
    """Shards :class:`FusedGPSA` and :class:`SelfAttention` over heads, for ``parallelize_module``.

    Each rank keeps q, k, v, position and gate of its own heads, and the rows of ``proj`` that they meet; their outputs
    are summed by one all-reduce, and so are the input's gradients. A layer takes the same tokens on every rank, or a
    DTensor, which is gathered, and returns the same on every rank. Ranks that draw dropout masks must be seeded alike.

    The parameters become DTensors. ``state_dict`` keeps names, shapes and values, ``qk`` and ``qkv`` gathered, so all
    ranks call it together. In the layer these two are grouped by head, (heads, 2 or 3, head_dim, dim), as is what an
    optimizer keeps of them.

    Raises, when it is applied:
        TypeError: the module is no such layer, or its linear layers are no plain ``nn.Linear``.
        ValueError: the mesh has more than one dimension, or its ranks do not divide the heads.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, Attention) or type(module) not in _HEADWISE:
            raise TypeError(f"HeadwiseParallel shards a FusedGPSA or SelfAttention, got {type(module).__name__}")
        for name in ("qk", "v", "qkv", "proj", "pos_proj"):
            child = getattr(module, name, None)
            if child is not None and type(child) is not nn.Linear:
                raise TypeError(f"{name} must be an nn.Linear to be sharded over heads, got {type(child).__name__}")
        if device_mesh.ndim != 1:
            raise ValueError(f"device_mesh must have one dimension, got {device_mesh.ndim}: pass mesh['name']")
        heads, ranks = module.num_heads, device_mesh.size()
        if heads % ranks != 0:
            raise ValueError(f"num_heads must be a multiple of the {ranks} ranks of the mesh, got {heads}")

        def shard(owner: nn.Module, kind: type[nn.Module], packed: int = 0) -> None:
            for name, parameter in owner.named_parameters(recurse=False):
                t = _by_head(parameter.detach(), packed, heads) if packed else parameter.detach()
                t = distribute_tensor(t, device_mesh, [Shard(0)], src_data_rank=self.src_data_rank)
                owner.register_parameter(name, nn.Parameter(t, parameter.requires_grad))
            owner.__class__ = kind

        if isinstance(module, FusedGPSA):
            shard(module.qk, _PackedLinear, packed=2)
            shard(module.v, _ShardedLinear)
            shard(module.pos_proj, nn.Linear)  # which is read, not called
        else:
            shard(module.get_submodule("qkv"), _PackedLinear, packed=3)
        parallelize_module(module.proj, device_mesh, RowwiseParallel(), src_data_rank=self.src_data_rank)
        shard(module, _HEADWISE[type(module)])  # the gate
        return module


def _by_head(packed: Tensor, count: int, heads: int) -> Tensor:
    """(count * H * head_dim, ...) as (H, count, head_dim, ...)."""
    return packed.unflatten(0, (count, heads, -1)).transpose(0, 1).contiguous()


def _own(parameter: Any) -> Tensor:
    """This rank's shard of a DTensor, as a plain tensor."""
    return parameter.to_local()


class _ShardedLinear(nn.Linear):
    """Computes this rank's part of the outputs, in plain tensors."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else _own(self.bias).flatten()
        return F.linear(input, _own(self.weight).flatten(0, -2), bias)


class _PackedLinear(_ShardedLinear):
    """Several projections in one, with parameters (H, count, head_dim, ...): in a ``state_dict`` what they were."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, _ in self.named_parameters():
            t = destination[prefix + name]
            t = t.redistribute(placements=[Replicate()] * t.device_mesh.ndim)
            destination[prefix + name] = t.transpose(0, 1).contiguous().flatten(0, 2)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, parameter in self.named_parameters():
            t = state_dict.get(prefix + name)
            t = t.full_tensor() if isinstance(t, DTensor) else t
            heads, count, head_dim, *inputs = parameter.shape
            # what has another shape is left to torch, which reports it
            if t is not None and t.shape == (heads * count * head_dim, *inputs):
                assert isinstance(parameter, DTensor)
                t, mesh, placements = _by_head(t.detach(), count, heads), parameter.device_mesh, parameter.placements
                state_dict[prefix + name] = distribute_tensor(t, mesh, placements, src_data_rank=None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Headwise(Attention):
    def _split_heads(self, packed: Tensor, count: int) -> tuple[Tensor, ...]:
        """As in the layers, of a projection that is grouped by head."""
        batch, tokens, channels = packed.shape
        head_dim = self.dim // self.num_heads
        heads = packed.view(batch, tokens, channels // (count * head_dim), count, head_dim)
        return heads.permute(3, 0, 2, 1, 4).unbind()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(x, DTensor):
            weight: Any = self.proj.weight
            x = DTensor.from_local(x, weight.device_mesh, [Replicate()], run_check=False)
        # each rank's gradient is of its own heads
        x = x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        return super().forward(x, *args, **kwargs)

    def reset_parameters(self) -> None:
        raise RuntimeError("a layer that is sharded over heads cannot be initialised: do it before, or load parameters")


class _HeadwiseGPSA(_Headwise, FusedGPSA):
    def _position_and_gate(self) -> tuple[Tensor, Tensor]:
        weight, bias = self.pos_proj.weight, self.pos_proj.bias
        return position_weight(_own(weight), None if bias is None else _own(bias)), _own(self.gating_param)

    def local_init(self, locality_strength: float | None = None) -> None:
        self.reset_parameters()


class _HeadwiseSelfAttention(_Headwise, SelfAttention):
    pass


_HEADWISE: dict[type[Attention], type[Attention]] = {FusedGPSA: _HeadwiseGPSA, SelfAttention: _HeadwiseSelfAttention}
