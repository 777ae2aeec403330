"""Interleaved timing: every peer once per round, in an order that changes, so that all see the same machine."""

from __future__ import annotations

import multiprocessing
import random
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch


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


def _serve(pipe: Connection, threads: int, build: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    call = build(*arguments)
    pipe.send("ready")
    while pipe.recv():
        start = time.perf_counter()
        call()
        pipe.send(time.perf_counter() - start)


def in_own_processes(
    peers: dict[str, tuple[Any, ...]], build: Callable[..., Callable[[], Any]], rounds: int, threads: int
) -> dict[str, list[float]]:
    """Seconds per call of every peer, interleaved, each in a process of its own that waits while others work.

    What a call costs on the CPU depends on the pages that the allocator holds, so on who else allocates in the same
    process: a model that is trained or served has its process to itself.

    Args:
        peers: the arguments of ``build`` that make each peer's call, by name.
        build: a module-level function.
        rounds: how many numbers to take of each.
        threads: torch's threads in every process.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name, arguments in peers.items():
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=_serve, args=(theirs, threads, build, arguments), daemon=True))
        processes[-1].start()
    for pipe in pipes.values():
        assert pipe.recv() == "ready"

    def ask(pipe: Connection) -> float:
        pipe.send(True)
        return pipe.recv()

    seconds: dict[str, list[float]] = {name: [] for name in peers}
    order = list(peers)
    shuffle = random.Random(0).shuffle
    for round_ in range(3 + rounds):
        shuffle(order)
        for name in order:
            elapsed = ask(pipes[name])
            if round_ >= 3:
                seconds[name].append(elapsed)
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(False)
        process.join()
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, p20 and p80, in microseconds."""
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return {
        "median_us": round(1e6 * statistics.median(seconds), 2),
        "p20_us": round(1e6 * deciles[1], 2),
        "p80_us": round(1e6 * deciles[7], 2),
    }
