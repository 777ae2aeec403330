"""The emulated kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import emulation

# its own process, because AddressSanitizer's library must be loaded first; without torch, which it would only slow down
SCRIPT = """
import array, importlib.util, sys
spec = importlib.util.spec_from_file_location("gpsa_emulated", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
heads, rows, columns, dim = 2, 3, 7, 40
shape = [1, heads, rows * columns, dim]
strides = [heads * rows * columns * dim, rows * columns * dim, dim, 1]

def halves(value):
    return array.array("H", [value] * (heads * rows * columns * dim))

def tensor(memory, output=False):
    return memory.buffer_info()[0], 2, shape, strides, output

q, k, v, out = halves(0x3C00), halves(0x3800), halves(0x4000), halves(0xFFFF)  # 1, 0.5, 2, NaN
weights, gate = array.array("f", [0.3, -0.2, -0.1] * heads), array.array("f", [0.5] * heads)
tensors = {"q": tensor(q), "k": tensor(k), "v": tensor(v), "out": tensor(out, True)}
tensors["pos_weight"] = weights.buffer_info()[0], 4, [heads, 3], [3, 1], False
tensors["gate"] = gate.buffer_info()[0], 4, [heads], [1], False
for seed in (0, 1):
    for deferred in (False, True):
        out[:] = halves(0xFFFF)
        module.forward((1, heads, rows, columns, dim, False, 0.25), tensors, 2, seed, deferred)
        assert set(out) <= set(range(0x3FFE, 0x4003)), "a mean of equal values is that value, but for rounding"
print("done")
"""


def run(csrc):
    library = emulation.build(csrc, flags=(*emulation.SANITIZERS, "-DGPSA_ONE_KERNEL", "-O1"))
    compiler = os.environ.get("CXX", "g++")
    runtime = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = os.environ | {"LD_PRELOAD": runtime.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}  # Python's own
    command = [sys.executable, "-c", SCRIPT, str(library)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_kernels_are_clean():
    done = run(emulation.ROOT / "csrc")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


def test_an_accumulator_too_few_is_caught(tmp_path):
    shutil.copytree(emulation.ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc" / "whole_image_forward.cuh"
    text = source.read_text()
    assert text.count("Sum scores[2 * key_tiles] = {};") == 1
    source.write_text(text.replace("Sum scores[2 * key_tiles] = {};", "Sum scores[2 * key_tiles - 1] = {};"))
    done = run(tmp_path / "csrc")
    assert done.returncode != 0
    assert "AddressSanitizer: stack-buffer-overflow" in done.stderr
