"""What a user could do instead of gpsa_kernels, and gpsa_kernels, one small entry each; and the truth about them.

Every peer of the operator takes q, k, v, pos_weight and gate and returns (B, H, N, D); every peer of the layer takes
tokens and the layer's parameters. What depends on nothing but the shapes is prepared once, outside the clock.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.convit import GPSA
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.workloads import DIRECTIONS, REFERENCE, Case
from gpsa_kernels import BACKENDS, FusedGPSA, gpsa_attention
from gpsa_kernels.backends import Call
from gpsa_kernels.formula import attention_map, relative_offsets
from gpsa_kernels.functional import select_backend

Function = Callable[..., Tensor]
Make = Callable[[Case, list[Tensor]], Function]  # prepares a peer for a case and its tensors
HOPELESS = 1e30  # JSON has no infinity
_LARGEST_MAP = 2**24  # entries, that float64 maps and what autograd keeps of them fit anywhere

# ---- the truth ------------------------------------------------------------------------------------------------------


def literal(case: Case, q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, gate: Tensor) -> Tensor:
    """The formula, every step in q's dtype."""
    return attention_map(q, k, pos_weight, gate, case.grid_size, case.scale) @ v


def formula(tensors: Sequence[Tensor], grad_out: Tensor, case: Case, dtype: torch.dtype) -> list[Tensor]:
    """The formula's result and its five gradients, in the order of TENSORS, computed in ``dtype``.

    A head and a slice of the batch at a time: they are independent but for the sums over the batch.
    """
    step = max(1, _LARGEST_MAP // case.tokens**2)
    found = []
    for head in range(case.heads):
        weights, parts = [t.detach()[head : head + 1] for t in tensors[3:]], []
        images = (t.detach()[:, head : head + 1].split(step) for t in (*tensors[:3], grad_out))
        for *qkv, grad in zip(*images, strict=True):
            leaves = [t.detach().to(dtype).requires_grad_() for t in (*qkv, *weights)]
            out = literal(case, *leaves)
            parts.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))])
        *slices, pos_weight, gate = zip(*parts, strict=True)
        sums = (torch.stack(pieces).double().sum(0) for pieces in (pos_weight, gate))
        found.append([*map(torch.cat, slices), *sums])
    *whole, pos_weight, gate = zip(*found, strict=True)
    return [*(torch.cat(heads, 1) for heads in whole), torch.cat(pos_weight), torch.cat(gate)]


