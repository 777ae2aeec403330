"""Clocks, and rounds in which every peer is called once, in an order that changes; docs/benchmarks.md says why."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.workloads import Profile, Rates

Call = Callable[[], Any]
Clock = Callable[[], float]  # seconds of one call
SHORT = 0.002  # seconds: a call below is repeated until a sample holds at least REPEATS of them
REPEATS = 16


@dataclass(frozen=True)
class Effort:
    """How many samples to take of a peer, for how many seconds at most, and how many at least."""

    rounds: int
    budget: float
    least: int


EFFORTS: dict[Profile, Effort] = {"full": Effort(40, 10.0, 5), "quick": Effort(10, 2.0, 4), "dry": Effort(2, 0.0, 2)}


def wall_clock(call: Call, device: str, calls: int = 1) -> Clock:
    """The mean of ``calls`` calls, from the first to the end of their work on the device."""

    def clock() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    return clock


class CudaClock:
    """The mean over a replay that makes one call a set of inputs."""

    pool: Any = None  # of all graphs: only one is replayed at a time, and nobody reads what it wrote

    def __init__(self, calls: Sequence[Call]) -> None:
        once = wall_clock(calls[0], "cuda")
        for _ in range(3):  # compiles, autotunes, and allocates what a library keeps
            seconds = once()
        self._calls = list(calls) * (math.ceil(REPEATS / len(calls)) if seconds < SHORT else 1)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        try:
            self._replay, self.timer = self._captured(), "cuda graph"
        except RuntimeError:
            CudaClock.pool = None  # the failed graph may have closed it
            torch.cuda.synchronize()
            self._replay, self.timer = self._all, "cuda events"
        self._replay()
        torch.cuda.synchronize()  # a replay that fails is told here, not by whoever comes next

    def _all(self) -> list[Any]:
        return [call() for call in self._calls]  # alive together, so each result has memory of its own

    def _captured(self) -> Call:
        if CudaClock.pool is None:
            CudaClock.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # backward runs on the stream of its forward, which has to be the one that is captured
        with torch.cuda.graph(graph, pool=CudaClock.pool, stream=torch.cuda.current_stream()):
            self._all()
        return graph.replay

    def __call__(self) -> float:
        self._start.record()
        self._replay()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3 / len(self._calls)


class Interleaved:
    """Samples of several peers, a round at a time; a peer that raises is timed no more.

    Attributes:
        seconds: the samples of every peer that never raised.
        failures: what the others raised, in the order in which they did.
    """

    def __init__(self, clocks: Mapping[str, Clock]) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in clocks}
        self.failures: dict[str, Exception] = {}
        self._clocks = clocks
        self._shuffled = random.Random(0)

    def round(self) -> None:
        """Takes one sample of every peer, in a new order."""
        for name in self._shuffled.sample([*self.seconds], len(self.seconds)):
            try:
                self.seconds[name].append(self._clocks[name]())
            except Exception as error:  # a peer's own failure, of whatever kind, is a result
                self.failures[name] = error
                del self.seconds[name]

    def warm_up(self) -> None:
        """Rounds that do not count."""
        self.round()
        self.round()
        for seconds in self.seconds.values():
            seconds.clear()

    def run(self, effort: Effort) -> None:
        """Warms up, then takes as many samples as ``effort`` says."""
        self.warm_up()
        end = time.perf_counter() + effort.budget
        for done in range(effort.rounds):
            if done >= effort.least and time.perf_counter() > end:
                break
            self.round()


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

    def best(call: Call) -> float:
        clock = wall_clock(call, device, calls=5)  # the wait at the end does not show
        return min(clock() for _ in range(10))

    copy, multiply = best(lambda: target.copy_(source)), best(lambda: torch.matmul(a, b, out=product))
    return Rates(copy_gb_s=2 * 4 * elements / copy / 1e9, matmul_tflop_s=2 * side**3 / multiply / 1e12)


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Rounds, median, p20 and p80, in microseconds."""
    _, p20, *_, p80, _ = (1e6 * decile for decile in statistics.quantiles(seconds, n=10, method="inclusive"))
    return {"rounds": len(seconds), "median_us": 1e6 * statistics.median(seconds), "p20_us": p20, "p80_us": p80}
