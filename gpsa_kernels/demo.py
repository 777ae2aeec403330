"""The demo: a small ConViT learns scikit-learn's handwritten digits, once eager and once fused, from one seed.

Everything printed is measured in the run that prints it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpsa_kernels.analysis import gates
from gpsa_kernels.backends import Call
from gpsa_kernels.convit import ConViT
from gpsa_kernels.functional import select_backend
from gpsa_kernels.modules import FusedGPSA

REQUIRED_ACCURACY = 0.97

IMAGE_SIZE, PATCH_SIZE = 16, 2  # the 8 x 8 pixels drawn twice as large: a token for each of them
EMBED_DIM, HEADS, DEPTH, GPSA_LAYERS = 64, 4, 5, 4
BATCH = 64
LEARNING_RATE, GATE_LEARNING_RATE, WEIGHT_DECAY = 2e-3, 2e-2, 0.05
WARP, SHIFT = 0.15, 0.15  # augmentation: shear, stretch and turn by up to 15 %, move by as much of half the width
SHOWN_DIGIT = 0  # the first test digit of this class has its attention maps drawn


@dataclass(frozen=True)
class Digits:
    """The digits, 8 x 8 with values in [0, 1], and which of them are trained on and tested on."""

    images: Tensor
    labels: Tensor
    train: Tensor
    test: Tensor


@dataclass(frozen=True)
class Run:
    """What one training leaves behind.

    Attributes:
        backend: the backend of the GPSA layers.
        accuracy: share of the test digits recognised after the last step.
        losses: of every training step.
        seconds: spent in training steps alone.
        saved: bytes kept for the backward pass of one step, parameters not counted.
        gates: (2, layers, heads), before and after training.
        maps: (2, layers, heads, N, N) attention of one test digit, before and after.
        digit: that digit, an 8 x 8 image.
    """

    backend: str
    accuracy: float
    losses: list[float]
    seconds: float
    saved: int
    gates: Tensor
    maps: Tensor
    digit: Tensor


def load_digits(seed: int) -> Digits:
    """scikit-learn's 1,797 handwritten digits, a fifth of each class held out for the test."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    data = datasets.load_digits()
    train, test = train_test_split(range(len(data.target)), test_size=0.2, stratify=data.target, random_state=seed)
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / data.images.max()
    return Digits(images, torch.tensor(data.target), torch.tensor(train), torch.tensor(test))


