"""The demo: a small ConViT learns scikit-learn's handwritten digits, once eager and once fused, from one seed.

Each training runs in a process of its own, so that neither finds the other's memory or warm caches. Everything printed
is measured in the run that prints it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpsa_kernels.analysis import gates, non_locality
from gpsa_kernels.backends import BACKENDS, Call
from gpsa_kernels.convit import ConViT
from gpsa_kernels.functional import select_backend
from gpsa_kernels.modules import FusedGPSA

REQUIRED_ACCURACY = 0.97

IMAGE_SIZE, PATCH_SIZE = 16, 2  # the 8 x 8 pixels drawn twice as large: a token for each of them
GRID = (IMAGE_SIZE // PATCH_SIZE, IMAGE_SIZE // PATCH_SIZE)
EMBED_DIM, HEADS, DEPTH, GPSA_LAYERS = 64, 4, 5, 4
BATCH = 64
LEARNING_RATE, GATE_LEARNING_RATE = 2e-3, 2e-2
WEIGHT_DECAY = 0.05
WARP, SHIFT = 0.15, 0.15  # augmentation: shear, stretch and turn by up to 15 %, move by as much of half the width
STUDIED_DIGITS = 32  # test digits over which attention distances are averaged
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
        memory: bytes by which training raised the memory in use at its peak: of the process or, on a GPU, of what is
            allocated there. None where the system does not say.
        gates: (epochs + 1, layers, heads), before the first and after each epoch.
        distances: attention distances in patches, likewise.
        maps_before: (layers, heads, N, N) attention of one test digit before training.
        maps_after: the same after training.
        digit: the test digit of the maps, an 8 x 8 image.
        label: what it shows.
        guess: what the trained model takes it for.
    """

    backend: str
    accuracy: float
    losses: list[float]
    seconds: float
    saved: int
    memory: int | None
    gates: list[Any]
    distances: list[Any]
    maps_before: list[Any]
    maps_after: list[Any]
    digit: list[Any]
    label: int
    guess: int


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
    maps = torch.eye(2, 3, device=images.device).expand(len(images), 2, 3) + (0 if warps is None else warps)
    grid = F.affine_grid(maps, [len(images), 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False) - 0.5


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
        group = "gates" if name.endswith("gating_param") else "matrices" if is_matrix else "others"
        groups[group].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups["matrices"], "lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
            {"params": groups["others"], "lr": LEARNING_RATE, "weight_decay": 0.0},
            {"params": groups["gates"], "lr": GATE_LEARNING_RATE, "weight_decay": 0.0},
        ],
        fused=True,
    )


def attention_maps(model: nn.Module, images: Tensor) -> Tensor:
    """The mixed attention maps (layers, B, H, N, N) of every GPSA layer as ``images`` pass through."""
    maps: list[Tensor] = []

    def record(layer: Any, inputs: tuple[Any, ...]) -> None:
        maps.append(layer.get_attention(*inputs))

    hooks = [m.register_forward_pre_hook(record) for m in model.modules() if isinstance(m, FusedGPSA)]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return torch.stack(maps)


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


