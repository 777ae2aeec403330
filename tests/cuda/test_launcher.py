"""How kernels are launched: csrc/launch.h on a CUDA runtime that writes down what it is asked."""

import subprocess
from collections import Counter
from pathlib import Path

import emulation
import pytest

QUERIES = [f"{what} of {device}" for what in ("multiprocessors", "shared bytes") for device in (0, 1)]
LAUNCHES = ["launch of a with 50000 bytes", "launch of a with 1000 bytes", "launch of b with 0 bytes"]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runtime")
    for header in ("cuda_runtime.h", "cuda_runtime_api.h"):  # all is in launcher.cpp
        (folder / header).touch()
    sources, includes = [Path(__file__).with_name("launcher.cpp")], [folder, emulation.CSRC]
    program = emulation.built(sources, ["-pthread"], includes, [])
    return lambda *failing: subprocess.run([program, *failing], capture_output=True, text=True, check=True).stdout


def test_devices_and_kernels_are_asked_once(launcher):
    calls = Counter(launcher().splitlines())
    assert calls.pop("device") == 7
    assert calls == {
        **dict.fromkeys(QUERIES, 1),
        "attributes of a": 2,  # b has no shared memory
        **{f"dynamic bytes of a on {device}: 232000": 1 for device in (0, 1)},  # all but the static ones, for good
        **{f"carve-out of a on {device}: 100": 1 for device in (0, 1)},
        **dict.fromkeys(LAUNCHES, 2),
        "launch of a with 3000 bytes": 1,
    }


@pytest.mark.parametrize(
    ("failing", "asked"),
    [
        ("device", "cudaGetDevice"),
        ("multiprocessors", "cudaDevAttrMultiProcessorCount"),
        ("shared bytes", "cudaDevAttrMaxSharedMemoryPerBlockOptin"),
        ("attributes", "cudaFuncGetAttributes"),
        ("dynamic bytes", "cudaFuncAttributeMaxDynamicSharedMemorySize"),
        ("carve-out", "cudaFuncAttributePreferredSharedMemoryCarveout"),
        ("launch", "kernel launch"),
    ],
)
def test_a_failure_is_told_as_itself_and_leaves_nothing_behind(launcher, failing, asked):
    lines = launcher(failing).splitlines()
    assert {line for line in lines if line.startswith("error")} == {f"error: {asked}: the driver's reason"}
    assert "an error is left behind" not in lines
    assert lines[-1] == "launch of a with 3000 bytes"  # a failure is not remembered
    assert "dynamic bytes of a on 0: 232000" in lines
