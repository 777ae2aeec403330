"""The operator's and the layer's workloads under pytest-benchmark: ``pytest benchmarks/ [--quick]``.

pytest-benchmark times one thing a test, and peers are to be interleaved: so a test is a workload and a direction, what
it times is one round of all peers, and the peers' own medians are in its ``extra_info``. Peers that are unavailable,
wrong or fail are in there too, with the reason. ``python -m benchmarks`` measures the same, and writes the results.
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
        pytest.param(workload, direction, profile, id=f"{section}-{workload}-{direction}".replace(" ", "-"))
        for section in ("layer", *OPERATOR_SECTIONS)
        for workload in attention_workloads(section, DEVICE, profile)
        for direction in workload.directions
    ]
    metafunc.parametrize(("workload", "direction", "profile"), chosen)


def test_round(benchmark, workload: Workload, direction: str, profile: measure.Profile) -> None:
    with measure.own_stream(DEVICE):
        run = measure.Run(workload, DEVICE, workload.temperatures[0])
        rows, samples = run.prepared(direction)
        timed = timing.Interleaved(samples)
        timed.warm_up()
        benchmark.pedantic(timed.round, rounds=measure.EFFORTS[profile].rounds)
        run.release()
    benchmark.extra_info["median_us"] = {peer: timing.summary(s)["median_us"] for peer, s in timed.seconds.items()}
    without = {r["peer"]: f"{r['status']}: {r['reason']}" for r in rows if "reason" in r}
    benchmark.extra_info["without a time"] = without | {peer: repr(e) for peer, e in timed.failures.items()}
    ours = [row for row in rows if row["peer"].startswith("gpsa_kernels") and row.get("status") in ("wrong", "failed")]
    ours += [peer for peer in timed.failures if peer.startswith("gpsa_kernels")]
    assert not ours, ours
