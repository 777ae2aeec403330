"""Rows of the operator and of the layer: every peer proves itself, then all are timed, interleaved; and accuracy's."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers, timing
from benchmarks.apart import Gone, Worker, said
from benchmarks.peers import LAYER, OPERATOR, Function, Peer, Subject, Unavailable
from benchmarks.results import Row
from benchmarks.workloads import Case, Profile, Rates, Workload, attention_work, floor, layer_work
from gpsa_kernels import BACKENDS

PROBE_SECONDS = 240
LOST = "CUDA was lost"  # how the reason of a peer begins that took its process's CUDA context with it


class Wrong(Exception):
    """A peer computes something else."""


class ContextLost(Exception):
    """Nothing on the GPU works in this process any more (after an illegal access, say); with the row of who did it."""


def excuse(row: Row, error: Exception) -> None:
    """Writes into a peer's row why it has no time.

    Raises:
        ContextLost: with the row, where no later peer can run in this process.
    """
    status = {Wrong: "wrong", Unavailable: "unavailable"}.get(type(error), "failed")
    row |= {"status": status, "reason": said(error) if status == "failed" and type(error) is not Gone else str(error)}
    if status == "failed" and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            place = " ".join((LOST, "in", row["workload"], row.get("direction", ""))).rstrip()
            row["reason"] = f"{place}: {row['reason']}"
            raise ContextLost(row) from error


def time_all(rows: Mapping[str, Row], clocks: Mapping[str, timing.Clock], effort: timing.Effort) -> None:
    """Times peers, interleaved, and writes into their rows what came of it."""
    timed = timing.Interleaved(clocks)
    timed.run(effort)
    for peer, error in timed.failures.items():
        excuse(rows[peer], error)
    for peer, seconds in timed.seconds.items():
        rows[peer].update({"status": "ok", **timing.summary(seconds)})


def own_stream(device: str) -> contextlib.AbstractContextManager[Any]:
    """A stream that CUDA graphs can be captured on; nothing on a CPU."""
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()


# ---- one call -------------------------------------------------------------------------------------------------------


def gradients(function: Function, tensors: Sequence[Tensor], grad_out: Tensor) -> list[Tensor]:
    """The result and the gradients of the tensors that it depends on."""
    out = function(*tensors)
    return [out.detach(), *_grads(out, tensors, grad_out)]


def _grads(out: Tensor, tensors: Sequence[Tensor], grad_out: Tensor, retain_graph: bool = False) -> list[Tensor]:
    found = torch.autograd.grad(out, tensors, grad_out, allow_unused=True, retain_graph=retain_graph)
    return [t for t in found if t is not None]


def timed_call(function: Function, tensors: Sequence[Tensor], grad_out: Tensor, direction: str) -> timing.Call:
    """What is timed in a direction, on one set of inputs; it returns a list of tensors."""
    if direction == "forward":
        detached = [t.detach() for t in tensors]
        return torch.no_grad()(lambda: [function(*detached)])
    if direction == "both":
        return lambda: gradients(function, tensors, grad_out)
    out = function(*tensors)
    return lambda: _grads(out, tensors, grad_out, retain_graph=True)


def memory(call: Callable[[], Any], device: str) -> Row:
    """On a GPU the most memory a call takes beyond its inputs; on a CPU the bytes that its graph keeps for backward,
    inputs included, if it makes one."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return {"memory_mb": (torch.cuda.max_memory_allocated() - before) / 1e6}
    storages: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t  # held, or an address could be counted once for two tensors
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    kept = sum(t.untyped_storage().nbytes() for t in storages.values())
    return {"memory_mb": kept / 1e6} if kept else {}


# ---- rows -----------------------------------------------------------------------------------------------------------


def subject(section: str) -> Subject:
    """What a section measures."""
    return LAYER if section == "layer" else OPERATOR


