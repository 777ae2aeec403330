"""A whole attention layer, projections and all, in timm, in gpsa_kernels and without a position."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import check, floors
from benchmarks.peers import REFERENCE, Function, Peer, Subject, check_backend, compiled, timm_layer
from benchmarks.workloads import Case
from gpsa_kernels import BACKENDS, FusedGPSA

# the bias of the position comes last: it cancels, its gradient is zero and there is nothing to compare
PARAMETERS = ("qk.weight", "v.weight", "proj.weight", "proj.bias", "pos_proj.weight", "gating_param", "pos_proj.bias")


def inputs(case: Case, device: str, seed: int) -> list[Tensor]:
    """Tokens (B, N, heads * head_dim), then a new layer's parameters in the order of PARAMETERS."""
    torch.manual_seed(seed)
    dtype, dim = getattr(torch, case.dtype), case.heads * case.head_dim
    layer = FusedGPSA(dim, case.heads, device=device, dtype=dtype)
    x = torch.randn(case.batch, case.tokens, dim, device=device, dtype=dtype, requires_grad=True)
    return [x, *(layer.get_parameter(name) for name in PARAMETERS)]


def _heads(t: Tensor, heads: int) -> Tensor:
    return t.unflatten(2, (heads, -1)).transpose(1, 2)


def _plain(attention: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: Sequence[Tensor], heads: int) -> Tensor:
    """Projections around an attention of q, k and v."""
    x, qk, v, proj, proj_bias = tensors[:5]
    q, k = F.linear(x, qk).unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    out = attention(q, k, _heads(F.linear(x, v), heads))
    return F.linear(out.transpose(1, 2).flatten(2), proj, proj_bias)


def formula(tensors: Sequence[Tensor], grad_out: Tensor, case: Case, dtype: torch.dtype) -> list[Tensor]:
    """The layer's result and the gradients of x and of all PARAMETERS but the last, computed in ``dtype``."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors[:-1]]
    *_, pos_weight, gate = leaves

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return check.literal(q, k, v, pos_weight, gate, case.grid_size, case.scale)

    out = _plain(attention, leaves, case.heads)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(dtype))]


def _holding(layer: nn.Module, tensors: Sequence[Tensor]) -> Function:
    """``layer`` with the shared parameters in place of its own."""
    for name, parameter in zip(PARAMETERS, tensors[1:], strict=True):
        owner, _, attribute = name.rpartition(".")
        setattr(layer.get_submodule(owner), attribute, parameter)
    return lambda x, *_: layer(x)


def timm(case: Case, tensors: list[Tensor]) -> Function:
    return _holding(timm_layer(case, tensors[0]), tensors)


def ours(name: str) -> Callable[[Case, list[Tensor]], Function]:
    """FusedGPSA on a backend."""

    def make(case: Case, tensors: list[Tensor]) -> Function:
        if name != "auto":
            check_backend(name, case, [_heads(tensors[0], case.heads)] * 3)
        layer = FusedGPSA(tensors[0].size(2), case.heads, grid_size=case.grid_size, backend=name)
        return _holding(layer, tensors)

    return make


def sdpa_alone(case: Case, tensors: list[Tensor]) -> Function:
    """The same projections around attention without a position."""
    return lambda *tensors: _plain(F.scaled_dot_product_attention, tensors, case.heads)


LAYER = Subject(
    peers=(
        Peer(REFERENCE, timm),
        *(Peer(f"gpsa_kernels {name}", ours(name)) for name in reversed(BACKENDS)),
        Peer("SDPA alone", sdpa_alone, gpsa=False),
        Peer("timm, compiled", compiled(timm), compiled=True),
        Peer("gpsa_kernels auto, compiled", compiled(ours("auto")), compiled=True),
        Peer("SDPA alone, compiled", compiled(sdpa_alone), gpsa=False, compiled=True),
    ),
    inputs=inputs,
    formula=formula,
    work=floors.layer_work,
    activations=1,
)