def deviation(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of any tensor, relative to that tensor's largest entry; HOPELESS where one is not finite.

    ``got`` may be shorter: a peer without a backward pass has a result alone.
    """
    worst = 0.0
    for a, b in zip(got, expected, strict=False):
        if a.shape != b.shape or not bool(a.isfinite().all()):
            return HOPELESS
        worst = max(worst, ((a.double() - b.double()).abs().max() / b.double().abs().max()).item())
    return worst


def allowed(dtype: torch.dtype, eager: float) -> float:
    """Half of the dtype's digits, or as many as the formula itself keeps in that dtype (``eager``, its deviation).

    It tells another function from rounding, no more; how exact each backend is, the section accuracy says.
    """
    return max(float(torch.finfo(dtype).eps) ** 0.5, eager)


# ---- peers ----------------------------------------------------------------------------------------------------------


class Unavailable(Exception):
    """Why a peer cannot take part, as a clause."""


@dataclass(frozen=True)
class Peer:
    """One way to compute an attention."""

    name: str  # in tables and pictures
    make: Make  # raises Unavailable where it cannot
    gpsa: bool = True  # if it computes no GPSA, it has no position, and is there as the line to beat
    devices: tuple[str, ...] = ("cpu", "cuda")  # where it exists
    directions: tuple[str, ...] = DIRECTIONS  # what it can be timed in
    compiled: bool = False  # whether it needs torch.compile
    tuned: bool = False  # whether that tries many kernels, which takes minutes

    def prepare(self, case: Case, tensors: list[Tensor]) -> Function:
        """``make``, after what holds for every peer."""
        if tensors[0].device.type not in self.devices:
            raise Unavailable(f"it needs {' or '.join(self.devices)}")
        return self.make(case, tensors)

    def under_compile(self) -> Peer:
        """The same under torch.compile, for fixed shapes and in one graph."""
        make = _compiled(self.make)
        return replace(self, name=f"{self.name}, compiled", make=make, compiled=True)

    def under_autotune(self) -> Peer:
        """The same, with the fastest of many kernels for each of its products."""
        make = _compiled(self.make, mode="max-autotune-no-cudagraphs")
        name = f"{self.name}, max-autotune"
        return replace(self, name=name, make=make, devices=("cuda",), compiled=True, tuned=True)


def _compiled(make: Make, **options: str) -> Make:
    return lambda case, tensors: torch.compile(make(case, tensors), fullgraph=True, dynamic=False, **options)


@dataclass(frozen=True)
class Subject:
    """What is measured: the operator or the layer."""

    peers: tuple[Peer, ...]
    inputs: Callable[[Case, str, int], list[Tensor]]  # on a device, from a seed: activations, then parameters
    formula: Callable[[Sequence[Tensor], Tensor, Case, torch.dtype], list[Tensor]]  # the truth, as ``formula`` says it
    attention: Callable[[Case, list[Tensor]], list[Tensor]]  # tensors like those that the operator is called with
    activations: int  # how many of the tensors are new in every call; the rest are parameters


def inputs(case: Case, device: str, seed: int) -> list[Tensor]:
    """q, k, v with the strides they have in a layer (q and k packed in one projection), pos_weight as a new layer's,
    gates of all kinds; each requires gradients."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    shape = (case.batch, case.tokens, 3, case.heads, case.head_dim)
    packed = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    qk, v = packed[:, :, :2].contiguous(), packed[:, :, 2].contiguous()
    q, k = qk.permute(2, 0, 3, 1, 4).unbind()
    weight = FusedGPSA(case.heads * case.head_dim, case.heads, device=device, dtype=dtype).pos_proj.weight
    gate = torch.randn(case.heads, generator=generator, device=device, dtype=dtype)
    return [t.detach().requires_grad_() for t in (q, k, v.transpose(1, 2), weight, gate)]


# ---- timm -----------------------------------------------------------------------------------------------------------


class _Tokens:
    """Stands for the layer's input, and knows what its projections would be."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.qk, self.v = _Pair((q, k)), v.transpose(1, 2).flatten(2)
        self.shape = self.v.shape


class _Pair(tuple[Tensor, ...]):
    """q and k, in place of the packed tensor from which the layer unpacks them."""

    def reshape(self, *_: int) -> _Pair:
        return self

    permute = reshape


def timm(case: Case, tensors: list[Tensor]) -> Function:
    """timm's own layer code between the projections, on given q, k and v, as every timm since 0.6 has it."""
    if case.rows != case.columns:
        raise Unavailable("it knows square grids only")
    q, _, _, pos_weight, gate = tensors
    layer = GPSA(case.heads * case.head_dim, case.heads).to(q)
    layer.rel_indices = layer.get_rel_indices(case.tokens).to(q)
    del layer.qk, layer.v, layer.pos_proj.weight, layer.gating_param
    layer.qk, layer.v, layer.proj = lambda x: x.qk, lambda x: x.v, nn.Identity()
    layer.pos_proj.weight, layer.gating_param = pos_weight, gate

    heads = case.heads, case.head_dim
    return lambda q, k, v, *_: layer(_Tokens(q, k, v)).unflatten(2, heads).transpose(1, 2)


# ---- plain PyTorch --------------------------------------------------------------------------------------------------


def _position(pos_weight: Tensor, offsets: Tensor) -> Tensor:
    """The positional map (H, N, N), once for the whole batch, in float32."""
    return torch.einsum("ijc,hc->hij", offsets, pos_weight.float()).softmax(-1)


def eager(case: Case, tensors: list[Tensor]) -> Function:
    """The formula without the position expanded to the batch and without the division by one."""
    offsets = relative_offsets(case.grid_size, tensors[0].device, torch.float32)

    def function(q, k, v, pos_weight, gate):
        g = torch.sigmoid(gate).view(-1, 1, 1)
        content = (q @ k.transpose(-2, -1) * case.scale).softmax(-1)
        return ((1 - g) * content + (g * _position(pos_weight, offsets)).to(q.dtype)) @ v

    return function


def sdpa_and_map(
    case: Case, tensors: list[Tensor], cached: bool = False, kernels: Sequence[SDPBackend] = ()
) -> Function:
    """torch's attention for the content, the positional map times V for the position; ``cached`` keeps the map."""
    attention = sdpa_alone(*kernels)(case, tensors)
    offsets = relative_offsets(case.grid_size, tensors[0].device, torch.float32)
    kept = _position(tensors[3].detach(), offsets).to(tensors[0].dtype) if cached else None

    def function(q, k, v, pos_weight, gate):
        position = _position(pos_weight, offsets).to(q.dtype) if kept is None else kept
        content = attention(q, k, v, pos_weight, gate)
        # einsum folds the batch into the columns of one product a head; matmul would expand the map to the batch
        return torch.lerp(content, torch.einsum("hij,bhjd->bhid", position, v), torch.sigmoid(gate).view(-1, 1, 1))

    return function


def flex_twice(case: Case, tensors: list[Tensor]) -> Function:
    """One FlexAttention call for the content, one whose scores are the position's."""
    attention = torch.compile(flex_attention, dynamic=False)
    columns = case.columns

    def function(q, k, v, pos_weight, gate):
        w = pos_weight.float()

        def score(content, batch, head, query, key):
            dx, dy = key % columns - query % columns, key // columns - query // columns
            return w[head, 0] * dx + w[head, 1] * dy + w[head, 2] * (dx * dx + dy * dy)

        position = attention(q, k, v, score_mod=score)
        return torch.lerp(attention(q, k, v), position, torch.sigmoid(gate).view(-1, 1, 1))

    return function


def sdpa_alone(*backends: SDPBackend) -> Make:
    """Attention without any position, by one of torch's kernels, or by the one that torch picks."""

    def function(q, k, v, pos_weight, gate):
        with sdpa_kernel(list(backends)) if backends else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v)

    return lambda case, tensors: function