def probe(section: str, name: str, case: Case, direction: str) -> Iterator[None]:
    """Calls a peer on the CPU, in a process that this may cost: whether it raises there, its own process will find out.

    Compiled code is machine code made a moment ago: torch 2.11 compiles the backward pass of timm's layer for a CPU to
    something that corrupts memory.
    """
    what = subject(section)
    (peer,) = (peer for peer in what.peers if peer.name == name)
    with contextlib.suppress(Exception):
        tensors = what.inputs(case, "cpu", 0)
        timed_call(peer.prepare(case, tensors), tensors, torch.randn_like(tensors[0]), direction)()
    yield


def input_sets(workload: Workload, device: str) -> list[tuple[list[Tensor], Tensor]]:
    """Sets of inputs and output gradient: one to repeat, or as many as exceed twice the L2 cache.

    The parameters are the same in all sets: only activations rotate.
    """
    what = subject(workload.section)
    first = what.inputs(workload.case, device, 0)
    count = 1
    if workload.temperature == "cold":
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        count = max(2, math.ceil(2 * cache / sum(t.nbytes for t in first[: what.activations])))
    sets = [first]
    for seed in range(1, count):
        sets.append([*what.inputs(workload.case, device, seed)[: what.activations], *first[what.activations :]])
    return [(tensors, torch.randn_like(tensors[0])) for tensors in sets]


class Run:
    """A workload's peers on the same inputs, made when the first direction is asked for.

    ``lost``: peers that are left out, and why.
    """

    def __init__(self, workload: Workload, device: str, lost: Mapping[str, str] = {}) -> None:
        self.workload, self.device, self.lost = workload, device, lost
        self.case, self.subject = workload.case, subject(workload.section)
        fitting = (peer for peer in self.subject.peers if workload.compiled or not peer.compiled)
        self.peers = [peer for peer in fitting if workload.section == "tuned" or not peer.tuned]
        self.functions: dict[str, Function] = {}
        self.sets: list[tuple[list[Tensor], Tensor]] = []

    def _begin(self) -> None:
        torch._dynamo.reset()  # or the shapes of earlier workloads count towards its limit of recompilations
        self.sets = input_sets(self.workload, self.device)
        tensors, grad_out = self.sets[0]
        dtype = getattr(torch, self.case.dtype)
        self.truth = self.subject.formula(tensors, grad_out, self.case, torch.float64)
        eager = peers.deviation(self.subject.formula(tensors, grad_out, self.case, dtype), self.truth)
        self.allowed = peers.allowed(dtype, eager)

    def release(self) -> None:
        """Gives the tensors back."""
        self.functions.clear()
        self.sets.clear()
        self.truth = []
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def prepared(self, direction: str) -> tuple[dict[str, Row], dict[str, timing.Clock]]:
        """A row for every peer, with the reason where it cannot be timed, and clocks for those that can."""
        if not self.sets:
            self._begin()
        timing.CudaClock.pool = None  # the graphs of the last direction are gone, and with them their pool
        with torch.set_grad_enabled(direction != "forward"):
            auto = peers.auto(self.case, self.subject.attention(self.case, self.sets[0][0]))
        place = {"section": self.workload.section, "workload": str(self.workload), "direction": direction}
        place |= {"temperature": self.workload.temperature, "auto": auto}
        rows: dict[str, Row] = {peer.name: {**place, "peer": peer.name} for peer in self.peers}
        clocks: dict[str, timing.Clock] = {}
        for peer in self.peers:
            try:
                clocks[peer.name] = self._clock(peer, direction, rows[peer.name])
            except Exception as error:  # a peer's own failure, of whatever kind, is a result
                excuse(rows[peer.name], error)
        return rows, clocks

    def rows(self, direction: str, effort: timing.Effort, rates: Callable[[str], Rates | None]) -> list[Row]:
        """All peers in one direction, interleaved; ``rates`` tells, of a dtype, what their floor is computed from."""
        rows, clocks = self.prepared(direction)
        work = layer_work if self.workload.section == "layer" else attention_work
        bound = floor(work(self.case, direction), rates(self.case.dtype))
        for row in rows.values():
            row |= bound
        time_all(rows, clocks, effort)
        return [*rows.values()]

    def _clock(self, peer: Peer, direction: str, row: Row) -> timing.Clock:
        if peer.name in self.lost:
            raise Gone(self.lost[peer.name])
        if direction not in peer.directions:
            raise Unavailable(f"there is no {direction} pass of it")
        if peer.name not in self.functions:
            self.functions[peer.name] = peer.prepare(self.case, self.sets[0][0])
        if peer.compiled and self.device == "cpu":
            with Worker(probe, self.workload.section, peer.name, self.case, direction) as worker:
                worker.receive(PROBE_SECONDS)
        function, first = self.functions[peer.name], self.sets[0]
        got = timed_call(function, *first, "forward" if direction == "forward" else "both")()
        if peer.gpsa:
            row["deviation"] = found = peers.deviation(got, self.truth)
            if not found <= self.allowed:
                raise Wrong(f"it is {found:.1e} from the formula, {self.allowed:.1e} is allowed")
        calls = [timed_call(function, *one, direction) for one in self.sets]
        if direction != "backward":
            row |= memory(calls[0], self.device)
        if self.device == "cpu":
            row["timer"] = "wall clock"
            return timing.wall_clock(calls[0], "cpu")
        clock = timing.CudaClock(calls)
        row["timer"] = clock.timer
        return clock


