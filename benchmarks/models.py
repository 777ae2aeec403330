"""ConViT end to end: timm's, the same one fused, and the DeiT of its size, each in a process of its own.

What a call costs depends on the pages that the allocator holds, so on who else allocates in the same process: a model
that is trained or served has its process to itself, and waits while the others work. Times are by the wall clock, from
the call to the end of the work on the device, as a user sees them.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peers, timing
from benchmarks.measure import Effort, memory
from benchmarks.results import Row
from benchmarks.workloads import REFERENCE, Case, ModelWorkload, Rates
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


class Job:
    """A model and what is done with it again and again."""

    def __init__(self, peer: str, workload: ModelWorkload, device: str) -> None:
        self.training = workload.direction == "training"
        self.device, self.dtype = device, getattr(torch, workload.dtype)
        self.model = make(peer, workload).to(device).train(self.training)
        self.called: Any = torch.compile(self.model, dynamic=False) if workload.compiled else self.model
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(workload.batch, 3, workload.image, workload.image, generator=generator)
        self.images = images.to(device)
        self.labels = torch.randint(1000, (workload.batch,), generator=generator).to(device)

    def logits(self, model: Any, low: bool) -> Tensor:
        with torch.autocast(self.device, self.dtype, enabled=low and self.dtype != torch.float32):
            return model(self.images)

    def step(self, model: Any, low: bool = True) -> Tensor:
        """Inference, or forward and backward of a training step; returns the logits."""
        if not self.training:
            with torch.no_grad():
                return self.logits(model, low)
        self.model.zero_grad()
        logits = self.logits(model, low)
        F.cross_entropy(logits.float(), self.labels).backward()
        return logits.detach()

    def __call__(self) -> Tensor:
        return self.step(self.called)

    def proof(self, model: Any, low: bool = True) -> list[Any]:
        """What to compare: the logits, and in training the gradients of the gates and of the head."""
        tensors = [self.step(model, low)]
        if self.training:
            grads = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
            tensors += [g for name, g in grads.items() if name.endswith(("gating_param", "head.bias", "norm.weight"))]
        return [t.float().cpu().numpy() for t in tensors]

    def finish(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def _serve(pipe: Connection, peer: str, workload: ModelWorkload, device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        job = Job(peer, workload, device)
        facts = {"dim": job.model.embed_dim, "proof": job.proof(job.called)}
        if peer == REFERENCE and not workload.compiled:
            facts["truth"] = job.proof(job.model, low=False)
        if device == "cuda" or (job.training and not workload.compiled):
            facts["memory"] = memory(job, device)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}".split("\n")[0][:300])
        return
    pipe.send(facts)
    while pipe.recv():
        start = time.perf_counter()
        job()
        job.finish()
        pipe.send(time.perf_counter() - start)


class _Worker:
    """A peer in its process, waiting."""

    def __init__(self, peer: str, workload: ModelWorkload, device: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, peer, workload, device, torch.get_num_threads())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()  # or nobody notices when the other end dies

    def _receive(self, seconds: float) -> Any:
        if not self._pipe.poll(seconds):
            raise RuntimeError(f"no answer within {seconds} s")
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            answer = f"the process died with exit code {self._process.exitcode}"
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def start(self) -> dict[str, Any]:
        """Waits until the model is built and has run once; raises RuntimeError where it does not."""
        return self._receive(START_SECONDS)

    def __call__(self) -> float:
        self._pipe.send(True)
        return self._receive(CALL_SECONDS)

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


def attention(workload: ModelWorkload, device: str) -> tuple[Case, list[Tensor]]:
    """The attention of a model's GPSA layers, and tensors like theirs, in the dtype of autocast."""
    side = workload.image // 16
    case = Case(workload.batch, HEADS[workload.size], side, side, 48, workload.dtype)
    shape = case.batch, case.heads, case.tokens, case.head_dim
    q = torch.empty(shape, device=device, dtype=getattr(torch, case.dtype), requires_grad=True)
    return case, [q] * 5


def workload_rows(workload: ModelWorkload, device: str, effort: Effort, rates: Rates | None) -> Iterator[Row]:
    """A row for every peer, whatever became of it; ``rates`` are what a floor is to be computed from, if it is one."""
    name = {"section": workload.section, "workload": str(workload), "direction": workload.direction}
    operands = attention(workload, device)
    with torch.set_grad_enabled(workload.direction == "training"):
        name["auto"] = peers.auto(*operands)
    rows: dict[str, Row] = {peer: {**name, "peer": peer} for peer in backends()}
    workers: dict[str, _Worker] = {}
    reference = _uncompiled_reference(workload, device) if workload.compiled else None
    for peer, backend in backends().items():
        try:
            if backend is not None:
                peers.check_backend(backend, *operands)
            workers[peer] = _Worker(peer, workload, device)
        except peers.Unavailable as error:
            rows[peer] |= {"status": "unavailable", "reason": str(error)}
    try:
        facts = {}
        for peer, worker in list(workers.items()):
            try:
                facts[peer] = worker.start()
            except RuntimeError as error:
                rows[peer] |= {"status": "failed", "reason": str(error)}
                workers.pop(peer).stop()
        for peer in [peer for peer in facts if peer != DEIT]:
            rows[peer] |= _proved(facts[peer], reference or facts.get(REFERENCE), getattr(torch, workload.dtype))
            if "reason" in rows[peer]:
                workers.pop(peer).stop()
        timed = timing.Interleaved(workers)
        timed.run(effort.rounds, effort.budget, least=effort.least)
    finally:
        for worker in workers.values():
            worker.stop()
    for peer, error in timed.failures.items():
        rows[peer] |= {"status": "failed", "reason": str(error)}
    for peer in timed.seconds:
        times = timing.summary(timed.seconds[peer])
        rows[peer] |= {"status": "ok", "timer": "wall clock", **times, **facts[peer].get("memory", {})}
        rows[peer] |= {"dim": facts[peer]["dim"], **(rates._asdict() if rates else {})}
    yield from rows.values()


def _uncompiled_reference(workload: ModelWorkload, device: str) -> dict[str, Any] | None:
    """timm's own model in a process of its own: that its compiled form dies keeps no other peer from being compared."""
    worker = _Worker(REFERENCE, dataclasses.replace(workload, compiled=False), device)
    try:
        return worker.start()
    except RuntimeError:
        return None
    finally:
        worker.stop()


def _proved(own: dict[str, Any], reference: dict[str, Any] | None, dtype: torch.dtype) -> Row:
    """How far a model is from timm's in float32 and how far it may be; with a reason where that is too far.

    ``reference``: timm's own model, not compiled.
    """
    if reference is None:
        return {"status": "failed", "reason": "there is nothing to compare it with: timm's own model failed"}
    arrays = reference["truth"], reference["proof"], own["proof"]
    truth, theirs, got = ([torch.from_numpy(array) for array in found] for found in arrays)
    allowed, found = peers.allowed(dtype, peers.deviation(theirs, truth)), peers.deviation(got, truth)
    if found <= allowed:
        return {"deviation": found}
    reason = f"it is {found:.1e} from timm's in float32, {allowed:.1e} is allowed"
    return {"deviation": found, "status": "wrong", "reason": reason}
