"""The library as users get it: built by pip into a wheel, installed into an empty folder, loaded there."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import emulation
import pytest
import torch

import gpsa_kernels
from tools import machine_code

SHIMS = ("csrc/stable/c/shim.h", "csrc/inductor/aoti_torch/c/shim.h")


def run(site: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(site)}
    return subprocess.check_output([sys.executable, *arguments], text=True, cwd=site, env=environment)


def test_the_wheel_serves_every_python_of_its_platform(wheel):
    assert re.search(r"-py3-none-linux_\w+\.whl$", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    built = {"gpsa_kernels/_cuda/gpsa_cuda.so", "gpsa_kernels/_cuda/build.json"}
    assert {name for name in names if "_cuda/" in name or name.endswith(".so")} == built
    assert "gpsa_kernels/py.typed" in names


@pytest.fixture
def codes(architectures) -> list[str]:
    """What the library holds: machine code, and with the default architectures the last one's PTX."""
    return [f"sm_{code}" for code in architectures] + ["compute_120"] * (len(architectures) > 1)


def test_the_metadata_says_how_it_was_built(site, codes):
    metadata = json.loads((site / "gpsa_kernels" / "_cuda" / "build.json").read_text())
    assert metadata.pop("nvcc").startswith(metadata["cuda"])
    assert metadata.pop("cuda").split(".")[0] == torch.version.cuda.split(".")[0]
    assert metadata == {
        "version": gpsa_kernels.__version__,
        "architectures": codes,
        "torch": torch.__version__,
        "oldest_torch": "2.10",
    }


def test_machine_code_and_ptx_are_of_the_architectures_asked_for(library, codes):
    listed = subprocess.check_output([machine_code.tool(), "--list-elf", "--list-ptx", library], text=True)
    expected = {(code, "cubin") if code[:2] == "sm" else ("sm_120", "ptx") for code in codes}
    assert set(re.findall(r"\.(sm_\w+)\.(\w+)$", listed, re.MULTILINE)) == expected


def test_all_it_needs_is_the_stable_shims_and_the_system(library):
    """No Python, no CUDA runtime, none of torch's C++ symbols."""
    dynamic = subprocess.check_output(["readelf", "-d", library], text=True)
    assert not re.search("RPATH|RUNPATH", dynamic)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    system = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6"}
    system |= {name for name in needed if name.startswith("ld-linux")}
    assert needed - system == {"libtorch_cpu.so", "libtorch_cuda.so"}
    listed = subprocess.check_output(["nm", "-D", "--undefined-only", library], text=True)
    symbols = re.findall(r"^\s+U (\S+)$", listed, re.MULTILINE)
    ours = {name for name in symbols if not re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$", name)}
    include = Path(torch.__file__).parent / "include" / "torch"
    stable = set(re.findall(r"\b(\w+)\(", "".join((include / shim).read_text() for shim in SHIMS)))
    assert "aoti_torch_get_current_cuda_stream" in ours
    assert ours <= stable


def test_it_loads_where_it_was_installed_and_not_before_it_is_asked_for(site):
    script = """
import json, sys, torch, gpsa_kernels
from gpsa_kernels.backends import cuda
assert "torch._dynamo" not in sys.modules
assert cuda._load.cache_info().currsize == 0
reason = cuda.unavailable()
schemas = [str(getattr(torch.ops.gpsa_cuda, name).default._schema) for name in sys.argv[1:]]
q = torch.zeros(2, 3, 6, 8, dtype=torch.half)
try:
    torch.ops.gpsa_cuda.forward(q, q, q, torch.zeros(3, 3), torch.zeros(3), None, 2, 3, 1.0, 0.0, True)
except RuntimeError as error:
    refused = str(error)
# the content branch's own output, where no block can hold it all backward: as on an H100, where no GPU is
asked = [(14, 14, 48, 0.0), (16, 16, 48, 0.3), (14, 14, 72, 0.3), (1, 257, 8, 0.0), (128, 128, 48, 0.0)]
saves = [torch.ops.gpsa_cuda.saves_content(rows, columns, dim, True, p, -1) for rows, columns, dim, p in asked]
print(json.dumps([gpsa_kernels.__file__, reason, schemas, refused, saves]))
"""
    emulation.operators()
    names = ("forward", "backward", "saves_content")
    of_the_source = [str(getattr(torch.ops.gpsa_emulated, name).default._schema) for name in names]
    file, reason, schemas, refused, saves = json.loads(run(site, "-c", script, *names))
    assert Path(file) == site / "gpsa_kernels" / "__init__.py"
    assert reason == (None if torch.cuda.is_available() else "no CUDA device was found")
    assert schemas == [schema.replace("gpsa_emulated", "gpsa_cuda") for schema in of_the_source]
    assert "q must be on a CUDA device" in refused
    assert str(emulation.ROOT) not in refused, "a path of the machine that built it"
    assert saves == [False, False, True, True, True]


def test_info_shows_the_build(site, codes):
    lines = run(site, "-m", "gpsa_kernels", "info").splitlines()
    (line,) = (line for line in lines if line.startswith("library"))
    assert f"gpsa_kernels {gpsa_kernels.__version__} for CUDA" in line
    assert f"torch >= 2.10 ({', '.join(codes)})" in line
    assert f"with torch {torch.__version__}" in line