# ---- accuracy -------------------------------------------------------------------------------------------------------


def accuracy_cases(device: str, profile: Profile) -> list[Case]:
    """Whole images at every head_dim, a rectangle, and a grid that takes more than one tile; in every dtype."""
    shapes = [(14, 14, 48), (8, 8, 32), (14, 14, 64), (16, 28, 48)] + [(32, 32, 48)] * (device == "cuda")
    if profile != "full":
        shapes = [(14, 14, 48)] if profile == "quick" else [(4, 4, 16)]
    batch, heads = (32, 9) if device == "cuda" else (2, 9) if profile != "dry" else (1, 2)
    return [Case(batch, heads, *shape, dtype) for shape in shapes for dtype in ("float32", "float16", "bfloat16")]


def autocast(tensors: Sequence[Tensor], grad_out: Tensor, case: Case) -> list[Tensor]:
    """The formula as it runs in a model under autocast: parameters in float32, products in the case's dtype."""
    leaves = [t.detach().float().requires_grad_() for t in tensors]
    with torch.autocast(tensors[0].device.type, getattr(torch, case.dtype)):
        out = peers.literal(case, *leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]


def accuracy_rows(case: Case, device: str, lost: Mapping[str, str]) -> Iterator[Row]:
    """How exact the formula is in eager PyTorch in the case's dtype and under autocast, and then every backend.

    All start from the same numbers of that dtype; the truth is the formula in float64 on them. ``lost`` are peers that
    are left out, and why.
    """
    tensors = peers.inputs(case, device, 0)
    grad_out = torch.randn_like(tensors[0])
    truth = peers.formula(tensors, grad_out, case, torch.float64)
    ways = {"formula": lambda: peers.formula(tensors, grad_out, case, getattr(torch, case.dtype))}
    if case.dtype != "float32":  # there it would be the formula
        ways["formula, autocast"] = lambda: autocast(tensors, grad_out, case)
    for ours in map(peers.ours, BACKENDS):
        ways[ours.name] = lambda ours=ours: gradients(ours.prepare(case, tensors), tensors, grad_out)
    for peer, way in ways.items():
        row: Row = {"section": "accuracy", "workload": str(case), "peer": peer}
        try:
            if peer in lost:
                raise Gone(lost[peer])
            got = way()
        except Exception as error:  # a backend's failure, of whatever kind, is a result
            excuse(row, error)
        else:
            errors = [(a.double() - b).nan_to_num(nan=peers.HOPELESS) for a, b in zip(got, truth, strict=True)]
            row |= {"status": "ok", "max_error": [error.abs().max().item() for error in errors]}
            row["rms_error"] = [error.square().mean().sqrt().item() for error in errors]
        yield row
