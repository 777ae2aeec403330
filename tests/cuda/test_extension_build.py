"""setup.py: what it finds, what it says, and what it builds where something is missing."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
GOOD = {
    "ninja": "",
    "g++": "",
    "nvcc": "V13.0.88 " + " ".join(f"compute_{number}" for number in (75, 80, 86, 90, 100, 120)),
    "nvidia-smi": "9.0",
    "torch": ("2.11.0", "13.0"),
}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """setup.py on a machine whose programs only say what the real ones would, and whose torch says its version and its
    CUDA; what is changed to None is not there."""
    for name in ("CUDA_PATH", "NVCC_CCBIN"):
        monkeypatch.delenv(name, raising=False)
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="build")

    def machine(**changed):
        programs = tmp_path / "bin"
        programs.mkdir()
        *there, (_, torch_is) = (GOOD | changed).items()
        for name, said in there:
            if said is not None:
                (programs / name).write_text(f"#!/bin/sh\necho {shlex.quote(said)}\n")
                (programs / name).chmod(0o755)
        if torch_is is not None:
            (tmp_path / "torch").mkdir()
            (tmp_path / "torch" / "__init__.py").write_text("raise AssertionError('the build imports torch')")
            (tmp_path / "torch" / "version.py").write_text("__version__ = {!r}\ncuda = {!r}\n".format(*torch_is))
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        monkeypatch.setenv("PATH", str(programs))
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        monkeypatch.setattr("sysconfig.get_path", lambda name: str(programs))
        return SimpleNamespace(**setup)

    return machine


OLD_NVCC = {"nvcc": "V13.0.88 " + " ".join(f"compute_{number}" for number in (70, 80, 89, 90))}
NO_GPU, NO_NVCC, NO_CUDA = {"nvidia-smi": None}, {"nvcc": None}, {"torch": ("2.11.0", None)}
NO_DRIVER = {"nvidia-smi": "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."}
FOR, ASKED = "builds the CUDA library for ", r" \(takes minutes\): GPSA_BUILD_CUDA=1"
HAS_GPU = ".*: this machine has a GPU"
WITHOUT = "built without the CUDA library: "
CANNOT = "GPSA_BUILD_CUDA=1, but the CUDA library cannot be built: "


@pytest.mark.parametrize(
    ("wanted", "listed", "changed", "expected"),
    [
        ("", "", {}, FOR + "sm_90" + HAS_GPU),
        ("", "", {"nvidia-smi": "9.0\n8.6\n9.0"}, FOR + "sm_86, sm_90" + HAS_GPU),
        ("", "", {"nvidia-smi": "7.5\n12.0"}, FOR + "sm_120" + HAS_GPU),
        ("", "9.0", {}, FOR + "sm_90" + HAS_GPU),
        ("", "8.0+PTX", {}, FOR + "sm_80, compute_80" + HAS_GPU),
        ("", "", {"nvidia-smi": "7.5"}, WITHOUT + r"it needs .* 8.0 or later, and one that .*nvcc knows, not 7\.5"),
        ("", "", {"nvidia-smi": "13.0"}, WITHOUT + r"it needs .* 8.0 or later, and one that .*nvcc knows, not 13\.0"),
        ("", "", NO_DRIVER, WITHOUT + "this machine has no GPU"),
        ("", "", NO_GPU, WITHOUT + "this machine has no GPU"),
        ("", "", NO_GPU | NO_NVCC | NO_CUDA, WITHOUT + "this machine has no GPU"),
        ("", "", NO_NVCC, WITHOUT + "no nvcc in "),
        ("", "", NO_CUDA, WITHOUT + "torch 2.11.0 in .* has no CUDA"),
        ("0", "", {}, WITHOUT + "GPSA_BUILD_CUDA=0"),
        ("0", "", NO_GPU | NO_NVCC | NO_CUDA, WITHOUT + "GPSA_BUILD_CUDA=0"),
        ("1", "", {}, FOR + "sm_80, sm_90, sm_100, sm_120, compute_120" + ASKED),
        ("1", "", NO_GPU, FOR + "sm_80, sm_90, sm_100, sm_120, compute_120" + ASKED),
        ("1", "", OLD_NVCC, FOR + "sm_80, sm_90, compute_90" + ASKED),
        ("1", "8.0;9.0+PTX", {}, FOR + "sm_80, sm_90, compute_90" + ASKED),
        ("1", "8.6, 9.0a 12.0", {}, FOR + "sm_86, sm_90a, sm_120" + ASKED),
        ("1", "7.0;7.5;10.3f", {}, FOR + "sm_103f" + ASKED),
        ("1", "Hopper", {}, CANNOT + ".*'Hopper'"),
        ("1", "9", {}, CANNOT + ".*'9'"),
        ("1", "7.5", {}, CANNOT + ".*from 8.0 on"),
        ("1", "", NO_NVCC, CANNOT + "no nvcc in "),
        ("1", "", {"torch": None}, CANNOT + "no torch is in the environment of the build"),
        ("1", "", NO_GPU | NO_CUDA, CANNOT + "torch 2.11.0 in .* has no CUDA"),
        ("1", "", {"torch": ("2.11.0+cpu", None)}, CANNOT + r"torch 2.11.0\+cpu in .* has no CUDA"),
        ("1", "", {"torch": ("2.9.1+cu130", "13.0")}, CANNOT + r"torch 2.9.1\+cu130 in .* is older than 2.10"),
        ("1", "", {"torch": ("2.11.0", "99.0")}, CANNOT + ".*nvcc is of CUDA 13.0.88, and torch 2.11.0 of CUDA 99.0"),
        ("1", "", {"ninja": None}, CANNOT + "no ninja was found"),
        ("1", "", {"g++": None}, CANNOT + r"no g\+\+ on PATH"),
        ("yes", "", {}, "GPSA_BUILD_CUDA must be 0, 1 or unset, got 'yes'"),
    ],
)
def test_one_line_says_what_is_built_and_why(machine, capsys, monkeypatch, wanted, listed, changed, expected):
    build = machine(**changed)
    monkeypatch.setenv("GPSA_BUILD_CUDA", wanted)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    try:
        assert build.builds() == expected.startswith(FOR)
        (line,) = capsys.readouterr().err.splitlines()
    except SystemExit as error:
        line = str(error)
        assert wanted == "yes" or expected.startswith(CANNOT)
    assert re.match("gpsa_kernels: " + expected, line)


def pip_wheel(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``pip wheel`` of a copy of the sources, with a library built in place before, and what it prints."""
    source = folder / "source"
    shutil.copytree(ROOT / "gpsa_kernels", source / "gpsa_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (source / "gpsa_kernels" / "_cuda").mkdir(exist_ok=True)
    (source / "gpsa_kernels" / "_cuda" / "gpsa_cuda.so").write_text("from an earlier build in place")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    settings = {name: value for name, value in os.environ.items() if name != "GPSA_BUILD_CUDA"} | environment
    return subprocess.run([*command, str(source)], capture_output=True, text=True, env=settings)


def test_what_shall_not_be_built_is_left_out_with_one_line(tmp_path):
    done = pip_wheel(tmp_path, GPSA_BUILD_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if "gpsa_kernels: " in line]
    assert lines == ["gpsa_kernels: built without the CUDA library: GPSA_BUILD_CUDA=0"]
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "_cuda" in name]