def draw(images: Tensor, warps: Tensor | None = None) -> Tensor:
    """Digits (B, 1, 8, 8) drawn at IMAGE_SIZE, seen through the affine maps identity + ``warps`` (B, 2, 3)."""
    maps = torch.eye(2, 3).expand(len(images), 2, 3) + (0 if warps is None else warps)
    grid = F.affine_grid(maps, [len(images), 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False) - 0.5


def epoch(digits: Digits, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of all training digits, shuffled and warped: the same ones for the same state of ``random``."""
    order = digits.train[torch.randperm(len(digits.train), generator=random)]
    limits = torch.tensor([WARP, WARP, SHIFT])
    for index in order[: len(order) // BATCH * BATCH].split(BATCH):
        warps = (2 * torch.rand(BATCH, 2, 3, generator=random) - 1) * limits
        yield draw(digits.images[index], warps), digits.labels[index]


def build_model(backend: str, seed: int) -> ConViT:
    """The ConViT of the demo, with the same initial weights for every backend."""
    torch.manual_seed(seed)
    model = ConViT(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        in_chans=1,
        num_classes=10,
        embed_dim=EMBED_DIM,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=2.0,
        local_up_to_layer=GPSA_LAYERS,
        backend=backend,
    )
    # The paper's standard deviation of 0.02 is made for hundreds of channels; with few it holds learning up for long.
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(("attn.v", "pos_proj")):
            nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
    assert model.pos_embed is not None
    nn.init.trunc_normal_(model.pos_embed, std=0.2)
    return model


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW that decays matrices only; the gates take larger steps, so that a minute of training moves them."""
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "gates": [], "others": []}
    for name, parameter in model.named_parameters():
        is_matrix = name.endswith("weight") and parameter.dim() > 1
        groups["gates" if name.endswith("gating_param") else "matrices" if is_matrix else "others"].append(parameter)
    settings: list[dict[str, Any]] = [
        {"params": groups["matrices"], "weight_decay": WEIGHT_DECAY},
        {"params": groups["gates"], "lr": GATE_LEARNING_RATE},
        {"params": groups["others"]},
    ]
    return torch.optim.AdamW(settings, lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def attention_maps(model: nn.Module, image: Tensor) -> Tensor:
    """The mixed attention maps (layers, H, N, N) of every GPSA layer as one ``image`` passes through."""
    maps: list[Tensor] = []

    def record(layer: Any, inputs: tuple[Any, ...]) -> None:
        maps.append(layer.get_attention(*inputs))

    hooks = [m.register_forward_pre_hook(record) for m in model.modules() if isinstance(m, FusedGPSA)]
    with torch.no_grad():
        model(image)
    for hook in hooks:
        hook.remove()
    return torch.cat(maps).cpu()


def saved_for_backward(model: nn.Module, step: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps between ``step``'s forward and backward pass, parameters not counted."""
    storages = {}

    def keep(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t  # held, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        step()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(t.untyped_storage().nbytes() for address, t in storages.items() if address not in parameters)


def train(backend: str, epochs: int, seed: int) -> Run:
    """Trains the demo's ConViT with GPSA on ``backend``."""
    from tqdm import tqdm

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    digits = load_digits(seed)
    model = build_model(backend, seed).to(device)
    optimizer = build_optimizer(model)
    steps = len(digits.train) // BATCH * epochs
    rates = [group["lr"] for group in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.2)
    shown = digits.images[digits.test][digits.labels[digits.test] == SHOWN_DIGIT][:1]

    def study() -> tuple[Tensor, Tensor]:
        return torch.stack([*gates(model).values()]).cpu(), attention_maps(model, draw(shown).to(device))

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images.to(device)), labels.to(device))

    before = study()
    images, labels = next(epoch(digits, torch.Generator()))
    saved = saved_for_backward(model, lambda: loss_of(images, labels))
    loss_of(images, labels).backward()  # loads what is loaded on first use, before anything is measured

    losses: list[float] = []
    seconds = 0.0
    random = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(epochs), desc=backend, unit="epoch"):
        for images, labels in epoch(digits, random):
            started = time.perf_counter()
            optimizer.zero_grad()
            loss = loss_of(images, labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            seconds += time.perf_counter() - started

    with torch.no_grad():
        guesses = model(draw(digits.images[digits.test]).to(device)).argmax(dim=1).cpu()
    accuracy = (guesses == digits.labels[digits.test]).double().mean().item()
    gate, maps = (torch.stack(pair) for pair in zip(before, study(), strict=True))
    return Run(backend, accuracy, losses, seconds, saved, gate, maps, shown[0, 0])


def auto_backend() -> str:
    """What ``backend="auto"`` comes to when the demo's layers are trained on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = IMAGE_SIZE // PATCH_SIZE
    q = torch.empty(BATCH, HEADS, side * side, EMBED_DIM // HEADS, device=device, requires_grad=True)
    return select_backend(Call(q, q, q, q, q, None, side, side, 1.0, 0.0)).name


def fused_backend() -> str:
    """That backend, or ``sdpa`` where it is ``eager``, which the other run has already."""
    return "sdpa" if (auto := auto_backend()) == "eager" else auto


def failures(runs: list[Run]) -> list[str]:
    """What the runs did not achieve, in sentences."""
    return [
        f"{run.backend}: test accuracy {run.accuracy:.2%} is below the required {REQUIRED_ACCURACY:.0%}"
        for run in runs
        if not run.accuracy >= REQUIRED_ACCURACY
    ]


def summary(eager: Run, fused: Run) -> str:
    """The two runs side by side, and how far apart their losses are."""
    rows = [
        ("", eager.backend, f"{fused.backend} (fused)"),
        ("test accuracy", *(f"{run.accuracy:.2%}" for run in (eager, fused))),
        ("training loss, last step", *(f"{run.losses[-1]:.4f}" for run in (eager, fused))),
        ("time in training steps", *(f"{run.seconds:.1f} s" for run in (eager, fused))),
        ("kept for backward", *(f"{run.saved / 2**20:.1f} MiB" for run in (eager, fused))),
    ]
    apart = [abs(a - b) for a, b in zip(eager.losses, fused.losses, strict=True)]
    table = "".join(f"  {name:<26} {left:>14} {right:>14}\n" for name, left, right in rows)
    return (
        f"{table}\n  Largest difference of the loss curves: {max(apart):.1e} ({max(apart[:20]):.1e} in the first 20 "
        "steps): backends round\n  differently, and training amplifies it."
    )


def verdict(eager: Run, fused: Run) -> str:
    """What a user wants to know, in a line."""
    speed, memory = eager.seconds / fused.seconds, fused.saved / eager.saved
    return (
        f'"auto" is {auto_backend()} here; {fused.backend} trained {speed:.2f} times as fast as eager '
        f"and kept {memory:.0%} of its memory for the backward pass."
    )
