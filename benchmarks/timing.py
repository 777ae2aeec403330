"""Clocks, and rounds in which every peer is called once, in an order that changes, so that all see the same machine.

On a CPU a sample is one call by the wall clock. On a GPU it is the replay of a CUDA graph that holds one call for each
set of inputs, between two events: launch overhead, which hides the kernels' own time below some 100 µs, is left out,
and as the sets rotate no call finds its inputs in the cache.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.workloads import Rates

Call = Callable[[], Any]
SHORT = 0.002  # seconds: a call below is repeated until a sample holds at least REPEATS of them
REPEATS = 16


class CpuSample:
    """Seconds of one call, the sets of inputs in turn."""

    timer = "wall clock"

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = itertools.cycle(calls)
        for call in calls:
            call()

    def __call__(self) -> float:
        return inner(next(self._calls), 1)()


class CudaSample:
    """Seconds of one call, the mean over a replay that makes one call a set of inputs."""

    pool: Any = None  # of all graphs: only one is replayed at a time, and nobody reads what it wrote

    def __init__(self, calls: Sequence[Call]) -> None:
        for _ in range(3):  # compiles, autotunes, and allocates what a library keeps
            start = time.perf_counter()
            calls[0]()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        if seconds < SHORT:
            calls = list(calls) * math.ceil(REPEATS / len(calls))
        self._calls = calls
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        try:
            self._replay, self.timer = self._captured(), "cuda graph"
        except RuntimeError:
            CudaSample.pool = None  # the failed graph may have closed it
            torch.cuda.synchronize()
            self._replay, self.timer = self._all, "cuda events"
        self._replay()
        torch.cuda.synchronize()  # a replay that fails is told here, not by whoever comes next

    def _all(self) -> list[Any]:
        return [call() for call in self._calls]  # alive together, so each result has memory of its own

    def _captured(self) -> Call:
        if CudaSample.pool is None:
            CudaSample.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # backward runs on the stream of its forward, which has to be the one that is captured
        with torch.cuda.graph(graph, pool=CudaSample.pool, stream=torch.cuda.current_stream()):
            self._all()
        return graph.replay

    def __call__(self) -> float:
        self._start.record()
        self._replay()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3 / len(self._calls)


Sample = CpuSample | CudaSample


def sample(calls: Sequence[Call], device: str) -> Sample:
    """A clock for calls that do the same on different sets of inputs; they have been called when it returns."""
    return CudaSample(calls) if device == "cuda" else CpuSample(calls)


class Interleaved:
    """Samples of several peers, a round at a time; a peer that raises is timed no more.

    Attributes:
        seconds: the samples of every peer that never raised.
        failures: what the others raised, in the order in which they did.
    """

    def __init__(self, peers: dict[str, Callable[[], float]]) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in peers}
        self.failures: dict[str, Exception] = {}
        self._peers = peers
        self._order = list(peers)
        self._shuffle = random.Random(0).shuffle

    def round(self) -> None:
        """Takes one sample of every peer, in a new order."""
        self._shuffle(self._order)
        for name in tuple(self._order):
            try:
                self.seconds[name].append(self._peers[name]())
            except Exception as error:  # a peer's own failure, of whatever kind, is a result
                self.failures[name] = error
                self._order.remove(name)
                del self.seconds[name]

    def warm_up(self) -> None:
        """Rounds that do not count."""
        self.round()
        self.round()
        for seconds in self.seconds.values():
            seconds.clear()

    def run(self, rounds: int, budget: float, least: int) -> None:
        """Warms up, then ``rounds`` rounds, or as many as ``budget`` seconds allow, not under ``least``."""
        self.warm_up()
        end = time.perf_counter() + budget
        for done in range(rounds):
            if done >= least and time.perf_counter() > end:
                break
            self.round()


def inner(call: Call, calls: int) -> Callable[[], float]:
    """A clock for what takes microseconds: the mean of ``calls`` calls."""

    def mean() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    return mean


def measure_rates(device: str, dtype: str, small: bool = False) -> Rates:
    """The best of ten times five copies of a buffer far larger than any cache, and five large products in ``dtype``.

    ``small`` is for rehearsals: it takes no time and its figures mean nothing.
    """
    elements = 2**16 if small else 2**28 if device == "cuda" else 2**26
    side = 64 if small else 8192 if device == "cuda" else 1024
    source = torch.rand(elements, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, side, side, device=device).to(getattr(torch, dtype)).unbind()
    product = torch.empty_like(a)
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None

    def best(call: Call) -> float:
        seconds = []
        for _ in range(10):
            finish()
            start = time.perf_counter()
            for _ in range(5):  # the wait at the end does not show
                call()
            finish()
            seconds.append((time.perf_counter() - start) / 5)
        return min(seconds)

    copy, multiply = best(lambda: target.copy_(source)), best(lambda: torch.matmul(a, b, out=product))
    return Rates(copy_gb_s=2 * 4 * elements / copy / 1e9, matmul_tflop_s=2 * side**3 / multiply / 1e12)


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Rounds, median, p20 and p80, in microseconds."""
    _, p20, *_, p80, _ = (1e6 * decile for decile in statistics.quantiles(seconds, n=10, method="inclusive"))
    times = {"median_us": 1e6 * statistics.median(seconds), "p20_us": p20, "p80_us": p80}
    return {"rounds": len(seconds), **{name: round(us, 2) for name, us in times.items()}}
