"""The library as users get it: built by pip into a wheel, installed into an empty folder.

Compiled without a GPU, for the default architectures or, every day, for one. The objects are kept in ``build/``: only
what changed is compiled again.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def _compiler() -> None:
    if shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])) is None:
        pytest.skip("nvcc is not installed")
    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA")


@pytest.fixture(scope="session")
def wheel(_compiler, tmp_path_factory, architectures) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    wanted = "9.0" if architectures == (90,) else ""  # empty: the default
    environment = os.environ | {"GPSA_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": wanted}
    subprocess.run([*command, str(ROOT)], check=True, env=environment)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def site(wheel, tmp_path_factory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*command, str(wheel)], check=True)
    return folder


@pytest.fixture(scope="session")
def library(site) -> Path:
    return site / "gpsa_kernels" / "_cuda" / "gpsa_cuda.so"
