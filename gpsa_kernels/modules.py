"""The attention layers: FusedGPSA, and plain self-attention on torch's scaled_dot_product_attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpsa_kernels.analysis import non_locality
from gpsa_kernels.backends import BACKENDS
from gpsa_kernels.derivatives import first_order, transformed
from gpsa_kernels.formula import attention_map, relative_offsets
from gpsa_kernels.functional import gpsa_attention
from gpsa_kernels.tensors import accumulation_dtype, without_autocast


def _head_dim(dim: int, num_heads: int) -> int:
    if num_heads < 1 or dim % num_heads != 0:
        raise ValueError(f"dim must be a multiple of num_heads, got dim={dim} and num_heads={num_heads}")
    return dim // num_heads


def init_linear(module: nn.Module) -> None:
    """Initialises an nn.Linear as ConViT does: truncated normal weights, zero biases. For ``Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def check_settings(backend: str, grid_size: tuple[int, int] | None = None) -> None:
    """Raises ValueError where a layer cannot be made with these, naming the argument."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if grid_size is not None and not (len(grid_size) == 2 and all(isinstance(n, int) and n > 0 for n in grid_size)):
        raise ValueError(f"grid_size must be a pair (rows, columns) of positive integers or None, got {grid_size!r}")


def _check_tokens(x: Tensor, dim: int) -> None:
    if x.dim() != 3 or x.shape[2] != dim:
        raise ValueError(f"x must be (batch, tokens, {dim}), got shape {tuple(x.shape)}")


class FusedGPSA(nn.Module):
    """Gated positional self-attention (ConViT, arXiv 2103.10697), fused: a drop-in for timm's and the original's GPSA.

    Parameters, their names, shapes and order are those of both, so checkpoints pass either way.

    Args:
        dim: channels of the tokens.
        num_heads: attention heads H; ``dim`` must be a multiple of it.
        qkv_bias: whether the q, k and v projections have a bias.
        qk_scale: factor of the content scores, head_dim ** -0.5 if None.
        attn_drop: dropout probability of the mixed attention map, in training.
        proj_drop: dropout probability of the output, in training.
        locality_strength: the factor alpha of :meth:`local_init`.
        use_local_init: whether to start as a convolution (:meth:`local_init`).
        grid_size: (rows, columns) of the token grid; a square inferred from the token count if None.
        backend: see :func:`gpsa_kernels.gpsa_attention`.
        device: where the parameters are created.
        dtype: of the parameters.

    Raises:
        ValueError: ``dim`` is not a multiple of ``num_heads``, ``grid_size`` no pair of positive integers, or
            ``backend`` unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        locality_strength: float = 1.0,
        use_local_init: bool = True,
        *,
        grid_size: tuple[int, int] | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_settings(backend, grid_size)
        self.dim = dim
        self.num_heads = num_heads
        self.scale = _head_dim(dim, num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.locality_strength = locality_strength
        self.grid_size = grid_size
        self.backend = backend
        self._last_grid = grid_size or (1, 1)

        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.v = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.pos_proj = nn.Linear(3, num_heads, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.gating_param = nn.Parameter(torch.ones(num_heads, device=device, dtype=dtype))
        self.apply(init_linear)
        if use_local_init:
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
            ValueError: ``x`` is not (B, N, dim), or N does not fit the grid.
        """
        _check_tokens(x, self.dim)
        batch, tokens, dim = x.shape
        grid_size = self._grid(tokens, grid_size)
        q, k = self._queries_and_keys(x)
        v = self.v(x).view(batch, tokens, self.num_heads, -1).transpose(1, 2)
        out = gpsa_attention(
            q,
            k,
            v,
            self._pos_weight(),
            self.gating_param,
            grid_size,
            scale=self.scale,
            dropout_p=self.attn_drop.p if self.attn_drop.training else 0.0,
            backend=self.backend,
        )
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, tokens, dim)))

    def get_attention(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        """The mixed attention map (B, H, N, N) of ``x`` (B, N, dim), after attention dropout, with gradients."""
        _check_tokens(x, self.dim)
        grid_size = self._grid(x.shape[1], grid_size)
        q, k = self._queries_and_keys(x)
        dtype = accumulation_dtype(q.dtype)
        with without_autocast(x.device.type):
            attention = attention_map(
                q.to(dtype), k.to(dtype), self._pos_weight(), self.gating_param, grid_size, self.scale
            )
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
        grid_size = grid_size or self.grid_size
        if grid_size is None:
            side = int(tokens**0.5 + 0.5)
            if side * side != tokens:
                raise ValueError(f"x has {tokens} tokens, which make no square grid: pass grid_size=(rows, columns)")
            grid_size = (side, side)
        elif grid_size[0] * grid_size[1] != tokens:
            raise ValueError(f"x must have rows * columns tokens for grid_size {tuple(grid_size)}, got {tokens}")
        if not torch.compiler.is_compiling():
            self._last_grid = grid_size
        return grid_size

    def _queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, N, head_dim) views of the packed projection."""
        batch, tokens, _ = x.shape
        q, k = self.qk(x).view(batch, tokens, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind()
        return q, k

    def _pos_weight(self) -> Tensor:
        weight, bias = self.pos_proj.weight, self.pos_proj.bias
        if bias is None or not (bias.requires_grad and torch.is_grad_enabled()):
            return weight
        # The bias is constant along the keys and cancels in the softmax. Taking it along and slicing it off gives it
        # the zero gradient that DistributedDataParallel and optimizers wait for.
        return torch.cat((weight, bias.unsqueeze(1)), dim=1)[:, :3]


class SelfAttention(nn.Module):
    """Multi-head self-attention on torch's ``scaled_dot_product_attention``, with the parameter names of timm's MHSA.

    ``backend`` takes the names that :class:`FusedGPSA` takes, so that a model can give all its layers the same.

    Args:
        dim: channels of the tokens.
        num_heads: attention heads; ``dim`` must be a multiple of it.
        qkv_bias: whether the joint projection has a bias.
        qk_scale: factor of the scores, head_dim ** -0.5 if None.
        attn_drop: dropout probability of the attention map, in training.
        proj_drop: dropout probability of the output, in training.
        backend: "eager" writes the softmax out in plain PyTorch, which has all derivatives; every other calls torch's
            ``scaled_dot_product_attention``, "auto" only where first derivatives by ``backward()`` are enough.
        device: where the parameters are created.
        dtype: of the parameters.

    Raises:
        ValueError: ``dim`` is not a multiple of ``num_heads``, or ``backend`` unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_settings(backend)
        self.dim = dim
        self.num_heads = num_heads
        self.scale = _head_dim(dim, num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.apply(init_linear)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, backend={self.backend!r}"

    def _queries_keys_values(self, x: Tensor) -> tuple[Tensor, ...]:
        _check_tokens(x, self.dim)
        batch, tokens, _ = x.shape
        return self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind()

    def forward(self, x: Tensor) -> Tensor:
        """Attention over all tokens of ``x`` (B, N, dim); returns (B, N, dim)."""
        q, k, v = self._queries_keys_values(x)
        if self.backend == "eager" or (self.backend == "auto" and transformed()):
            out = self.attn_drop(self._attention_map(q, k)) @ v
        else:
            q, k, v = first_order(q, k, v)
            dropout_p = self.attn_drop.p if self.attn_drop.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(x.shape)))

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
