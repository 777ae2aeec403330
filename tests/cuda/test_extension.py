"""The library as users get it: built by pip into a wheel, installed into an empty folder, loaded there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import gpsa_kernels
from tools import machine_code

ROOT = Path(__file__).parents[2]
SHIMS = ("csrc/stable/c/shim.h", "csrc/inductor/aoti_torch/c/shim.h")
SCHEMAS = {
    "forward": "gpsa_cuda::forward(Tensor q, Tensor k, Tensor v, Tensor pos_weight, Tensor gate, Tensor? seed, "
    "int rows, int columns, float scale, float dropout_p, bool save) -> "
    "(Tensor out, Tensor? content, Tensor? logsumexp)",
    "backward": "gpsa_cuda::backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor pos_weight, Tensor gate, "
    "Tensor? seed, int rows, int columns, float scale, float dropout_p, Tensor? content, Tensor logsumexp) -> "
    "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_pos_weight, Tensor grad_gate)",
    "saves_content": "gpsa_cuda::saves_content(int rows, int columns, int head_dim, bool bfloat16, float dropout_p, "
    "int device) -> bool",
}


def run(site: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=site, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_serves_every_python_of_its_platform(wheel):
    assert re.search(r"-py3-none-linux_\w+\.whl$", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if "_cuda/" in name or name.endswith(".so")} == {
        "gpsa_kernels/_cuda/gpsa_cuda.so",
        "gpsa_kernels/_cuda/build.json",
    }
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
    options = "--list-elf", "--list-ptx"
    listed = subprocess.run([machine_code.tool(), *options, library], capture_output=True, text=True, check=True).stdout
    expected = {(code, "cubin") if code[:2] == "sm" else ("sm_120", "ptx") for code in codes}
    assert set(re.findall(r"\.(sm_\w+)\.(\w+)$", listed, re.MULTILINE)) == expected


def test_all_it_needs_is_the_stable_shims_and_the_system(library):
    """No Python, no CUDA runtime, none of torch's C++ symbols."""
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    system = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6"}
    assert needed - system - {name for name in needed if name.startswith("ld-linux")} == {
        "libtorch_cpu.so",
        "libtorch_cuda.so",
    }
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    symbols = re.findall(r"^\s+U (\S+)$", listed.stdout, re.MULTILINE)
    ours = {name for name in symbols if not re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$", name)}
    include = Path(torch.__file__).parent / "include" / "torch"
    stable = set(re.findall(r"\b(\w+)\(", "".join((include / shim).read_text() for shim in SHIMS)))
    assert "aoti_torch_get_current_cuda_stream" in ours
    assert ours <= stable


def test_it_loads_where_it_was_installed(site):
    script = """
import json, sys, torch, gpsa_kernels
from gpsa_kernels.backends import cuda
assert "torch._dynamo" not in sys.modules
before = cuda._load.cache_info().currsize
reason = cuda.unavailable()
schemas = {name: str(getattr(torch.ops.gpsa_cuda, name).default._schema) for name in sys.argv[1:]}
print(json.dumps([gpsa_kernels.__file__, before, reason, schemas]))
"""
    file, before, reason, schemas = json.loads(run(site, "-c", script, *SCHEMAS))
    assert Path(file) == site / "gpsa_kernels" / "__init__.py"
    assert before == 0, "it was loaded before it was asked for"
    assert reason == (None if torch.cuda.is_available() else "no CUDA device was found")
    assert schemas == SCHEMAS


def test_it_says_what_backward_reads(site):
    """The content branch's own output, where no block can hold it all backward: as on an H100, where no GPU is."""
    script = """
import json, torch
from gpsa_kernels.backends import cuda
cuda.unavailable()
asked = [(14, 14, 48, 0.0), (16, 16, 48, 0.3), (14, 14, 72, 0.3), (1, 257, 8, 0.0), (128, 128, 48, 0.0)]
saves = torch.ops.gpsa_cuda.saves_content
print(json.dumps([saves(rows, columns, dim, True, p, -1) for rows, columns, dim, p in asked]))
"""
    assert json.loads(run(site, "-c", script)) == [False, False, True, True, True]


def test_info_shows_the_build(site, codes):
    lines = run(site, "-m", "gpsa_kernels", "info").splitlines()
    (line,) = (line for line in lines if line.startswith("library"))
    assert f"gpsa_kernels {gpsa_kernels.__version__} for CUDA" in line
    assert f"torch >= 2.10 ({', '.join(codes)})" in line
    assert f"with torch {torch.__version__}" in line


# What a kernel would do damage with is refused before the device is looked at, so CPU tensors show it.
GOOD = """
import json, torch
from gpsa_kernels.backends import cuda
cuda.unavailable()
def tokens(dtype=torch.float16, dim=8):
    return torch.zeros(2, 6, 3, dim, dtype=dtype).transpose(1, 2)
def good():
    return dict(q=tokens(), k=tokens(), v=tokens(), pos_weight=torch.zeros(3, 3), gate=torch.zeros(3), seed=None,
                rows=2, columns=3, scale=1.0, dropout_p=0.0, save=True)
def good_backward():
    arguments = good()
    del arguments["save"]
    return arguments | dict(grad_out=tokens(), content=None, logsumexp=torch.zeros(2, 3, 6))
said = {}
def call(operator, arguments, name):
    try:
        operator(**arguments)
    except RuntimeError as error:
        said[name] = str(error)
"""
BAD = {
    "q=torch.zeros(2, 3, 6)": "q must have 4 dimensions, got 3",
    "q=tokens(torch.float32)": "q must be float16 or bfloat16",
    "rows=3": "rows * columns must be the 6 tokens of q, got 3 * 3",
    "rows=-2, columns=-3": "rows * columns must be the 6 tokens of q, got -2 * -3",
    "k=tokens(torch.bfloat16)": "k must have q's dtype",
    "k=tokens()[:1]": "k must have q's size 2 in dimension 0, got 1",
    "v=tokens()[:, :, :5]": "v must have q's size 6 in dimension 2, got 5",
    "v=tokens()[0]": "v must have 4 dimensions, got 3",
    "pos_weight=torch.zeros(3, 2)": "pos_weight must have 9 elements, got 6",
    "gate=torch.zeros(2)": "gate must have 3 elements, got 2",
    "gate=torch.zeros(3, device='meta')": "gate must be on q's device",
    "dropout_p=0.5": "dropout needs a seed",
    "dropout_p=0.5, seed=torch.zeros(1)": "seed must be one int64",
    "dropout_p=0.5, seed=torch.zeros(1, dtype=torch.int64, device='meta')": "seed must be on q's device",
    "scale=2.0": "q must be on a CUDA device",
}
BAD_BACKWARD = {
    "grad_out=tokens(torch.bfloat16)": "grad_out must have q's dtype",
    "grad_out=tokens()[:1]": "grad_out must have q's size 2 in dimension 0, got 1",
    "logsumexp=torch.zeros(2, 3, 5)": "logsumexp must have 36 elements, got 30",
    "scale=2.0": "q must be on a CUDA device",
}


@pytest.fixture(scope="module")
def refusals(site) -> dict[str, str]:
    script = GOOD
    for operator, cases in (("forward", BAD), ("backward", BAD_BACKWARD)):
        arguments = "good()" if operator == "forward" else "good_backward()"
        for case in cases:
            name = repr(f"{operator} {case}")
            script += f"call(torch.ops.gpsa_cuda.{operator}, {arguments} | dict({case}), {name})\n"
    return json.loads(run(site, "-c", script + "print(json.dumps(said))"))


@pytest.mark.parametrize("case", BAD)
def test_forward_refuses_what_would_do_damage(refusals, case):
    assert BAD[case] in refusals[f"forward {case}"]


@pytest.mark.parametrize("case", BAD_BACKWARD)
def test_backward_refuses_what_would_do_damage(refusals, case):
    assert BAD_BACKWARD[case] in refusals[f"backward {case}"]


def test_refusals_name_no_path_of_the_machine_that_built_it(refusals):
    assert not [message for message in refusals.values() if str(ROOT) in message]
