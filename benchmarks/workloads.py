"""What is measured: the cases of every section, for a CPU and a GPU, in order of importance."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Profile = Literal["full", "quick", "dry"]
REFERENCE = "timm"  # the peer that speed-ups are relative to
PROFILES: tuple[Profile, ...] = ("full", "quick", "dry")
DIRECTION_NAMES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
DIRECTIONS = tuple(DIRECTION_NAMES)
GRIDS = ((8, 8), (14, 14), (24, 24), (28, 28), (32, 32), (64, 64))
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def _parts(pattern: str, name: str) -> tuple[str, ...]:
    found = re.fullmatch(pattern, name)
    if found is None:
        raise ValueError(f"no workload is called {name!r}")
    return found.groups()


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

    @classmethod
    def parse(cls, name: str) -> Case:
        """The case that is called so; raises ValueError where none is."""
        *numbers, dtype = _parts(r"B=(\d+) H=(\d+) (\d+)x(\d+) D=(\d+) (\w+)", name)
        return cls(*map(int, numbers), dtype)

    def __str__(self) -> str:
        return f"B={self.batch} H={self.heads} {self.rows}x{self.columns} D={self.head_dim} {self.dtype}"


@dataclass(frozen=True)
class Workload:
    """One case of the operator or the layer, timed in ``directions`` by all peers, interleaved.

    Attributes:
        section: operator, layer, tokens, batch or compiled.
        case: the shapes.
        directions: of DIRECTIONS.
        temperatures: "cold" rotates input sets that together exceed the L2 cache (a GPU only), "warm" repeats one set.
        compiled: whether the peers that need torch.compile take part.
    """

    section: str
    case: Case
    directions: tuple[str, ...]
    temperatures: tuple[str, ...]
    compiled: bool = False

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
    section: str = "models"

    @classmethod
    def parse(cls, name: str, direction: str) -> ModelWorkload:
        """The workload that is called so; raises ValueError where none is."""
        size, image, batch, dtype, compiled = _parts(r"convit_(\w+) (\d+)px B=(\d+) (\w+?)( compiled|)", name)
        return cls(size, int(image), int(batch), dtype, direction, bool(compiled))

    def __str__(self) -> str:
        return f"convit_{self.size} {self.image}px B={self.batch} {self.dtype}{' compiled' if self.compiled else ''}"


def headline(device: str, profile: Profile) -> Case:
    """The one case that everything else varies: an attention of convit_small at 224 px."""
    if profile == "dry":
        return Case(1, 2, 4, 4, 16, "float32")
    return Case(128, 9, 14, 14, 48, "bfloat16") if device == "cuda" else Case(8, 9, 14, 14, 48, "float32")


def attention_workloads(section: str, device: str, profile: Profile) -> list[Workload]:
    """The workloads of "operator", "layer", "tokens", "batch" or "compiled".

    The dry profile has one small workload a section: it rehearses, and measures nothing.
    """
    head = headline(device, profile)
    gpu, full = device == "cuda", profile == "full"
    cold = ("cold",) if gpu else ("warm",)
    both = ("cold", "warm") if gpu else ("warm",)
    pair = ("forward", "both")

    def vary(**changes: object) -> Case:
        return Case(**{**vars(head), **changes})

    if section == "layer":
        return [Workload(section, head, pair, cold, compiled=gpu)]  # on a CPU they take minutes to compile
    if section == "compiled":
        return [Workload(section, head, ("forward",) if profile == "quick" and not gpu else pair, cold, compiled=True)]
    if section == "operator":
        chosen = [Workload(section, head, DIRECTIONS, both)]
        if full:
            others = [vary(rows=8, columns=8, heads=12, head_dim=32), vary(head_dim=64), vary(rows=16, columns=28)]
            others += [vary(dtype=dtype) for dtype in ("float16", "float32", "bfloat16") if dtype != head.dtype]
            chosen += [Workload(section, case, DIRECTIONS, cold) for case in others]
        return chosen
    if section == "tokens":
        grids = {"full": GRIDS, "quick": GRIDS[:3], "dry": ((4, 4), (5, 5))}[profile]
        tokens = (
            128 if gpu else 8 if full else 2
        ) * 196  # about as many in every point, so that time is for the same work per token

        def batch(rows: int, columns: int) -> int:
            return 1 if profile == "dry" else max(1, tokens // (rows * columns))

        cases = [vary(rows=r, columns=c, batch=batch(r, c)) for r, c in grids]
        return [Workload(section, case, pair, cold) for case in cases]
    if section == "batch":
        batches = {"full": BATCHES if gpu else BATCHES[:6], "quick": (1, 4), "dry": (1, 2)}[profile]
        return [Workload(section, vary(batch=batch), pair, cold) for batch in batches]
    raise ValueError(f"no section is called {section!r}")


def model_workloads(device: str, profile: Profile) -> list[ModelWorkload]:
    """Models by size, image, direction and compilation, the most telling first."""
    gpu = device == "cuda"
    dtype = "bfloat16" if gpu else "float32"
    if profile == "dry":
        return [ModelWorkload("tiny", 32, 1, dtype, "inference", compiled=False)]
    chosen = []
    for compiled in (False, True):
        for image in (224, 384):
            for size in ("small", "tiny", "base") if gpu else ("tiny", "small", "base"):
                if compiled and not gpu and (size == "base" or image == 384):
                    continue  # minutes of compilation each, on a CPU
                batch = (128 if image == 224 else 32) if gpu else {"tiny": 4, "small": 2, "base": 1}[size]
                for direction in ("inference", "training"):
                    chosen.append(ModelWorkload(size, image, batch, dtype, direction, compiled))
    return chosen if profile == "full" else chosen[:2]