# ---- gpsa_kernels ---------------------------------------------------------------------------------------------------


def ours(name: str) -> Peer:
    """The operator on one of its backends, or on "auto"."""

    def make(case: Case, tensors: list[Tensor]) -> Function:
        check_backend(name, case, tensors)
        return lambda *tensors: gpsa_attention(*tensors, case.grid_size, backend=name)

    return Peer(f"gpsa_kernels {name}", make)


def auto(case: Case, tensors: list[Tensor]) -> str:
    """The backend that "auto" takes for these tensors."""
    return select_backend(Call(*tensors, None, *case.grid_size, case.scale, 0.0)).name


def check_backend(name: str, case: Case, tensors: list[Tensor]) -> None:
    """Raises Unavailable, with the backend's own reason, where it cannot run these tensors; "auto" always can."""
    if name == "auto":
        return
    backend = BACKENDS[name]
    reason = backend.unavailable() or backend.unsupported(Call(*tensors, None, *case.grid_size, case.scale, 0.0))
    if reason is None and name == "triton" and tensors[0].device.type == "cpu":
        reason = "here it runs in Triton's interpreter, whose times mean nothing"
    if reason is not None:
        raise Unavailable(reason)


TIMM = Peer(REFERENCE, timm)
ONCE = Peer("eager, position once", eager)
MAP = Peer("SDPA + positional map", sdpa_and_map)
CUDNN = partial(sdpa_and_map, kernels=[SDPBackend.CUDNN_ATTENTION])
CACHED = Peer("SDPA + cached map", partial(sdpa_and_map, cached=True), directions=("forward",))
PLAIN = Peer("SDPA alone", sdpa_alone(), gpsa=False)

