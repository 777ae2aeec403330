"""Interleaved timing: every peer once per round, in an order that changes, so that all see the same machine."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any


def interleaved(
    peers: dict[str, Callable[[], Any]], rounds: int, warmup: int = 3, inner: int = 1
) -> dict[str, list[float]]:
    """Seconds per call of every peer, one number a round.

    Args:
        peers: what to time, by name.
        rounds: how many numbers to take of each.
        warmup: rounds that are not counted.
        inner: calls a number is the mean of, for what takes microseconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    order = list(peers)
    shuffle = random.Random(0).shuffle
    for round_ in range(warmup + rounds):
        shuffle(order)
        for name in order:
            call = peers[name]
            start = time.perf_counter()
            for _ in range(inner):
                call()
            elapsed = (time.perf_counter() - start) / inner
            if round_ >= warmup:
                seconds[name].append(elapsed)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, p20 and p80, in microseconds."""
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return {
        "median_us": round(1e6 * statistics.median(seconds), 2),
        "p20_us": round(1e6 * deciles[1], 2),
        "p80_us": round(1e6 * deciles[7], 2),
    }
