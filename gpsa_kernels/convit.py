"""ConViT, the vision transformer that starts as a convolution (d'Ascoli et al., arXiv 2103.10697).

The first layers are gated positional self-attention on the patch tokens; then the class token joins in, and the last
layers are plain self-attention. Parameter names are those of the original code and of timm, so checkpoints pass either
way.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpsa_kernels.arguments import as_pair, check_integer
from gpsa_kernels.modules import Attention, FusedGPSA, SelfAttention, init_linear
from gpsa_kernels.tensors import accumulation_dtype, known


def resample_pos_embed(pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Position embeddings (1, rows * columns, C) of one grid interpolated to another, bicubic with antialiasing."""
    image = pos_embed.unflatten(1, old_grid).permute(0, 3, 1, 2).to(accumulation_dtype(pos_embed.dtype))
    image = F.interpolate(image, size=new_grid, mode="bicubic", antialias=True)
    return image.flatten(2).transpose(1, 2).to(pos_embed.dtype)


def fit_pos_embed(state_dict: dict[str, Any], key: str, grid_size: tuple[int, int]) -> None:
    """Resamples the position embedding of another grid to ``grid_size`` (rows, columns), in a state_dict.

    The other grid is a square; a length that is none is left as it is, for torch to report.
    """
    loaded = state_dict.get(key)
    if loaded is not None and loaded.dim() == 3 and loaded.shape[1] != grid_size[0] * grid_size[1]:
        side = math.isqrt(loaded.shape[1])
        if side * side == loaded.shape[1]:
            state_dict[key] = resample_pos_embed(loaded, (side, side), grid_size)