# In the kernels' place, to be compiled in a second.
KERNELS = """
#include "gpsa.h"
namespace gpsa {
Sizes sizes(const Problem&, int) { return {1, 0, 0, 0, false}; }
const char* launch_forward(const Forward&, cudaStream_t) { return nullptr; }
const char* launch_backward(const Backward&, cudaStream_t) { return nullptr; }
}
"""


@pytest.mark.usefixtures("_compiler")
def test_a_build_in_place_compiles_what_has_changed(tmp_path):
    source = tmp_path / "a folder with spaces"
    (source / "gpsa_kernels").mkdir(parents=True)
    (source / "csrc").mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc/gpsa.h", "csrc/register.cpp"):
        shutil.copy(ROOT / name, source / name)
    for name in ("__init__.py", "_version.py"):
        shutil.copy(ROOT / "gpsa_kernels" / name, source / "gpsa_kernels")
    (source / "csrc" / "kernels.cu").write_text(KERNELS)
    environment = os.environ | {"GPSA_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0 9.0+PTX"}

    def build_in_place() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        return subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)

    first, second = build_in_place(), build_in_place()
    assert first.returncode == 0, first.stderr
    progress = r"^gpsa_kernels: \[\d/3, \d+\.\d+ s\] kernels.cu.o for sm_80, sm_90, compute_90$"
    assert re.search(progress, first.stdout, re.MULTILINE)
    assert "ninja: no work to do." in second.stdout
    built = source / "gpsa_kernels" / "_cuda"
    assert {path.name for path in built.iterdir()} == {"gpsa_cuda.so", "build.json"}
    assert json.loads((built / "build.json").read_text())["architectures"] == ["sm_80", "sm_90", "compute_90"]

    before = (built / "gpsa_cuda.so").stat().st_ino
    (source / "csrc" / "gpsa.h").write_text((source / "csrc" / "gpsa.h").read_text() + "#error not today\n")
    third = build_in_place()
    assert third.returncode != 0
    assert "not today" in third.stdout
    assert "did not compile, see above; GPSA_BUILD_CUDA=0 installs without it" in third.stderr
    assert (built / "gpsa_cuda.so").stat().st_ino == before


def test_what_must_be_built_and_cannot_is_an_error(tmp_path):
    done = pip_wheel(tmp_path, GPSA_BUILD_CUDA="1", CUDA_HOME=str(tmp_path / "no-cuda"))
    assert done.returncode != 0
    expected = f"GPSA_BUILD_CUDA=1, but the CUDA library cannot be built: no nvcc in {tmp_path}/no-cuda/bin"
    assert expected in done.stdout + done.stderr
