"""setup.py: what it finds, what it says, and what it builds where something is missing."""

from __future__ import annotations

import json
import os
import runpy
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


@needs_nvcc
def test_a_torch_of_another_cuda(build, monkeypatch, tmp_path):
    write_torch(tmp_path, "2.11.0+cu99", "99.0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(build.Missing, match=r"nvcc is of CUDA \d+\..*, and torch 2.11.0\+cu99 of CUDA 99.0"):
        build.Build.find()


@needs_nvcc
@pytest.mark.parametrize(("program", "words"), [("ninja", "no ninja was found"), ("g++", r"no g\+\+ on PATH")])
def test_a_missing_program(build, monkeypatch, program, words):
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **kwargs: None if name == program else which(name, **kwargs))
    with pytest.raises(build.Missing, match=words):
        build.Build.find()


def test_why_not(build, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.why_not({"bdist_wheel"}) == f"no nvcc in {tmp_path}/bin"
    assert "editable" in build.why_not({"editable_wheel"})
    monkeypatch.setenv("GPSA_BUILD_CUDA", "0")
    assert build.why_not({"bdist_wheel"}) == "GPSA_BUILD_CUDA=0"
    monkeypatch.setenv("GPSA_BUILD_CUDA", "1")
    for command in ("bdist_wheel", "editable_wheel"):
        with pytest.raises(SystemExit, match=f"cannot be built: no nvcc in {tmp_path}/bin"):
            build.why_not({command})
    monkeypatch.setenv("GPSA_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0, 1 or unset, got 'yes'"):
        build.why_not({"bdist_wheel"})


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


@pytest.mark.parametrize("missing", ["GPSA_BUILD_CUDA", "nvcc"])
def test_what_cannot_or_shall_not_be_built_is_skipped_with_one_line(tmp_path, missing):
    home = tmp_path / "no-cuda"
    done = pip_wheel(tmp_path, **({"CUDA_HOME": str(home)} if missing == "nvcc" else {"GPSA_BUILD_CUDA": "0"}))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if "gpsa_kernels: " in line]
    reason = f"no nvcc in {home}/bin" if missing == "nvcc" else "GPSA_BUILD_CUDA=0"
    assert lines == [f"gpsa_kernels: built without the CUDA library: {reason}"]
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
    assert "ninja: no work to do." not in first.stdout
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
