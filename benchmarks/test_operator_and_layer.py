"""The operator's and the layer's workloads under pytest-benchmark: ``pytest benchmarks/ [--quick]``.

pytest-benchmark times one thing a test, and peers are to be interleaved: so a test is a workload and a direction, what
it times is one round of all peers, and the peers' own medians, or why they have none, are in its ``extra_info``.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import measure, timing
from benchmarks.workloads import OPERATOR_SECTIONS, Workload, attention_workloads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    profile = "quick" if metafunc.config.getoption("quick") else "full"
    chosen = [
        pytest.param(one, way, profile, id=f"{section}-{one}-{one.temperature}-{way}".replace(" ", "-"))
        for section in ("layer", *OPERATOR_SECTIONS)
        for one in attention_workloads(section, DEVICE, profile)
        for way in one.directions
    ]
    metafunc.parametrize(("workload", "direction", "profile"), chosen)


def test_round(benchmark, workload: Workload, direction: str, profile: str) -> None:
    with measure.own_stream(DEVICE):
        run = measure.Run(workload, DEVICE)
        rows, clocks = run.prepared(direction)
        timed = timing.Interleaved(clocks)
        timed.warm_up()
        benchmark.pedantic(timed.round, rounds=timing.EFFORTS[profile].rounds)
        run.release()
    for peer, error in timed.failures.items():
        measure.excuse(rows[peer], error)
    benchmark.extra_info["median_us"] = {peer: timing.summary(s)["median_us"] for peer, s in timed.seconds.items()}
    without = {peer: f"{row['status']}: {row['reason']}" for peer, row in rows.items() if "reason" in row}
    benchmark.extra_info["without a time"] = without
    assert not [peer for peer in without if peer.startswith("gpsa_kernels") and rows[peer]["status"] != "unavailable"]
