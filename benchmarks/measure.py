"""Rows of the operator and of the layer: every peer proves itself, then all are timed, interleaved."""

from __future__ import annotations

import contextlib
import gc
import math
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import check, floors, timing
from benchmarks.peers import LAYER, OPERATOR, Function, Peer, Subject, Unavailable
from benchmarks.results import Row
from benchmarks.workloads import Case, Profile, Workload

PROBE_SECONDS = 240
LOST = "CUDA was lost"  # how the reason of a peer begins that took its process's CUDA context with it


class Wrong(Exception):
    """A peer computes something else."""


class ContextLost(Exception):
    """A peer raised (after an illegal access, say) and nothing on the GPU works in this process any more.

    ``row`` is the peer's.
    """

    def __init__(self, row: Row) -> None:
        super().__init__(row["reason"])
        self.row = row


def failed(row: Row, error: Exception) -> Row:
    """The row of a peer that raised.

    Raises:
        ContextLost: with the row, where no later peer can run in this process.
    """
    reason = f"{type(error).__name__}: {error}".strip().split("\n")[0][:300]
    row |= {"status": "failed", "reason": reason}
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            row["reason"] = " ".join((LOST, "in", row["workload"], row.get("direction", ""))).rstrip() + f": {reason}"
            raise ContextLost(row) from error
    return row


@dataclass(frozen=True)
class Effort:
    """How many samples to take of a peer, and for how many seconds at most."""

    rounds: int
    budget: float
    least: int


EFFORTS: dict[Profile, Effort] = {"full": Effort(40, 15.0, 5), "quick": Effort(10, 2.0, 4), "dry": Effort(2, 0.0, 2)}


@contextlib.contextmanager
def own_stream(device: str) -> Iterator[None]:
    """A stream that CUDA graphs can be captured on; nothing on a CPU."""
    if device != "cuda":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream()):
        yield


# ---- one call -------------------------------------------------------------------------------------------------------


def gradients(function: Function, tensors: Sequence[Tensor], grad_out: Tensor) -> list[Tensor]:
    """The result and the gradients of the tensors that it depends on."""
    out = function(*tensors)
    return [out.detach(), *_grads(out, tensors, grad_out)]


def _grads(out: Tensor, tensors: Sequence[Tensor], grad_out: Tensor, retain_graph: bool = False) -> list[Tensor]:
    found = torch.autograd.grad(out, tensors, grad_out, allow_unused=True, retain_graph=retain_graph)
    return [t for t in found if t is not None]


def timed_call(function: Function, tensors: Sequence[Tensor], grad_out: Tensor, direction: str) -> timing.Call:
    """What is timed in a direction, on one set of inputs."""
    if direction == "forward":
        detached = [t.detach() for t in tensors]
        return torch.no_grad()(lambda: function(*detached))
    if direction == "both":
        return lambda: gradients(function, tensors, grad_out)
    out = function(*tensors)
    return lambda: _grads(out, tensors, grad_out, retain_graph=True)


def proved(
    peer: Peer, function: Function, tensors: Sequence[Tensor], grad_out: Tensor, truth: list[Tensor], direction: str
) -> float | None:
    """How far the peer is from the truth in what it is timed in; None where it computes no GPSA."""
    if direction == "forward":
        got = [timed_call(function, tensors, grad_out, "forward")()]
    else:
        got = gradients(function, tensors, grad_out)
    return check.deviation(got, truth) if peer.gpsa else None


