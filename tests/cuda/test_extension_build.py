"""setup.py: what it finds, what it says, and what it builds where something is missing."""

from __future__ import annotations

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
import torch

ROOT = Path(__file__).parents[2]
needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])) is None,
    reason="nvcc is not installed",
)


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module, in an environment that says nothing about the build."""
    for name in ("GPSA_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "NVCC_CCBIN"):
        monkeypatch.delenv(name, raising=False)
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py"), run_name="build"))


def write_torch(folder: Path, version: str, cuda: str | None) -> None:
    """A torch of which nothing is there but what it says of itself."""
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise AssertionError('the build imports torch')")
    (folder / "torch" / "version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\n")


def machine(
    monkeypatch, folder: Path, *, gpus: str | None = "9.0", nvcc: bool = True, torch_cuda: str | None = "13.0"
) -> None:
    """A machine whose programs only say what the real ones would, with a torch to build with."""
    programs = folder / "bin"
    programs.mkdir()
    said = dict.fromkeys(("ninja", "g++"), "")
    if nvcc:
        said["nvcc"] = "V13.0.88 " + " ".join(f"compute_{number}" for number in (75, 80, 86, 90, 100, 120))
    if gpus is not None:
        said["nvidia-smi"] = gpus
    for name, text in said.items():
        (programs / name).write_text(f"#!/bin/sh\necho {shlex.quote(text)}\n")
        (programs / name).chmod(0o755)
    write_torch(folder, "2.11.0", torch_cuda)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("CUDA_HOME", str(folder))


# ---- architectures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({75, 80, 86, 90, 100, 120}, ["sm_80", "sm_90", "sm_100", "sm_120", "compute_120"]),
        ({70, 80, 89, 90}, ["sm_80", "sm_90", "compute_90"]),
    ],
)
def test_the_default_architectures_are_those_that_nvcc_knows(build, known, expected):
    assert build.architectures(build.Nvcc("nvcc", "13.0.88", frozenset(known))) == expected


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("9.0", ["sm_90"]),
        ("8.0;9.0+PTX", ["sm_80", "sm_90", "compute_90"]),
        ("8.6, 9.0a 12.0", ["sm_86", "sm_90a", "sm_120"]),
        ("7.0;7.5;10.3f", ["sm_103f"]),
    ],
)
def test_torch_cuda_arch_list(build, monkeypatch, listed, expected):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert build.architectures(build.Nvcc("nvcc", "13.0.88", frozenset({80}))) == expected


@pytest.mark.parametrize(("listed", "words"), [("Hopper", "'Hopper'"), ("9", "'9'"), ("7.5", "from 8.0 on")])
def test_a_torch_cuda_arch_list_that_cannot_be_served(build, monkeypatch, listed, words):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    with pytest.raises(build.Missing, match=words):
        build.architectures(build.Nvcc("nvcc", "13.0.88", frozenset({80})))


# ---- missing pieces ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "cuda", "words"),
    [
        ("2.11.0+cpu", None, r"torch 2.11.0\+cpu in .* has no CUDA"),
        ("2.9.1+cu130", "13.0", r"torch 2.9.1\+cu130 in .* is older than 2.10"),
    ],
)
def test_a_torch_that_cannot_be_built_with(build, monkeypatch, tmp_path, version, cuda, words):
    write_torch(tmp_path, version, cuda)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(build.Missing, match=words):
        build.Torch.find()


def test_an_isolated_build_has_no_torch(build, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(build.Missing, match="no torch is in the environment of the build"):
        build.Torch.find()


def test_a_torch_of_another_cuda(build, monkeypatch, tmp_path):
    machine(monkeypatch, tmp_path, torch_cuda="99.0")
    with pytest.raises(build.Missing, match=r"nvcc is of CUDA 13.0.88, and torch 2.11.0 of CUDA 99.0"):
        build.Build.find()


@pytest.mark.parametrize(("program", "words"), [("ninja", "no ninja was found"), ("g++", r"no g\+\+ on PATH")])
def test_a_missing_program(build, monkeypatch, tmp_path, program, words):
    machine(monkeypatch, tmp_path)
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **kwargs: None if name == program else which(name, **kwargs))
    with pytest.raises(build.Missing, match=words):
        build.Build.find()


WITHOUT = "built without the CUDA library: "
CANNOT = "GPSA_BUILD_CUDA=1, but the CUDA library cannot be built: "
DEFAULT = r"builds .* for sm_80, sm_90, sm_100, sm_120, compute_120 \(takes minutes\): GPSA_BUILD_CUDA=1"


@pytest.mark.parametrize(
    ("wanted", "gpus", "nvcc", "torch_cuda", "expected"),
    [
        ("", "9.0", True, "13.0", r"builds the CUDA library for sm_90 \(takes minutes\): this machine has a GPU"),
        ("", "9.0", False, "13.0", WITHOUT + "no nvcc in "),
        ("", "9.0", True, None, WITHOUT + "torch 2.11.0 in .* has no CUDA"),
        ("", None, True, "13.0", WITHOUT + "this machine has no GPU"),
        ("", None, False, None, WITHOUT + "this machine has no GPU"),
        ("0", "9.0", True, "13.0", WITHOUT + "GPSA_BUILD_CUDA=0"),
        ("0", None, False, None, WITHOUT + "GPSA_BUILD_CUDA=0"),
        ("1", "9.0", True, "13.0", DEFAULT),
        ("1", None, True, "13.0", DEFAULT),
        ("1", "9.0", False, "13.0", CANNOT + "no nvcc in "),
        ("1", None, True, None, CANNOT + "torch 2.11.0 in .* has no CUDA"),
        ("yes", "9.0", True, "13.0", "GPSA_BUILD_CUDA must be 0, 1 or unset, got 'yes'"),
    ],
)
def test_one_line_says_what_is_built_and_why(
    build, monkeypatch, tmp_path, capsys, wanted, gpus, nvcc, torch_cuda, expected
):
    machine(monkeypatch, tmp_path, gpus=gpus, nvcc=nvcc, torch_cuda=torch_cuda)
    monkeypatch.setenv("GPSA_BUILD_CUDA", wanted)
    try:
        assert build.builds() == expected.startswith("builds")
        (line,) = capsys.readouterr().err.splitlines()
    except SystemExit as error:
        line = str(error)
        assert wanted == "yes" or expected.startswith(CANNOT)
    assert re.match("gpsa_kernels: " + expected, line)


@pytest.mark.parametrize(
    ("gpus", "listed", "expected"),
    [
        ("9.0\n8.6\n9.0", "", ["sm_86", "sm_90"]),
        ("7.5\n12.0", "", ["sm_120"]),
        ("9.0", "8.0+PTX", ["sm_80", "compute_80"]),
        ("7.5", "", r"compute capability 8.0 or later, and one that .*nvcc knows, not 7\.5"),
        ("13.0", "", r"compute capability 8.0 or later, and one that .*nvcc knows, not 13\.0"),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", "", "has no GPU"),
    ],
)
def test_the_architectures_are_those_of_the_gpus(build, monkeypatch, tmp_path, gpus, listed, expected):
    machine(monkeypatch, tmp_path, gpus=gpus)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    if isinstance(expected, list):
        assert build.Build.find().architectures == expected
    else:
        with pytest.raises(build.Missing, match=expected):
            build.Build.find()


# ---- pip -----------------------------------------------------------------------------------------------------------


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


@needs_nvcc
@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA")
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
    assert re.search(
        r"^gpsa_kernels: \[\d/3, \d+\.\d+ s\] kernels.cu.o for sm_80, sm_90, compute_90$", first.stdout, re.M
    )
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
