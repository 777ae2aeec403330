"""Builds the CUDA library of ``backend="cuda"`` where there is a GPU to run it; everything else is in pyproject.toml.

nvcc compiles ``csrc/`` and ninja runs nvcc; torch is looked at, never imported. The library uses torch's stable ABI and
no Python at all, so one serves every torch >= 2.10 of its CUDA major and every Python.

    GPSA_BUILD_CUDA       unset: build it for the GPUs of this machine, if there are any and nothing is missing;
                          1: build it for the default architectures or fail, naming what is missing; 0: do not
    TORCH_CUDA_ARCH_LIST  other architectures, as for torch's own extensions: "8.0;9.0+PTX"
    CUDA_HOME             where bin/nvcc is, if not the one on PATH or in /usr/local/cuda
    MAX_JOBS              files compiled in parallel, and architectures of each; by default as many as processors
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:  # without pip's build isolation nobody has looked at pyproject.toml
    sys.exit(
        f"gpsa_kernels: building it needs setuptools >= 77, and this environment has {setuptools.__version__}: "
        "pip install --upgrade setuptools ninja"
    )

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(path.name for path in (ROOT / "csrc").glob("*.cu"))
EXTENSION = "gpsa_kernels._cuda.gpsa_cuda"
LIBRARY, METADATA = "gpsa_cuda.so", "build.json"
ARCHITECTURES = (80, 90, 100, 120)  # the default, as far as nvcc knows them
OLDEST_ARCHITECTURE = 80  # bfloat16 matrix products and cp.async
OLDEST_TORCH = (2, 10)


class Missing(Exception):
    """Why the library cannot be built here."""


class Torch(NamedTuple):
    version: str
    cuda: str  # "13.0"
    path: Path

    @classmethod
    def find(cls) -> Torch:
        """The CUDA torch of the environment that builds, from its files alone."""
        spec = importlib.machinery.PathFinder.find_spec("torch")
        if spec is None or spec.origin is None:
            raise Missing("no torch is in the environment of the build (pip install --no-build-isolation)")
        path = Path(spec.origin).parent
        facts = runpy.run_path(str(path / "version.py"))
        version, cuda = str(facts["__version__"]), facts["cuda"]
        if cuda is None:
            raise Missing(f"torch {version} in {path} has no CUDA")
        if tuple(map(int, version.split(".")[:2])) < OLDEST_TORCH:
            raise Missing(f"torch {version} in {path} is older than {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}")
        return cls(version, cuda, path)


class Nvcc(NamedTuple):
    path: str
    version: str  # "13.0.88"
    architectures: frozenset[int]  # that it compiles for

    @classmethod
    def find(cls) -> Nvcc:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        if home:
            path = shutil.which("nvcc", path=f"{home}/bin")
        else:
            path = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        if path is None:
            raise Missing(f"no nvcc in {home}/bin" if home else "no nvcc on PATH or in /usr/local/cuda (set CUDA_HOME)")

        def ask(option: str) -> str:
            return subprocess.run([path, option], check=True, capture_output=True, text=True).stdout

        version = re.search(r"V(\d+\.\d+\.\d+)", ask("--version"))
        assert version is not None, f"{path} --version names no version"
        return cls(path, version[1], frozenset(map(int, re.findall(r"compute_(\d+)\b", ask("--list-gpu-arch")))))


def jobs() -> str:
    return os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)


def gpus() -> list[int]:
    """The compute capabilities of this machine's GPUs: [90]."""
    path = shutil.which("nvidia-smi")
    if path is None:
        return []
    query = [path, "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True).stdout  # words, if there is no driver
    return sorted({int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", answer, re.MULTILINE)})


def architectures(nvcc: Nvcc, here: Sequence[int] = ()) -> list[str]:
    """What to compile for, as nvcc writes it: ["sm_80", ..., "compute_120"]; compute_* is PTX, for later GPUs.

    Args:
        here: the GPUs to build for; empty for the default.
    """
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if not listed:
        wanted = here or ARCHITECTURES
        known = [number for number in wanted if number >= OLDEST_ARCHITECTURE and number in nvcc.architectures]
        if not known:
            named = ", ".join(str(number / 10) for number in wanted)
            raise Missing(f"it needs compute capability 8.0 or later, and one that {nvcc.path} knows, not {named}")
        return [f"sm_{number}" for number in known] + ([] if here else [f"compute_{known[-1]}"])
    names = []
    for entry in re.split(r"[;,\s]+", listed.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise Missing(f"TORCH_CUDA_ARCH_LIST has {entry!r}, which is not of the form 9.0, 9.0a or 9.0+PTX")
        major, minor, suffix, ptx = match.groups()
        if int(major + minor) >= OLDEST_ARCHITECTURE:
            names += [f"sm_{major}{minor}{suffix}"] + ([f"compute_{major}{minor}{suffix}"] if ptx else [])
    if not names:
        raise Missing(f"TORCH_CUDA_ARCH_LIST={listed} has no architecture from 8.0 on")
    return names


def asked_for(wanted: str, here: Sequence[int]) -> Sequence[int]:
    """The rule: which GPUs GPSA_BUILD_CUDA=``wanted`` builds for on a machine with ``here``; empty for the default."""
    if wanted == "0":
        raise Missing("GPSA_BUILD_CUDA=0")
    if wanted == "" and not here:
        raise Missing("this machine has no GPU (GPSA_BUILD_CUDA=1 builds it all the same)")
    return () if wanted == "1" else here


class Build(NamedTuple):
    """Everything that a build depends on; finding it raises Missing, with the reason why there is none."""

    torch: Torch
    nvcc: Nvcc
    ninja: str
    architectures: list[str]

    @classmethod
    def find(cls) -> Build:
        here = asked_for(os.environ.get("GPSA_BUILD_CUDA", ""), gpus())
        if not sys.platform.startswith("linux"):
            raise Missing("it is built on Linux only")
        nvcc, torch = Nvcc.find(), Torch.find()
        if nvcc.version.split(".")[0] != torch.cuda.split(".")[0]:
            raise Missing(f"{nvcc.path} is of CUDA {nvcc.version}, and torch {torch.version} of CUDA {torch.cuda}")
        ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
        if ninja is None:
            raise Missing("no ninja was found (pip install ninja)")
        compiler = os.environ.get("NVCC_CCBIN", "g++")
        if shutil.which(compiler) is None:
            raise Missing(f"no {compiler} on PATH, which nvcc needs (set NVCC_CCBIN)")
        if not SOURCES:
            raise Missing("csrc/ holds no kernels")
        return cls(torch, nvcc, ninja, architectures(nvcc, here))

    def ninja_file(self) -> str:
        """The rules, with one object per source file of ``csrc/``, recompiled when it or a header changes."""
        codes = [f"-gencode=arch=compute_{name.split('_')[1]},code={name}" for name in self.architectures]
        common = [self.nvcc.path, "-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        kernel = [*common, *codes, f"--threads={jobs()}"]  # architectures side by side: few files, long ones
        register = [
            *common,
            f"-I{self.torch.path / 'include'}",
            f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000",
            "-DUSE_CUDA",
        ]
        # no libcudart.so, no libpython; libstdc++ comes first because torch's libraries export some of it, too
        link = [self.nvcc.path, "-shared", "-nodlink", "-cudart=static"]
        link += ["-Xlinker=-s,-z,defs,--as-needed,--exclude-libs,ALL"]
        libraries = ["-lstdc++", f"-L{self.torch.path / 'lib'}", "-ltorch_cpu", "-ltorch_cuda"]
        sources = dict.fromkeys(SOURCES, "kernel") | {"register.cpp": "register"}
        objects = {name: f"{name}.o" for name in sources}

        def command(*words: str) -> str:
            return shlex.join(words).replace("$", "$$")

        lines = []
        for rule, words, progress in (
            ("kernel", kernel, f"$out for {', '.join(self.architectures)}"),
            ("register", register, "$out"),
        ):
            lines += [f"rule {rule}", f"  command = {command(*words)} -MD -MF $out.d -c $in -o $out"]
            lines += ["  depfile = $out.d", "  deps = gcc", f"  description = {progress}"]
        lines += ["rule link", f"  command = {command(*link)} -o $out $in {command(*libraries)}"]
        lines += ["  description = $out"]
        for name, rule in sources.items():
            lines.append(f"build {objects[name]}: {rule} ../../csrc/{name}")  # relative: the path is in messages
        lines.append(f"build {LIBRARY}: link {' '.join(objects.values())}")
        return "\n".join(lines) + "\n"

    def run(self) -> Path:
        """Compiles what has changed since the last time; the folder with the library and its metadata."""
        folder = ROOT / "build" / "-".join(["cuda", self.nvcc.version, *self.architectures])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.ninja_file())
        progress = {"NINJA_STATUS": "gpsa_kernels: [%f/%t, %e s] "}  # ninja prints a line when a file is done
        ninja = [self.ninja, "-C", str(folder), "-j", jobs()]
        if subprocess.run(ninja, env=os.environ | progress).returncode != 0:
            sys.exit("gpsa_kernels: the CUDA library did not compile, see above; GPSA_BUILD_CUDA=0 installs without it")
        metadata = {
            "version": runpy.run_path(str(ROOT / "gpsa_kernels" / "_version.py"))["__version__"],
            "cuda": ".".join(self.nvcc.version.split(".")[:2]),
            "nvcc": self.nvcc.version,
            "architectures": self.architectures,
            "torch": self.torch.version,
            "oldest_torch": ".".join(map(str, OLDEST_TORCH)),
        }
        (folder / METADATA).write_text(json.dumps(metadata, indent=2) + "\n")
        return folder


class BuildExtension(build_ext):
    """Puts the library, and its metadata beside it, into ``gpsa_kernels/_cuda/``."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], LIBRARY)

    def get_output_mapping(self) -> dict[str, str]:
        outputs = super().get_output_mapping()
        metadata = {str(Path(a).with_name(METADATA)): str(Path(b).with_name(METADATA)) for a, b in outputs.items()}
        return outputs | metadata

    def build_extension(self, ext: Extension) -> None:
        folder = Build.find().run()
        _copy(folder, Path(self.build_lib, *EXTENSION.split(".")[:-1]))

    def copy_extensions_to_source(self) -> None:
        _copy(Path(self.build_lib, *EXTENSION.split(".")[:-1]), ROOT.joinpath(*EXTENSION.split(".")[:-1]))


def _copy(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in (LIBRARY, METADATA):
        (target / name).unlink(missing_ok=True)  # a process that has the old library mapped keeps it
        shutil.copy(source / name, target)


class BuildWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """No Python is in the library, so only the platform counts."""
        _, _, platform = super().get_tag()
        return "py3", "none", platform


def builds() -> bool:
    """Whether the library is built, and a line that says so and why."""
    wanted = os.environ.get("GPSA_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"gpsa_kernels: GPSA_BUILD_CUDA must be 0, 1 or unset, got {wanted!r}")
    try:
        build = Build.find()
    except Missing as missing:
        if wanted == "1":
            sys.exit(f"gpsa_kernels: GPSA_BUILD_CUDA=1, but the CUDA library cannot be built: {missing}")
        print(f"gpsa_kernels: built without the CUDA library: {missing}", file=sys.stderr)
        return False
    names = ", ".join(build.architectures)
    reason = "GPSA_BUILD_CUDA=1" if wanted else "this machine has a GPU"
    print(f"gpsa_kernels: builds the CUDA library for {names} (takes minutes): {reason}", file=sys.stderr)
    return True


def main() -> None:
    building = bool({"bdist_wheel", "editable_wheel", "build", "build_ext"} & set(sys.argv[1:]))
    setup(
        ext_modules=[Extension(EXTENSION, sources=[])] if building and builds() else [],
        cmdclass={"build_ext": BuildExtension, "bdist_wheel": BuildWheel},
    )


if __name__ == "__main__":
    main()