def memory(call: Callable[[], Any], device: str) -> Row:
    """On a GPU the most memory a call takes beyond its inputs; on a CPU the bytes that its graph keeps for backward,
    inputs included, if it makes one."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return {"memory_bytes": torch.cuda.max_memory_allocated() - before}
    storages: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t  # held, or an address could be counted once for two tensors
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    kept = sum(t.untyped_storage().nbytes() for t in storages.values())
    return {"memory_bytes": kept} if kept else {}


# ---- a peer that might take the process with it --------------------------------------------------------------------


def _probe(section: str, name: str, case: Case, device: str, direction: str, threads: int) -> None:
    torch.set_num_threads(threads)
    what = subject(section)
    peer = next(peer for peer in what.peers if peer.name == name)
    # an exception is none of our business here: the peer will raise it again
    with own_stream(device), contextlib.suppress(Exception):
        tensors = what.inputs(case, device, 0)
        function = peer.prepare(case, tensors)
        timed_call(function, tensors, torch.randn_like(tensors[0]), direction)()
        if device == "cuda":
            torch.cuda.synchronize()


def probe(section: str, name: str, case: Case, device: str, direction: str) -> str | None:
    """Calls a peer compiled for the CPU in a process of its own; why that process died, or None.

    Compiled code is machine code made a moment ago: torch 2.11 compiles the backward pass of timm's layer for a CPU to
    something that corrupts memory.
    """
    context = multiprocessing.get_context("spawn")
    arguments = (section, name, case, device, direction, torch.get_num_threads())
    process = context.Process(target=_probe, args=arguments, daemon=False)
    process.start()
    process.join(PROBE_SECONDS)
    if process.is_alive():
        process.kill()
        return f"it took more than {PROBE_SECONDS} s to compile"
    if process.exitcode is not None and process.exitcode < 0:
        return f"the process died of signal {-process.exitcode}"
    return None


# ---- rows -----------------------------------------------------------------------------------------------------------


def subject(section: str) -> Subject:
    """What a section measures."""
    return LAYER if section == "layer" else OPERATOR


def input_sets(workload: Workload, device: str, temperature: str) -> list[tuple[list[Tensor], Tensor]]:
    """Sets of inputs and output gradient: one to repeat, or as many as exceed twice the L2 cache.

    The parameters are the same in all sets: only activations rotate.
    """
    what = subject(workload.section)
    first = what.inputs(workload.case, device, 0)
    count = 1
    if temperature == "cold":
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        count = max(2, math.ceil(2 * cache / sum(t.numel() * t.element_size() for t in first[: what.activations])))
    sets = [first]
    for seed in range(1, count):
        sets.append([*what.inputs(workload.case, device, seed)[: what.activations], *first[what.activations :]])
    return [(tensors, torch.randn_like(tensors[0])) for tensors in sets]


class Run:
    """A workload's peers on the same inputs at one temperature, made when the first direction is asked for.

    ``lost``: peers that are left out, and why.
    """

    def __init__(
        self, workload: Workload, device: str, temperature: str, lost: Mapping[str, str] | None = None
    ) -> None:
        self.workload, self.device, self.temperature, self.lost = workload, device, temperature, lost or {}
        self.case, self.subject = workload.case, subject(workload.section)
        self.peers = [peer for peer in self.subject.peers if workload.compiled or not peer.compiled]
        self.functions: dict[str, Function] = {}
        self.sets: list[tuple[list[Tensor], Tensor]] = []

    def _begin(self) -> None:
        torch._dynamo.reset()  # or the shapes of earlier workloads count towards its limit of recompilations
        self.sets = input_sets(self.workload, self.device, self.temperature)
        tensors, grad_out = self.sets[0]
        dtype = getattr(torch, self.case.dtype)
        self.truth = self.subject.formula(tensors, grad_out, self.case, torch.float64)
        eager = check.deviation(self.subject.formula(tensors, grad_out, self.case, dtype), self.truth)
        self.allowed = check.allowed(dtype, eager)

    def release(self) -> None:
        """Gives the tensors back."""
        self.functions.clear()
        self.sets.clear()
        self.truth = []
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def prepared(self, direction: str) -> tuple[list[Row], dict[str, timing.Sample]]:
        """A row for every peer, with the reason where it cannot be timed, and clocks for those that can."""
        if not self.sets:
            self._begin()
        timing.CudaSample.pool = None  # the graphs of the last direction are gone, and with them their pool
        rows = [self._header(peer, direction) for peer in self.peers]
        samples: dict[str, timing.Sample] = {}
        for peer, row in zip(self.peers, rows, strict=True):
            if peer.name in self.lost:
                row |= {"status": "failed", "reason": self.lost[peer.name]}
                continue
            try:
                samples[peer.name] = self._sample(peer, direction, row)
            except Wrong as error:
                row |= {"status": "wrong", "reason": str(error)}
            except Unavailable as error:
                row |= {"status": "unavailable", "reason": str(error)}
            except Exception as error:  # a peer's own failure, of whatever kind, is a result
                failed(row, error)
        return rows, samples

    def rows(self, direction: str, effort: Effort, rates: floors.Rates | None) -> list[Row]:
        """All peers in one direction, interleaved; ``rates`` are what a floor is to be computed from, if it is one."""
        rows, samples = self.prepared(direction)
        timed = timing.Interleaved(samples)
        timed.run(effort.rounds, effort.budget, least=effort.least)
        header = {row["peer"]: row for row in rows}
        for name, error in timed.failures.items():
            failed(header[name], error)
        for row in rows:
            name = row["peer"]
            if name in timed.seconds:
                row |= {"status": "ok", "timer": samples[name].timer, **timing.summary(timed.seconds[name])}
                row |= rates._asdict() if rates else {}
        return rows

    def _header(self, peer: Peer, direction: str) -> Row:
        return {
            "section": self.workload.section,
            "workload": str(self.workload),
            "direction": direction,
            "temperature": self.temperature,
            "peer": peer.name,
        }

    def _sample(self, peer: Peer, direction: str, row: Row) -> timing.Sample:
        if direction not in peer.directions:
            raise Unavailable(f"there is no {direction} pass of it")
        if peer.name not in self.functions:
            self.functions[peer.name] = peer.prepare(self.case, self.sets[0][0])
        if peer.compiled and self.device == "cpu":
            death = probe(self.workload.section, peer.name, self.case, self.device, direction)
            if death is not None:
                raise RuntimeError(death)
        function = self.functions[peer.name]
        found = proved(peer, function, *self.sets[0], self.truth, direction)
        if found is not None:
            row["deviation"] = found
            if not found <= self.allowed:
                raise Wrong(f"it is {found:.1e} from the formula, {self.allowed:.1e} is allowed")
        calls = [timed_call(function, *one, direction) for one in self.sets]
        if direction != "backward":
            row |= memory(timed_call(function, *self.sets[0], direction), self.device)
        return timing.sample(calls, self.device)
