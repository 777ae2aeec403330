"""The attention layers: FusedGPSA, and plain self-attention on torch's scaled_dot_product_attention."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gpsa_kernels.analysis import non_locality
from gpsa_kernels.arguments import as_grid, as_number, check_backend, check_integer
from gpsa_kernels.backends import Call
from gpsa_kernels.derivatives import first_order, transformed
from gpsa_kernels.formula import gated_map, position_scores, relative_offsets
from gpsa_kernels.functional import gpsa_attention, select_backend
from gpsa_kernels.tensors import accumulation_dtype, without_autocast


def _head_dim(dim: int, num_heads: int) -> int:
    check_integer("dim", dim, least=1)
    check_integer("num_heads", num_heads, least=0)
    if num_heads < 1 or dim % num_heads != 0:
        raise ValueError(f"dim must be a multiple of num_heads, got dim={dim} and num_heads={num_heads}")
    return dim // num_heads


def init_linear(module: nn.Module) -> None:
    """Initialises an nn.Linear as ConViT does: truncated normal weights, zero biases. For ``Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_tokens(x: Tensor, dim: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != 3 or x.shape[2] != dim:
        raise ValueError(f"x must be (batch, tokens, {dim}), got shape {tuple(x.shape)}")


def is_plain(child: Any, expected: type[nn.Module]) -> bool:
    """Whether calling ``child`` does what its class does, and nothing else."""
    return (
        isinstance(child, expected)
        and type(child).forward is expected.forward
        and "forward" not in child.__dict__
        and not (child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks)
    )


def _split_heads(packed: Tensor, count: int, head_dim: int) -> tuple[Tensor, ...]:
    """(B, N, count * H * head_dim) as ``count`` views (B, H, N, head_dim), H fewer than the layer's where sharded."""
    batch, tokens, dim = packed.shape
    # view infers no size where the batch is empty
    return packed.view(batch, tokens, count, dim // (count * head_dim), head_dim).permute(2, 0, 3, 1, 4).unbind()


def position_weight(weight: Tensor, bias: Tensor | None) -> Tensor:
    """(H, 3), from the parameters of ``pos_proj``."""
    if bias is None or not (bias.requires_grad and torch.is_grad_enabled()):
        return weight
    # The bias is constant along the keys and cancels in the softmax. Taking it along and slicing it off gives it
    # the zero gradient that DistributedDataParallel and optimizers wait for.
    return torch.cat((weight, bias.unsqueeze(1)), dim=1)[:, :3]


def _leaf(layer: nn.Module, x: fx.Proxy, *args: Any) -> Any:
    """``layer`` as one node of the graph that torch.fx traces: what is inside branches on sizes that a proxy lacks."""
    assert isinstance(x.tracer, fx.Tracer)
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(layer), (x, *args), {})


def _may_call(name: str, backend: str) -> None:
    """Raises where a submodule that is not plain would be passed over: only the formula calls it."""
    if backend not in ("auto", "eager"):
        raise RuntimeError(
            f"backend {backend!r} does the work of {name} itself, which has hooks or is no plain module of torch.nn: "
            "backend='auto' and 'eager' call it"
        )


class FusedGPSA(nn.Module):
    """Gated positional self-attention (ConViT, arXiv 2103.10697), fused: a drop-in for timm's and the original's GPSA.

    Parameters, their names, shapes and order are those of both, so checkpoints pass either way. ``attn_drop`` and
    ``pos_proj`` are read, not called. Where one has hooks, or is no plain ``nn.Dropout`` or ``nn.Linear``, the layer
    runs the formula, which calls them; a backend asked for by name, other than "eager", then raises RuntimeError.

    Args:
        dim: channels of the tokens.
        num_heads: attention heads H; ``dim`` must be a multiple of it.
        qkv_bias: whether the q, k and v projections have a bias. What follows goes by name: timm and the original
            have it in different orders.
        qk_scale: factor of the content scores, head_dim ** -0.5 if None or, as in the original, 0.
        attn_drop: dropout probability of the mixed attention map, in training.
        proj_drop: dropout probability of the output, in training.
        locality_strength: the factor alpha of :meth:`local_init`.
        use_local_init: whether to start as a convolution (:meth:`local_init`).
        grid_size: (rows, columns) of the token grid; a square inferred from the token count if None.
        backend: see :func:`gpsa_kernels.gpsa_attention`.
        device: where the parameters are created.
        dtype: of the parameters.

    Raises:
        TypeError, ValueError: ``dim`` is not a multiple of ``num_heads``, ``grid_size`` no pair of positive integers,
            ``locality_strength`` not finite, or ``backend`` unknown.
    """

    _split_heads = staticmethod(_split_heads)

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        *,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        locality_strength: float = 1.0,
        use_local_init: bool = True,
        grid_size: tuple[int, int] | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_backend(backend)
        self.dim = dim
        self.num_heads = num_heads
        head_dim = _head_dim(dim, num_heads)
        self.scale = qk_scale or head_dim**-0.5
        self.locality_strength = locality_strength
        self.grid_size = None if grid_size is None else as_grid(grid_size)
        self.backend = backend
        self._last_grid = self.grid_size or (1, 1)

        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.v = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.pos_proj = nn.Linear(3, num_heads, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.gating_param = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.use_local_init = use_local_init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises all parameters, as the constructor does; needed after ``to_empty``."""
        self.apply(init_linear)
        nn.init.ones_(self.gating_param)
        if self.use_local_init:
            self.local_init()

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError("torch.jit.script cannot compile FusedGPSA: script unfuse(model), or use torch.export")

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, grid_size={self.grid_size}, backend={self.backend!r}"

    @torch.no_grad()
    def local_init(self, locality_strength: float | None = None) -> None:
        """Starts the layer as a convolution: v is the identity, and head h1 + k*h2 looks at offset (h2, h1) - centre.

        k = floor(sqrt(H)); the k*k first heads get alpha * (2*dx, 2*dy, -1), the others keep their random weights.

        Args:
            locality_strength: alpha, the layer's own if None.
        """
        alpha = self.locality_strength if locality_strength is None else locality_strength
        if not math.isfinite(as_number("locality_strength", alpha)):
            raise ValueError(f"locality_strength must be a finite number, got {alpha}")
        nn.init.eye_(self.v.weight)
        kernel_size = math.isqrt(self.num_heads)
        centre = (kernel_size - 1) / 2
        for h1 in range(kernel_size):
            for h2 in range(kernel_size):
                weights = [2 * alpha * (h2 - centre), 2 * alpha * (h1 - centre), -alpha]
                self.pos_proj.weight[h1 + kernel_size * h2] = self.pos_proj.weight.new_tensor(weights)

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        """Attention over the tokens of one grid.

        Args:
            x: (B, N, dim) tokens, row by row.
            grid_size: (rows, columns) for this call only.

        Returns:
            (B, N, dim).

        Raises:
            TypeError, ValueError: ``x`` is not (B, N, dim), ``grid_size`` no pair, or N does not fit it.
        """
        if isinstance(x, fx.Proxy):
            return _leaf(self, x, grid_size)
        _check_tokens(x, self.dim)
        batch, tokens, dim = x.shape
        grid_size = self._grid(tokens, grid_size)
        head_dim = dim // self.num_heads
        v = self.v(x)
        v = v.view(batch, tokens, v.shape[2] // head_dim, head_dim).transpose(1, 2)
        attn_drop, pos_proj = self.attn_drop, self.pos_proj
        if is_plain(attn_drop, nn.Dropout) and is_plain(pos_proj, nn.Linear):
            q, k = self._queries_and_keys(x)
            out = gpsa_attention(
                q,
                k,
                v,
                *self._position_and_gate(),
                grid_size,
                scale=self.scale,
                dropout_p=attn_drop.p if attn_drop.training else 0.0,
                backend=self.backend,
            )
        else:
            _may_call("pos_proj" if is_plain(attn_drop, nn.Dropout) else "attn_drop", self.backend)
            out = self.get_attention(x, grid_size) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def get_attention(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        """The mixed attention map (B, H, N, N) of ``x`` (B, N, dim), after attention dropout, with gradients."""
        _check_tokens(x, self.dim)
        grid_size = self._grid(x.shape[1], grid_size)
        q, k = self._queries_and_keys(x)
        dtype = accumulation_dtype(q.dtype)
        with without_autocast(x.device.type):
            if is_plain(self.pos_proj, nn.Linear):
                pos_weight, gate = self._position_and_gate()
                position = position_scores(pos_weight.to(dtype), grid_size)
            else:
                gate = self.gating_param
                position = self.pos_proj(self._rel_indices(grid_size))[0].permute(2, 0, 1).to(dtype)
            attention = gated_map(q.to(dtype), k.to(dtype), position, gate, self.scale)
        return self.attn_drop(attention.to(q.dtype))

    def get_attention_map(
        self, x: Tensor, return_map: bool = False, grid_size: tuple[int, int] | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """How far each head looks, (H,), in grid steps; with ``return_map`` also the batch's mean map (H, N, N)."""
        attention = self.get_attention(x, grid_size).mean(0)
        distance = non_locality(attention, self._grid(x.shape[1], grid_size))
        return (distance, attention) if return_map else distance

    def get_rel_indices(self, num_patches: int) -> Tensor:
        """(1, N, N, 3) offsets dx, dy, dx^2 + dy^2, key minus query, for N = ``num_patches`` tokens."""
        return self._rel_indices(self._grid(num_patches, None))

    @property
    def rel_indices(self) -> Tensor:
        """:meth:`get_rel_indices` for the grid of the latest call; computed when asked for, not kept."""
        return self._rel_indices(self._last_grid)

    def _rel_indices(self, grid_size: tuple[int, int]) -> Tensor:
        return relative_offsets(grid_size, self.gating_param.device, self.gating_param.dtype).unsqueeze(0)

    def _grid(self, tokens: int, grid_size: tuple[int, int] | None) -> tuple[int, int]:
        if grid_size is None:
            grid_size = self.grid_size
        if grid_size is None:
            side = int(tokens**0.5 + 0.5)
            if side == 0 or side * side != tokens:
                raise ValueError(f"x has {tokens} tokens, which make no square grid: pass grid_size=(rows, columns)")
            grid_size = (side, side)
        else:
            grid_size = as_grid(grid_size)
            if grid_size[0] * grid_size[1] != tokens:
                raise ValueError(f"x must have rows * columns tokens for grid_size {grid_size}, got {tokens}")
        if not torch.compiler.is_compiling():
            self._last_grid = grid_size
        return grid_size

    def _position_and_gate(self) -> tuple[Tensor, Tensor]:
        return position_weight(self.pos_proj.weight, self.pos_proj.bias), self.gating_param

    def _queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, N, head_dim) views of the packed projection."""
        q, k = self._split_heads(self.qk(x), 2, self.dim // self.num_heads)
        return q, k


def backend_of(layer: FusedGPSA, x: Tensor, grid_size: tuple[int, int] | None = None) -> str:
    """The name of the backend that ``layer(x, grid_size)`` would run now; nothing is computed.

    Raises:
        TypeError, ValueError: ``layer`` is no FusedGPSA, or what the layer raises.
        RuntimeError: the layer's backend cannot run the call.
    """
    if not isinstance(layer, FusedGPSA):
        raise TypeError(f"layer must be a FusedGPSA, got {type(layer).__name__}")
    _check_tokens(x, layer.dim)
    if not (is_plain(layer.attn_drop, nn.Dropout) and is_plain(layer.pos_proj, nn.Linear)):
        return "eager"
    batch, tokens, dim = x.shape
    rows, columns = layer._grid(tokens, grid_size)
    gate = layer.gating_param
    row = x.new_empty(dim // layer.num_heads, dtype=layer.v.weight.dtype)  # stands for all rows of q, k and v
    row.requires_grad_(x.requires_grad or any(p.requires_grad for p in layer.parameters()))
    q = row.expand(batch, layer.num_heads, tokens, -1)
    dropout_p = layer.attn_drop.p if layer.attn_drop.training else 0.0
    call = Call(q, q, q, layer.pos_proj.weight, gate, None, rows, columns, layer.scale, dropout_p)
    return select_backend(call, layer.backend).name


class SelfAttention(nn.Module):
    """Multi-head self-attention on torch's ``scaled_dot_product_attention``, with the parameter names of timm's MHSA.

    ``backend`` takes the names that :class:`FusedGPSA` takes, so that a model can give all its layers the same.

    Args:
        dim: channels of the tokens.
        num_heads: attention heads; ``dim`` must be a multiple of it.
        qkv_bias: whether the joint projection has a bias. What follows goes by name, as in :class:`FusedGPSA`.
        qk_scale: factor of the scores, head_dim ** -0.5 if None or 0.
        attn_drop: dropout probability of the attention map, in training.
        proj_drop: dropout probability of the output, in training.
        backend: "eager" writes the softmax out in plain PyTorch, which has all derivatives; every other calls torch's
            ``scaled_dot_product_attention``, "auto" only where first derivatives by ``backward()`` are enough.
        device: where the parameters are created.
        dtype: of the parameters.

    Raises:
        ValueError: ``dim`` is not a multiple of ``num_heads``, or ``backend`` unknown.
    """

    _split_heads = staticmethod(_split_heads)

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        *,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_backend(backend)
        self.dim = dim
        self.num_heads = num_heads
        head_dim = _head_dim(dim, num_heads)
        self.scale = qk_scale or head_dim**-0.5
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises all parameters, as the constructor does; needed after ``to_empty``."""
        self.apply(init_linear)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, backend={self.backend!r}"

    def _queries_keys_values(self, x: Tensor) -> tuple[Tensor, ...]:
        _check_tokens(x, self.dim)
        return self._split_heads(self.qkv(x), 3, self.dim // self.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """Attention over all tokens of ``x`` (B, N, dim); returns (B, N, dim)."""
        if isinstance(x, fx.Proxy):
            return _leaf(self, x)
        q, k, v = self._queries_keys_values(x)
        attn_drop = self.attn_drop
        plain = is_plain(attn_drop, nn.Dropout)
        if not plain:
            _may_call("attn_drop", self.backend)
        if not plain or self.backend == "eager" or (self.backend == "auto" and transformed()):
            out = attn_drop(self._attention_map(q, k)) @ v
        else:
            q, k, v = first_order(q, k, v)
            dropout_p = attn_drop.p if attn_drop.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def get_attention(self, x: Tensor) -> Tensor:
        """The attention map (B, H, N, N) of ``x`` (B, N, dim)."""
        q, k, _ = self._queries_keys_values(x)
        return self._attention_map(q, k)

    def _attention_map(self, q: Tensor, k: Tensor) -> Tensor:
        return (self.scale * (q @ k.transpose(-2, -1))).softmax(dim=-1)

    def get_attention_map(self, x: Tensor, return_map: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """How far each head looks, (H,), in steps of the square grid; with ``return_map`` also the mean map (H, N, N).

        Raises:
            ValueError: the tokens do not make a square grid (with a class token they never do).
        """
        attention = self.get_attention(x).mean(0)
        side = round(x.shape[1] ** 0.5)
        distance = non_locality(attention, (side, side))
        return (distance, attention) if return_map else distance