OPERATOR = Subject(
    peers=(
        *(TIMM, ONCE, MAP),
        Peer("SDPA + positional map, cuDNN", CUDNN, devices=("cuda",)),
        CACHED,
        *(ours(name) for name in reversed(BACKENDS)),
        PLAIN,
        Peer("SDPA alone, flash", sdpa_alone(SDPBackend.FLASH_ATTENTION), gpsa=False),
        Peer("SDPA alone, cuDNN", sdpa_alone(SDPBackend.CUDNN_ATTENTION), gpsa=False, devices=("cuda",)),
        Peer("SDPA alone, efficient", sdpa_alone(SDPBackend.EFFICIENT_ATTENTION), gpsa=False, devices=("cuda",)),
        *(peer.under_compile() for peer in (TIMM, ONCE, MAP, CACHED, ours("auto"))),
        Peer("FlexAttention twice", flex_twice, compiled=True),
        *(peer.under_autotune() for peer in (ONCE, MAP)),
    ),
    inputs=inputs,
    formula=formula,
    attention=lambda case, tensors: tensors,
    activations=3,
)


# ---- the layer, projections and all ---------------------------------------------------------------------------------

# the bias of the position comes last: it cancels, its gradient is zero and there is nothing to compare
PARAMETERS = ("qk.weight", "v.weight", "proj.weight", "proj.bias", "pos_proj.weight", "gating_param", "pos_proj.bias")


def layer_inputs(case: Case, device: str, seed: int) -> list[Tensor]:
    """Tokens (B, N, heads * head_dim), then a new layer's parameters in the order of PARAMETERS."""
    torch.manual_seed(seed)
    dtype, dim = getattr(torch, case.dtype), case.heads * case.head_dim
    layer = FusedGPSA(dim, case.heads, device=device, dtype=dtype)
    x = torch.randn(case.batch, case.tokens, dim, device=device, dtype=dtype, requires_grad=True)
    return [x, *(layer.get_parameter(name) for name in PARAMETERS)]


def _heads(t: Tensor, heads: int) -> Tensor:
    return t.unflatten(2, (heads, -1)).transpose(1, 2)


def in_layer(peer: Peer) -> Peer:
    """Projections around a peer of the operator, the same for everybody."""

    def make(case: Case, tensors: list[Tensor]) -> Function:
        attention = peer.prepare(case, layer_attention(case, tensors))
        return lambda *tensors: _projected(attention, tensors, case.heads)

    return replace(peer, make=make)


def _projected(attention: Function, tensors: Sequence[Tensor], heads: int) -> Tensor:
    x, qk, v, proj, proj_bias, pos_weight, gate = tensors[:7]
    q, k = F.linear(x, qk).unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    out = attention(q, k, _heads(F.linear(x, v), heads), pos_weight, gate)
    return F.linear(out.transpose(1, 2).flatten(2), proj, proj_bias)


def layer_formula(tensors: Sequence[Tensor], grad_out: Tensor, case: Case, dtype: torch.dtype) -> list[Tensor]:
    """The layer's result and the gradients of x and of all PARAMETERS but the last, computed in ``dtype``."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors[:-1]]
    out = _projected(partial(literal, case), leaves, case.heads)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(dtype))]


def layer_attention(case: Case, tensors: list[Tensor]) -> list[Tensor]:
    """Tensors like those of the layer's attention, and its parameters."""
    return [*[_heads(tensors[0], case.heads)] * 3, *tensors[5:7]]


def our_layer(name: str) -> Peer:
    """FusedGPSA on a backend, with the shared parameters in place of its own."""

    def make(case: Case, tensors: list[Tensor]) -> Function:
        check_backend(name, case, layer_attention(case, tensors))
        layer = FusedGPSA(tensors[0].size(2), case.heads, grid_size=case.grid_size, backend=name)
        for parameter, tensor in zip(PARAMETERS, tensors[1:], strict=True):
            owner, _, attribute = parameter.rpartition(".")
            setattr(layer.get_submodule(owner), attribute, tensor)
        return lambda x, *_: layer(x)

    return Peer(f"gpsa_kernels {name}", make)


TIMM_LAYER, PLAIN_LAYER = in_layer(TIMM), in_layer(PLAIN)

LAYER = Subject(
    peers=(
        TIMM_LAYER,
        *(our_layer(name) for name in reversed(BACKENDS)),
        PLAIN_LAYER,
        *(peer.under_compile() for peer in (TIMM_LAYER, our_layer("auto"), PLAIN_LAYER)),
    ),
    inputs=layer_inputs,
    formula=layer_formula,
    attention=layer_attention,
    activations=1,
)
