"""The attention layers: FusedGPSA, and plain self-attention on torch's scaled_dot_product_attention."""

from __future__ import annotations

import math
from typing import Any, ClassVar

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


def init_linear(module: nn.Module) -> None:
    """Initialises an nn.Linear as ConViT does: truncated normal weights, zero biases. For ``Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def is_plain(child: Any, expected: type[nn.Module]) -> bool:
    """Whether calling ``child`` does what its class does, and nothing else."""
    return (
        isinstance(child, expected)
        and type(child).forward is expected.forward
        and "forward" not in child.__dict__
        and not (child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks)
    )


def position_weight(weight: Tensor, bias: Tensor | None) -> Tensor:
    """(H, 3), from the parameters of ``pos_proj``."""
    if bias is None or not (bias.requires_grad and torch.is_grad_enabled()):
        return weight
    # The bias is constant along the keys and cancels in the softmax. Taking it along and slicing it off gives it
    # the zero gradient that DistributedDataParallel and optimizers wait for.
    return torch.cat((weight, bias.unsqueeze(1)), dim=1)[:, :3]


class Attention(nn.Module):
    """What both layers have."""

    proj: nn.Linear
    # what fused attention reads instead of calling; where one is not plain, the formula calls it
    bypassed: ClassVar[dict[str, type[nn.Module]]] = {"attn_drop": nn.Dropout}
    _outputs = 1  # values that forward returns: None after the first

    def __init__(
        self, dim: int, num_heads: int, qk_scale: float | None, attn_drop: float, proj_drop: float, backend: str
    ) -> None:
        super().__init__()
        check_backend(backend)
        check_integer("dim", dim, least=1)
        check_integer("num_heads", num_heads, least=0)
        if num_heads < 1 or dim % num_heads != 0:
            raise ValueError(f"dim must be a multiple of num_heads, got dim={dim} and num_heads={num_heads}")
        self.dim = dim
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.backend = backend
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj_drop = nn.Dropout(proj_drop)

    def reset_parameters(self) -> None:
        """Initialises all parameters, as the constructor does; needed after ``to_empty``."""
        self.apply(init_linear)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, backend={self.backend!r}"

    def _check_tokens(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise ValueError(f"x must be (batch, tokens, {self.dim}), got shape {tuple(x.shape)}")

    def _split_heads(self, packed: Tensor, count: int) -> tuple[Tensor, ...]:
        """(B, N, count * H * head_dim) as ``count`` views (B, H, N, head_dim); where sharded, H are fewer."""
        batch, tokens, channels = packed.shape
        head_dim = self.dim // self.num_heads
        # view infers no size where the batch is empty
        heads = packed.view(batch, tokens, count, channels // (count * head_dim), head_dim)
        return heads.permute(2, 0, 3, 1, 4).unbind()

    def _is_fused(self) -> bool:
        """Whether nothing has to be called that fused attention passes over; a backend asked for by name insists."""
        for name, expected in self.bypassed.items():
            if not is_plain(getattr(self, name), expected):
                if self.backend not in ("auto", "eager"):
                    raise RuntimeError(
                        f"backend {self.backend!r} does the work of {name} itself, which has hooks or is no plain "
                        "module of torch.nn: backend='auto' and 'eager' call it"
                    )
                return False
        return True

    def _dropout_p(self) -> float:
        return self.attn_drop.p if self.attn_drop.training else 0.0

    def _project(self, out: Tensor) -> Any:
        """(B, H, N, head_dim) to what the layer returns."""
        out = self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
        return out if self._outputs == 1 else (out, *(None,) * (self._outputs - 1))

    def _traced(self, x: fx.Proxy, *args: Any) -> Any:
        """The layer as one node of the graph of torch.fx: what is inside branches on sizes that a proxy lacks."""
        assert isinstance(x.tracer, fx.Tracer)
        return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x, *args), {})


class FusedGPSA(Attention):
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

    bypassed: ClassVar[dict[str, type[nn.Module]]] = {"attn_drop": nn.Dropout, "pos_proj": nn.Linear}

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
        super().__init__(dim, num_heads, qk_scale, attn_drop, proj_drop, backend)
        self.locality_strength = locality_strength
        self.use_local_init = use_local_init
        self.grid_size = None if grid_size is None else as_grid(grid_size)
        self._last_grid = self.grid_size or (1, 1)
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.v = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.pos_proj = nn.Linear(3, num_heads, device=device, dtype=dtype)
        self.gating_param = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.gating_param)
        if self.use_local_init:
            self.local_init()

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError("torch.jit.script cannot compile FusedGPSA: script unfuse(model), or use torch.export")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, grid_size={self.grid_size}"

    @torch.no_grad()
    def local_init(self, locality_strength: float | None = None) -> None:
        """Starts the layer as a convolution: v is the identity, and head h1 + k*h2 looks at offset (h2, h1) - centre.

        k = floor(sqrt(H)); the k*k first heads get alpha * (2*dx, 2*dy, -1), the others keep their random weights;
        alpha is ``locality_strength``, the layer's own if None.
        """
        alpha = self.locality_strength if locality_strength is None else locality_strength
        if not math.isfinite(as_number("locality_strength", alpha)):
            raise ValueError(f"locality_strength must be a finite number, got {alpha}")
        nn.init.eye_(self.v.weight)
        kernel_size = math.isqrt(self.num_heads)
        for head in range(kernel_size**2):
            dx, dy = (index - (kernel_size - 1) / 2 for index in divmod(head, kernel_size))
            self.pos_proj.weight[head] = self.pos_proj.weight.new_tensor([2 * alpha * dx, 2 * alpha * dy, -alpha])

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        """Attention over tokens (B, N, dim), row by row, on a grid (rows, columns) of this call; returns (B, N, dim).

        Raises:
            TypeError, ValueError: ``x`` is not (B, N, dim), ``grid_size`` no pair, or N does not fit it.
        """
        if isinstance(x, fx.Proxy):
            return self._traced(x, grid_size)
        self._check_tokens(x)
        batch, tokens, dim = x.shape
        grid_size = self._grid(tokens, grid_size)
        head_dim = dim // self.num_heads
        v = self.v(x)
        v = v.view(batch, tokens, v.shape[2] // head_dim, head_dim).transpose(1, 2)
        if not self._is_fused():
            return self._project(self.get_attention(x, grid_size) @ v)
        q, k = self._split_heads(self.qk(x), 2)
        settings: dict[str, Any] = {"scale": self.scale, "dropout_p": self._dropout_p(), "backend": self.backend}
        return self._project(gpsa_attention(q, k, v, *self._position_and_gate(), grid_size, **settings))

    def get_attention(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        """The mixed attention map (B, H, N, N) of ``x`` (B, N, dim), after attention dropout, with gradients."""
        self._check_tokens(x)
        grid_size = self._grid(x.shape[1], grid_size)
        q, k = self._split_heads(self.qk(x), 2)
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


def backend_of(layer: FusedGPSA, x: Tensor, grid_size: tuple[int, int] | None = None) -> str:
    """The name of the backend that ``layer(x, grid_size)`` would run now; nothing is computed.

    Raises:
        TypeError, ValueError: ``layer`` is no FusedGPSA, or what the layer raises.
        RuntimeError: the layer's backend cannot run the call.
    """
    if not isinstance(layer, FusedGPSA):
        raise TypeError(f"layer must be a FusedGPSA, got {type(layer).__name__}")
    layer._check_tokens(x)
    if not layer._is_fused():
        return "eager"
    batch, tokens, dim = x.shape
    rows, columns = layer._grid(tokens, grid_size)
    row = x.new_empty(dim // layer.num_heads, dtype=layer.v.weight.dtype)  # stands for all rows of q, k and v
    row.requires_grad_(x.requires_grad or any(p.requires_grad for p in layer.parameters()))
    q = row.expand(batch, layer.num_heads, tokens, -1)
    parameters = layer.pos_proj.weight, layer.gating_param
    call = Call(q, q, q, *parameters, None, rows, columns, layer.scale, layer._dropout_p())
    return select_backend(call, layer.backend).name


class SelfAttention(Attention):
    """Multi-head self-attention on torch's ``scaled_dot_product_attention``, with the parameter names of timm's MHSA.

    Arguments and errors are those of :class:`FusedGPSA`, but for ``backend``: "eager" writes the softmax out in plain
    PyTorch, which has all derivatives; every other name calls torch's ``scaled_dot_product_attention``, "auto" only
    where first derivatives by ``backward()`` are enough.
    """

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
        super().__init__(dim, num_heads, qk_scale, attn_drop, proj_drop, backend)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.reset_parameters()

    def _queries_keys_values(self, x: Tensor) -> tuple[Tensor, ...]:
        self._check_tokens(x)
        return self._split_heads(self.qkv(x), 3)

    def forward(self, x: Tensor) -> Tensor:
        """Attention over all tokens of ``x`` (B, N, dim); returns (B, N, dim)."""
        if isinstance(x, fx.Proxy):
            return self._traced(x)
        q, k, v = self._queries_keys_values(x)
        if not self._is_fused() or self.backend == "eager" or (self.backend == "auto" and transformed()):
            return self._project(self.attn_drop(self._attention_map(q, k)) @ v)
        q, k, v = first_order(q, k, v)
        return self._project(F.scaled_dot_product_attention(q, k, v, dropout_p=self._dropout_p(), scale=self.scale))

    def get_attention(self, x: Tensor) -> Tensor:
        """The attention map (B, H, N, N) of ``x`` (B, N, dim)."""
        q, k, _ = self._queries_keys_values(x)
        return self._attention_map(q, k)

    def _attention_map(self, q: Tensor, k: Tensor) -> Tensor:
        return (self.scale * (q @ k.transpose(-2, -1))).softmax(dim=-1)

    def get_attention_map(self, x: Tensor, return_map: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """As :meth:`FusedGPSA.get_attention_map`, of tokens that make a square grid: without a class token."""
        attention = self.get_attention(x).mean(0)
        side = round(x.shape[1] ** 0.5)
        distance = non_locality(attention, (side, side))
        return (distance, attention) if return_map else distance
