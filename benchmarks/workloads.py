"""What is measured: the cases of every section, for a CPU and a GPU, in order of importance; and its floor.

The floor is the least that any implementation has to do, at the rates of a machine. Per batch element and head, N
tokens, head size D: every input is read once and every output written once (4 N D elements forward, 7 N D backward: q,
k, v, dO read, dQ, dK, dV written); the content takes two matrix products forward and five backward, 2 N^2 D flops each;
the separable position takes 2 N (R + C) D flops forward and three times that backward; the content softmax takes N^2
exponentials in either direction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, NamedTuple

Profile = Literal["full", "quick", "dry"]
REFERENCE = "timm"  # the peer that speed-ups are relative to
PROFILES: tuple[Profile, ...] = ("full", "quick", "dry")
DIRECTION_NAMES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
DIRECTIONS = tuple(DIRECTION_NAMES)
OPERATOR_SECTIONS = ("operator", "tokens", "batch", "compiled", "tuned")
GRIDS = ((8, 8), (14, 14), (24, 24), (28, 28), (32, 32), (64, 64))
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TENSORS = ("out", "q", "k", "v", "pos_weight", "gate")  # whose exactness is told


@dataclass(frozen=True)
class Case:
    """Shapes and dtype of one attention."""

    batch: int
    heads: int
    rows: int
    columns: int
    head_dim: int
    dtype: str

    @property
    def tokens(self) -> int:
        return self.rows * self.columns

    @property
    def grid_size(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def __str__(self) -> str:
        return f"B={self.batch} H={self.heads} {self.rows}x{self.columns} D={self.head_dim} {self.dtype}"


@dataclass(frozen=True)
class Workload:
    """One case of the operator or the layer, timed by all peers, interleaved."""

    section: str  # operator, layer, or another of OPERATOR_SECTIONS
    case: Case
    temperature: str  # "cold": sets of inputs rotate that together exceed the L2 cache; or "warm"
    directions: tuple[str, ...]  # of DIRECTIONS
    compiled: bool = False  # whether the peers that need torch.compile take part

    def __str__(self) -> str:
        return str(self.case)


@dataclass(frozen=True)
class ModelWorkload:
    """A ConViT of one size and the DeiT of that size, end to end."""

    size: str
    image: int
    batch: int
    dtype: str  # float32, or bfloat16 for autocast
    direction: str  # inference or training
    compiled: bool

    def __str__(self) -> str:
        return f"convit_{self.size} {self.image}px B={self.batch} {self.dtype}{' compiled' if self.compiled else ''}"


def headline(device: str, profile: Profile) -> Case:
    """The one case that everything else varies: an attention of convit_small at 224 px."""
    if profile == "dry":
        return Case(1, 2, 4, 4, 16, "float32")
    return Case(128, 9, 14, 14, 48, "bfloat16") if device == "cuda" else Case(8, 9, 14, 14, 48, "float32")


def attention_workloads(section: str, device: str, profile: Profile) -> list[Workload]:
    """The workloads of "layer" or of one of OPERATOR_SECTIONS.

    The dry profile has one small workload a section: it rehearses, and measures nothing.
    """
    head = headline(device, profile)
    gpu, full, dry = device == "cuda", profile == "full", profile == "dry"
    temperature = "cold" if gpu else "warm"

    def vary(**changes: Any) -> Case:
        return replace(head, **changes)

    if section == "operator":
        cases = [vary(rows=8, columns=8, heads=12, head_dim=32), vary(head_dim=64), vary(rows=16, columns=28)]
        cases += [vary(dtype=dtype) for dtype in ("float16", "float32", "bfloat16") if dtype != head.dtype]
        chosen = [(head, temperature), *([(head, "warm")] if gpu else [])]
        chosen += [(case, temperature) for case in cases if full]
        return [Workload(section, *one, DIRECTIONS) for one in chosen]
    cases = [head]
    if section == "tokens":
        # at 64 x 64 a round of everybody takes 40 s on a CPU
        grids = ((4, 4), (5, 5)) if dry else GRIDS if gpu and full else GRIDS[:5] if full else GRIDS[:3]
        # about as many tokens in every point, so that time is for the same work per token
        tokens = 0 if dry else 196 * (128 if gpu else 8 if full else 2)
        cases = [vary(rows=rows, columns=columns, batch=max(1, tokens // (rows * columns))) for rows, columns in grids]
    elif section == "batch":
        batches = (BATCHES if gpu else (1, 8, 32)) if full else (1, 2) if dry else (1, 4)
        cases = [vary(batch=batch) for batch in batches]
    elif section == "tuned" and not gpu:
        return []  # torch tunes for GPUs
    # a layer takes minutes to compile for a CPU
    compiled = section in ("compiled", "tuned") or (section == "layer" and gpu)
    quick = section == "compiled" and profile == "quick" and not gpu
    directions = ("forward",) if quick else ("forward", "both")
    return [Workload(section, case, temperature, directions, compiled) for case in cases]


def model_workloads(device: str, profile: Profile) -> list[ModelWorkload]:
    """Models by size, image, direction and compilation, the most telling first."""
    gpu = device == "cuda"
    dtype = "bfloat16" if gpu else "float32"
    if profile == "dry":
        return [ModelWorkload("tiny", 32, 1, dtype, "inference", compiled=False)]
    chosen = []
    sizes = ("small", "tiny", "base") if gpu else ("tiny", "small", "base")
    for compiled, image, size, direction in product((False, True), (224, 384), sizes, ("inference", "training")):
        if not gpu and ((compiled and (size, image) != ("tiny", 224)) or (size, image) == ("base", 384)):
            continue  # minutes each
        batch = (128 if image == 224 else 32) if gpu else {"tiny": 4, "small": 2, "base": 1}[size]
        chosen.append(ModelWorkload(size, image, batch, dtype, direction, compiled))
    return chosen if profile == "full" else chosen[:2]


# ---- floors ---------------------------------------------------------------------------------------------------------

DEPTH = 12  # of every ConViT and DeiT
ELEMENT_SIZE = {"float16": 2, "bfloat16": 2, "float32": 4}


class Work(NamedTuple):
    """What has to be done at least."""

    bytes: int
    flops: int
    exponentials: int = 0


class Rates(NamedTuple):
    """What a machine does, measured: bytes copied, read and written alike, and large matrix products."""

    copy_gb_s: float
    matmul_tflop_s: float


def attention_work(case: Case, direction: str) -> Work:
    """Of the operator, over the whole batch; ``direction`` is forward, backward or both."""
    tensors, products, mixes, softmaxes = {"forward": (4, 2, 1, 1), "backward": (7, 5, 3, 1), "both": (11, 7, 4, 2)}[
        direction
    ]
    tokens, dim = case.tokens, case.head_dim
    pairs = case.batch * case.heads
    return Work(
        bytes=pairs * tensors * tokens * dim * ELEMENT_SIZE[case.dtype],
        flops=pairs * (products * 2 * tokens**2 * dim + mixes * 2 * tokens * (case.rows + case.columns) * dim),
        exponentials=pairs * softmaxes * tokens**2,
    )


def layer_work(case: Case, direction: str) -> Work:
    """Of a whole layer: the attention's matrix products and those of the four C x C projections (C = heads * head_dim).

    Forward reads x and the weights and writes the result; backward reads x, the gradient and the weights and writes
    the gradients of x and the weights. What is in between might stay on the chip.
    """
    dim = case.heads * case.head_dim
    tensors, weights, factor = {"forward": (2, 1, 1), "backward": (3, 2, 2), "both": (5, 3, 3)}[direction]
    attention = attention_work(case, direction)
    elements = case.batch * case.tokens * dim * tensors + 4 * dim * dim * weights
    flops = attention.flops + factor * 8 * case.batch * case.tokens * dim * dim
    return attention._replace(bytes=elements * ELEMENT_SIZE[case.dtype], flops=flops)


def model_work(workload: ModelWorkload, dim: int) -> Work:
    """Matrix products of a vision transformer of this width, patch 16, MLP ratio 4; training is three times
    inference. Bytes are the parameters' alone: how often activations must be moved depends on the fusion."""
    tokens = (workload.image // 16) ** 2
    layer = 24 * tokens * dim**2 + 4 * tokens**2 * dim
    image = DEPTH * layer + 2 * tokens * dim * 768 + 2 * dim * 1000
    steps = 3 if workload.direction == "training" else 1
    parameters = 12 * DEPTH * dim**2 + 768 * dim + 1000 * dim
    return Work(bytes=steps * parameters * 4, flops=steps * workload.batch * image)


def floor(work: Work, rates: Rates | None) -> dict[str, Any]:
    """The microseconds below which no implementation comes, and whether "memory" or "matmul" sets them."""
    if rates is None:
        return {}
    memory, matmul = work.bytes / rates.copy_gb_s / 1e3, work.flops / rates.matmul_tflop_s / 1e6
    bound = "memory" if memory >= matmul else "matmul"
    return {**rates._asdict(), "floor_us": max(memory, matmul), "floor_bound": bound}