def memory_now_and_peak(device: torch.device) -> tuple[int, int] | None:
    """Bytes in use and the most so far: allocated on a GPU, else resident in this process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    try:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    except OSError:
        return None
    now, peak = (int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    return now, peak


def epoch(digits: Digits, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of all training digits, shuffled and warped: the same ones for the same state of ``random``."""
    order = digits.train[torch.randperm(len(digits.train), generator=random)]
    limits = torch.tensor([WARP, WARP, SHIFT])
    for index in order[: len(order) // BATCH * BATCH].split(BATCH):
        warps = (2 * torch.rand(BATCH, 2, 3, generator=random) - 1) * limits
        yield draw(digits.images[index], warps), digits.labels[index]


def train(backend: str, epochs: int, seed: int) -> Run:
    """Trains the demo's ConViT with GPSA on ``backend``."""
    from tqdm import tqdm

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    digits = load_digits(seed)
    model = build_model(backend, seed).to(device)
    optimizer = build_optimizer(model)
    steps = len(digits.train) // BATCH * epochs
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=steps, pct_start=0.2
    )
    shown = int(digits.test[digits.labels[digits.test] == SHOWN_DIGIT][0])
    studied = draw(digits.images[[shown, *digits.test[: STUDIED_DIGITS - 1].tolist()]]).to(device)
    gates_over_time: list[Any] = []
    distances_over_time: list[Any] = []

    def study() -> list[Any]:
        maps = attention_maps(model, studied)
        gates_over_time.append([layer.tolist() for layer in gates(model).values()])
        distances_over_time.append([non_locality(layer, GRID).tolist() for layer in maps])
        return maps[:, 0].tolist()

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images.to(device)), labels.to(device))

    maps_before = maps_after = study()
    images, labels = next(epoch(digits, torch.Generator()))
    saved = saved_for_backward(model, lambda: loss_of(images, labels))
    loss_of(images[:1], labels[:1]).backward()  # loads what is loaded on first use, before anything is measured
    model.zero_grad()

    losses: list[float] = []
    seconds = 0.0
    memory = [memory_now_and_peak(device)]
    random = torch.Generator().manual_seed(seed)
    title = f"{backend:<{max(map(len, BACKENDS))}}"
    with tqdm(total=steps, desc=title, unit="step", dynamic_ncols=True, mininterval=0.5) as bar:
        for _ in range(epochs):
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
                bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                bar.update()
            memory.append(memory_now_and_peak(device))
            maps_after = study()

    with torch.no_grad():
        guesses = model(draw(digits.images[digits.test]).to(device)).argmax(dim=1).cpu()
        guess = model(studied[:1]).argmax()
    before, after = memory[:2]  # after the first epoch: later peaks may be the study's
    return Run(
        backend=backend,
        accuracy=(guesses == digits.labels[digits.test]).double().mean().item(),
        losses=losses,
        seconds=seconds,
        saved=saved,
        memory=after[1] - before[0] if before and after else None,
        gates=gates_over_time,
        distances=distances_over_time,
        maps_before=maps_before,
        maps_after=maps_after,
        digit=digits.images[shown, 0].tolist(),
        label=SHOWN_DIGIT,
        guess=int(guess),
    )


def in_own_process(*arguments: Any) -> Run:
    """:func:`train` in a fresh process, so that its peak memory is its own."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as executor:
        return executor.submit(train, *arguments).result()


def auto_backend() -> str:
    """What ``backend="auto"`` comes to when the demo's layers are trained on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q = torch.empty(BATCH, HEADS, GRID[0] * GRID[1], EMBED_DIM // HEADS, device=device, requires_grad=True)
    return select_backend(Call(q, q, q, q, q, None, *GRID, 1.0, 0.0)).name


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

    def mebibytes(count: int | None) -> str:
        return "not known" if count is None else f"{count / 2**20:.1f} MiB"

    rows = [
        ("", eager.backend, f"{fused.backend} (fused)"),
        ("test accuracy", f"{eager.accuracy:.2%}", f"{fused.accuracy:.2%}"),
        ("training loss, last step", f"{eager.losses[-1]:.4f}", f"{fused.losses[-1]:.4f}"),
        ("time in training steps", f"{eager.seconds:.1f} s", f"{fused.seconds:.1f} s"),
        ("peak memory, training [1]", mebibytes(eager.memory), mebibytes(fused.memory)),
        ("saved for backward [2]", mebibytes(eager.saved), mebibytes(fused.saved)),
    ]
    table = [f"  {name:<26} {left:>14} {right:>14}" for name, left, right in rows]
    apart = [abs(a - b) for a, b in zip(eager.losses, fused.losses, strict=True)]
    if torch.cuda.is_available():
        peak = "most memory allocated on the GPU at once, over what model and data take"
    else:
        peak = "growth of the process's resident memory at its peak, over Python, torch, model and data"
    lines = [
        *table,
        "",
        f"  Largest difference of the loss curves: {max(apart):.1e} ({max(apart[:20]):.1e} in the first 20 steps).",
        "  Backends round differently, and training amplifies every difference: what begins at rounding grows.",
        "",
        f"  [1] {peak}",
        f"  [2] what autograd keeps between forward and backward of one step of {BATCH} digits, beside parameters",
    ]
    return "\n".join(lines)


def verdict(eager: Run, fused: Run) -> str:
    """What a user wants to know, in a line."""
    speed, memory = eager.seconds / fused.seconds, fused.saved / eager.saved
    return (
        f'"auto" is {auto_backend()} here; {fused.backend} trained {speed:.2f} times as fast as eager '
        f"and kept {memory:.0%} of its memory for the backward pass."
    )