def grid_of(image_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """(rows, columns) of patches in an image of (height, width). Raises ValueError if it does not divide into them."""
    height, width = image_size
    if min(height, width) < patch_size or height % patch_size or width % patch_size:
        raise ValueError(f"height and width must be multiples of the patch size {patch_size}, got {height} x {width}")
    return height // patch_size, width // patch_size


class DropPath(nn.Dropout):
    """Stochastic depth: drops the whole residual branch of a sample, with probability p, in training."""

    def forward(self, input: Tensor) -> Tensor:
        return input * super().forward(input.new_ones(input.shape[0], 1, 1)) if self.training else input


class Block(nn.Module):
    """A transformer block, normalising first: attention, then an MLP, each around a residual connection."""

    def __init__(self, attn: Attention, hidden_dim: int, drop: float, drop_path: float, **factory: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(attn.dim, eps=1e-6, **factory)
        self.attn = attn
        self.norm2 = nn.LayerNorm(attn.dim, eps=1e-6, **factory)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(attn.dim, hidden_dim, **factory),
                act=nn.GELU(),
                drop1=nn.Dropout(drop),
                fc2=nn.Linear(hidden_dim, attn.dim, **factory),
                drop2=nn.Dropout(drop),
            )
        )
        self.drop_path = DropPath(drop_path)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the MLP: the other layers know how by themselves."""
        self.mlp.apply(init_linear)

    def forward(self, x: Tensor, *grid_size: tuple[int, int]) -> Tensor:
        """(B, N, C) to (B, N, C); GPSA blocks are given the ``grid_size`` (rows, columns) of the tokens."""
        x = x + self.drop_path(self.attn(self.norm1(x), *grid_size))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConViT(nn.Module):
    """ConViT (arXiv 2103.10697) on :class:`FusedGPSA`, for images of any size that divides into patches.

    A grid of patches other than the constructor's resamples the position embedding on the fly, as does
    ``load_state_dict`` with the position embedding of another, square, grid. For torch.export a height or width that is
    left open is a multiple of the patch size: ``patch_size * torch.export.Dim("rows")``.

    Args:
        image_size: the (height, width) that ``pos_embed`` is made for, or an int for squares.
        patch_size: side of a patch.
        in_chans: channels of the images.
        num_classes: outputs of the head; 0 for none, an identity.
        embed_dim: channels C of the tokens, a multiple of ``num_heads``.
        depth: number of blocks.
        num_heads: attention heads of every block.
        mlp_ratio: hidden width of the MLPs, in units of ``embed_dim``.
        qkv_bias: whether the q, k and v projections have a bias.
        drop_rate: dropout of the embedded tokens, the attention outputs and the MLPs, in training.
        attn_drop_rate: dropout of the attention maps, in training.
        drop_path_rate: stochastic depth of the last block; from 0 at the first it grows linearly.
        local_up_to_layer: the number of GPSA blocks, which come first. The class token joins after them.
        locality_strength: alpha of the convolutional initialisation, see :meth:`FusedGPSA.local_init`.
        use_pos_embed: whether to add a learned position embedding to the patch tokens.
        img_size: timm's name of ``image_size``, which it takes the place of.
        backend: of the attention layers, see :func:`gpsa_kernels.gpsa_attention` and :class:`SelfAttention`.
        device: where the parameters are created.
        dtype: of the parameters.

    Attributes:
        num_features: ``embed_dim``.
        grid_size: (rows, columns) that ``pos_embed`` belongs to.

    Raises:
        TypeError, ValueError: sizes that are no integers, out of range, or do not divide.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int,
        depth: int = 12,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        local_up_to_layer: int = 10,
        locality_strength: float = 1.0,
        use_pos_embed: bool = True,
        img_size: int | tuple[int, int] | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("patch_size", patch_size, least=1)
        for name, count in (("depth", depth), ("num_classes", num_classes), ("local_up_to_layer", local_up_to_layer)):
            check_integer(name, count, least=0)
        image_size = image_size if img_size is None else img_size
        image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.grid_size = grid_of(as_pair("image_size", image_size, "(height, width)"), patch_size)
        self.num_features = self.embed_dim = embed_dim
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.patch_size = patch_size
        self.local_up_to_layer = local_up_to_layer
        self.grad_checkpointing = False

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        patches = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, **factory)
        self.patch_embed = nn.Sequential(OrderedDict(proj=patches))
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **factory))
        self.pos_embed: nn.Parameter | None = None
        if use_pos_embed:
            self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.grid_size), embed_dim, **factory))
        self.pos_drop = nn.Dropout(drop_rate)
        shared: dict[str, Any] = {"qkv_bias": qkv_bias, "attn_drop": attn_drop_rate, "proj_drop": drop_rate}
        shared |= {"backend": backend, **factory}
        self.blocks = nn.ModuleList()
        for index in range(depth):
            attn: Attention
            if index < local_up_to_layer:
                attn = FusedGPSA(embed_dim, num_heads, locality_strength=locality_strength, **shared)
            else:
                attn = SelfAttention(embed_dim, num_heads, **shared)
            drop_path = drop_path_rate * index / max(1, depth - 1)
            self.blocks.append(Block(attn, int(embed_dim * mlp_ratio), drop_rate, drop_path, **factory))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6, **factory)
        self.head = nn.Linear(embed_dim, num_classes, **factory) if num_classes > 0 else nn.Identity()
        self._reset_own_parameters()

    def _reset_own_parameters(self) -> None:
        for embedding in (self.cls_token, self.pos_embed):
            if embedding is not None:
                nn.init.trunc_normal_(embedding, std=0.02)
        self.head.apply(init_linear)

    def reset_parameters(self) -> None:
        """Initialises all parameters, as the constructor does; needed after ``to_empty``."""
        for module in reversed([*self.modules()][1:]):  # what is inside before what knows better
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        self._reset_own_parameters()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that an optimizer should not decay."""
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm's optimizers tell from a parameter's name how deep it is, for learning rates that decay by layer."""
        blocks = [(r"blocks\.(\d+)", None), (r"norm", (99999,))]  # 99999: with the last block
        return {"stem": r"cls_token|pos_embed|patch_embed", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training keeps only the blocks' inputs and computes the rest again in the backward pass."""
        self.grad_checkpointing = enable

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, height, width) to normalised tokens (B, 1 + N, C), the class token first.

        Raises TypeError or ValueError where ``x`` is no batch of images, or does not divide into patches.
        """
        return self.norm(self._forward_blocks(x, range(0))[0])

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """What :meth:`forward_features` returns, and what the blocks hand on of the patch tokens; as in timm.

        Args:
            x: images (B, in_chans, height, width).
            indices: of the blocks, negative ones from the end; the last n for an int n, all for None.
            norm: whether to normalise the intermediates, too, by the last layer norm.
            stop_early: whether to leave out the blocks after the last one asked for.
            output_fmt: "NCHW" for intermediates (B, C, rows, columns), "NLC" for (B, N, C), in the blocks' order.
            intermediates_only: whether to return the intermediates alone.

        Raises ValueError for ``indices`` of no blocks and for another ``output_fmt``; see :meth:`forward_features`.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        x, kept, grid_size = self._forward_blocks(x, self._block_indices(indices), stop_early)
        kept = [(self.norm(tokens) if norm else tokens)[:, -grid_size[0] * grid_size[1] :] for tokens in kept]
        if output_fmt == "NCHW":
            kept = [tokens.transpose(1, 2).unflatten(2, grid_size).contiguous() for tokens in kept]
        return kept if intermediates_only else (self.norm(x), kept)

    def _block_indices(self, indices: int | Sequence[int] | None) -> Sequence[int]:
        depth = len(self.blocks)
        if indices is None:
            return range(depth)
        chosen = range(-indices, 0) or (depth,) if isinstance(indices, int) else indices
        if not all(isinstance(index, int) and -depth <= index < depth for index in chosen):
            raise ValueError(f"indices must be some of {depth} blocks', or how many of the last, got {indices!r}")
        return [index % depth for index in chosen]

    def _forward_blocks(
        self, x: Tensor, wanted: Sequence[int], stop_early: bool = False
    ) -> tuple[Tensor, list[Tensor], tuple[int, int]]:
        """The last block's tokens, those of the ``wanted`` blocks, and the grid of the patch tokens."""
        x, grid_size = self._embed(x)
        kept: list[Tensor] = []
        blocks = list(self.blocks)[: max(wanted, default=-1) + 1 if stop_early else None]
        for index, block in enumerate(blocks):
            if index == self.local_up_to_layer:
                x = self._join_class_token(x)
            inputs = (x, grid_size) if index < self.local_up_to_layer else (x,)
            # where nothing is kept, torch's checkpoint reads the random generators, which a CUDA graph cannot capture
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)
            if index in wanted:
                kept.append(x)
        return x if len(blocks) > self.local_up_to_layer else self._join_class_token(x), kept, grid_size

    def _embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (B, N, C) of the patches, with their position embedding, and the grid (rows, columns)."""
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a torch.Tensor, got {type(images).__name__}")
        if images.dim() != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"images must be (batch, {self.in_chans}, height, width), got shape {tuple(images.shape)}")
        grid_of((images.shape[2], images.shape[3]), self.patch_size)
        patches = self.patch_embed(images)
        rows, columns = grid_size = patches.shape[2], patches.shape[3]
        tokens = patches.flatten(2).transpose(1, 2)
        if self.pos_embed is not None:
            pos_embed: Tensor = self.pos_embed
            if not (known(rows == self.grid_size[0]) and known(columns == self.grid_size[1])):
                pos_embed = resample_pos_embed(pos_embed, self.grid_size, grid_size)
            tokens = tokens + pos_embed
        return self.pos_drop(tokens), grid_size

    def _join_class_token(self, x: Tensor) -> Tensor:
        return torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)

    def forward_head(self, x: Tensor) -> Tensor:
        """Tokens (B, 1 + N, C) to the head's (B, num_classes), read off the class token."""
        return self.head(x[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, height, width) to (B, num_classes); see :meth:`forward_features`."""
        return self.forward_head(self.forward_features(x))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        fit_pos_embed(state_dict, prefix + "pos_embed", self.grid_size)
        super()._load_from_state_dict(state_dict, prefix, *args)


# arXiv 2103.10697, table 1: heads of 48 channels, those of the "+" models 64
convit_tiny = partial(ConViT, embed_dim=192, num_heads=4)  # 6 M parameters
convit_small = partial(ConViT, embed_dim=432, num_heads=9)  # 28 M
convit_base = partial(ConViT, embed_dim=768, num_heads=16)  # 86 M
convit_tiny_plus = partial(ConViT, embed_dim=256, num_heads=4)  # 10 M
convit_small_plus = partial(ConViT, embed_dim=576, num_heads=9)  # 48 M
convit_base_plus = partial(ConViT, embed_dim=1024, num_heads=16)  # 152 M
