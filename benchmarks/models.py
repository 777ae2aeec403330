"""ConViT end to end: timm's, the same one fused, and the DeiT of its size, each in a process of its own.

What a call costs depends on the pages that the allocator holds, so on who else allocates in the same process. Each
model waits while the others work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peers, timing
from benchmarks.apart import Gone, Worker
from benchmarks.measure import Wrong, excuse, memory, time_all
from benchmarks.results import Row
from benchmarks.workloads import REFERENCE, Case, ModelWorkload, Rates, floor, model_work
from gpsa_kernels import BACKENDS, fuse

DEIT = "DeiT, SDPA"
HEADS = {"tiny": 4, "small": 9, "base": 16}  # of ConViT, 48 channels each
START_SECONDS = 240
CALL_SECONDS = 120


def backends() -> dict[str, str | None]:
    """The backend of every peer; None where nothing is fused."""
    ours = {f"gpsa_kernels {name}": name for name in reversed(BACKENDS) if name != "eager"}
    return {REFERENCE: None, **ours, DEIT: None}


def make(peer: str, workload: ModelWorkload) -> nn.Module:
    """The model of a peer, with the random weights that everyone of its size gets."""
    torch.manual_seed(0)
    kind = f"deit_{workload.size}_patch16_224" if peer == DEIT else f"convit_{workload.size}"
    model = timm.create_model(kind, img_size=workload.image)
    backend = backends()[peer]
    return model if backend is None else fuse(model, backend=backend)


def work(peer: str, workload: ModelWorkload, device: str) -> Iterator[Any]:
    """What a model computes and takes, and then the seconds of one step after the other."""
    training, dtype = workload.direction == "training", getattr(torch, workload.dtype)
    model = make(peer, workload).to(device).train(training)
    called = torch.compile(model, dynamic=False) if workload.compiled else model
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(workload.batch, 3, workload.image, workload.image, generator=generator).to(device)
    labels = torch.randint(1000, (workload.batch,), generator=generator).to(device)

    def step(called: Any = called, low: bool = True) -> Tensor:
        """Inference, or forward and backward of a training step; returns the logits."""
        if training:
            model.zero_grad()
        autocast = torch.autocast(device, dtype, enabled=low and dtype != torch.float32)
        with torch.set_grad_enabled(training), autocast:
            logits = called(images)
        if training:
            F.cross_entropy(logits.float(), labels).backward()
        return logits.detach()

    def proof(called: Any, low: bool = True) -> list[Any]:
        """What to compare: the logits, and in training the gradients of the gates and of the head."""
        told = ("gating_param", "head.bias", "norm.weight")
        logits = step(called, low)
        grads = [p.grad for name, p in model.named_parameters() if p.grad is not None and name.endswith(told)]
        return [t.float().cpu().numpy() for t in (logits, *grads)]

    facts = {"dim": model.embed_dim, "proof": proof(called)}
    if peer == REFERENCE and not workload.compiled:
        facts["truth"] = proof(model, low=False)
    if device == "cuda" or (training and not workload.compiled):
        facts["memory"] = memory(step, device)
    yield facts
    clock = timing.wall_clock(step, device)
    while True:
        yield clock()


def attention(workload: ModelWorkload, device: str) -> tuple[Case, list[Tensor]]:
    """The attention of a model's GPSA layers, and tensors like theirs, in the dtype of autocast."""
    side = workload.image // 16
    case = Case(workload.batch, HEADS[workload.size], side, side, 48, workload.dtype)
    shape = case.batch, case.heads, case.tokens, case.head_dim
    q = torch.empty(shape, device=device, dtype=getattr(torch, case.dtype), requires_grad=True)
    return case, [q] * 5


def workload_rows(
    workload: ModelWorkload, device: str, effort: timing.Effort, rates: Callable[[str], Rates | None]
) -> list[Row]:
    """A row for every peer, whatever became of it; ``rates`` tells, of a dtype, what floors are computed from."""
    operands = attention(workload, device)
    with torch.set_grad_enabled(workload.direction == "training"):
        auto = peers.auto(*operands)
    place = {"section": "models", "workload": str(workload), "direction": workload.direction, "auto": auto}
    rows: dict[str, Row] = {peer: {**place, "peer": peer} for peer in backends()}
    workers: dict[str, Worker] = {}
    clocks: dict[str, timing.Clock] = {}
    reference = _uncompiled_reference(workload, device) if workload.compiled else None
    with ExitStack() as stack:
        for peer, backend in backends().items():
            try:
                if backend is not None:
                    peers.check_backend(backend, *operands)
                workers[peer] = stack.enter_context(Worker(work, peer, workload, device))
            except peers.Unavailable as error:
                excuse(rows[peer], error)
        for peer, worker in workers.items():
            try:
                facts = worker.receive(START_SECONDS)
                if peer == REFERENCE and not workload.compiled:
                    reference = facts
                if peer != DEIT:
                    _prove(rows[peer], facts, reference, getattr(torch, workload.dtype))
            except (Gone, Wrong) as error:
                excuse(rows[peer], error)
                continue
            rows[peer] |= {"timer": "wall clock", **facts.get("memory", {})}
            rows[peer] |= floor(model_work(workload, facts["dim"]), rates(workload.dtype))
            clocks[peer] = partial(worker.ask, CALL_SECONDS)
        time_all(rows, clocks, effort)
    return [*rows.values()]


def _uncompiled_reference(workload: ModelWorkload, device: str) -> dict[str, Any] | None:
    """timm's own model in a process of its own: that its compiled form dies keeps no other peer from being compared."""
    try:
        with Worker(work, REFERENCE, dataclasses.replace(workload, compiled=False), device) as worker:
            return worker.receive(START_SECONDS)
    except Gone:
        return None


def _prove(row: Row, own: dict[str, Any], reference: dict[str, Any] | None, dtype: torch.dtype) -> None:
    """Writes into a row how far a model is from timm's in float32; ``reference`` is timm's own, not compiled.

    Raises:
        Wrong: that is too far.
        Gone: there is nothing to compare it with.
    """
    if reference is None:
        raise Gone("there is nothing to compare it with: timm's own model failed")
    arrays = reference["truth"], reference["proof"], own["proof"]
    truth, theirs, got = ([torch.from_numpy(array) for array in found] for found in arrays)
    allowed, found = peers.allowed(dtype, peers.deviation(theirs, truth)), peers.deviation(got, truth)
    row["deviation"] = found
    if not found <= allowed:
        raise Wrong(f"it is {found:.1e} from timm's in float32, {allowed:.1e} is allowed")
