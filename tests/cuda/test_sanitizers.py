"""The emulated kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import re

import emulation
import pytest

# without torch, which the sanitizers would only slow down
SCRIPT = """
import array, importlib.util, math, sys
spec = importlib.util.spec_from_file_location("gpsa_emulated", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
heads, dim, nan, device, memory = 2, 40, float("nan"), (132, 227 * 1024), []

def numbers(kind, values, shape, output=False):
    memory.append(array.array(kind, values * (math.prod(shape) // len(values))))
    strides = [math.prod(shape[axis + 1:]) for axis in range(len(shape))]
    return memory[-1].buffer_info()[0], memory[-1].itemsize, shape, strides, output

inputs = {"gate": numbers("f", [0.5], [heads]), "seed": numbers("q", [7], [1])}
inputs["pos_weight"] = numbers("f", [0.3, -0.2, -0.1], [heads, 3])
# two tiles of tokens for the tiled kernels, two of coordinates along x
for rows, columns, row_blocks, digits in ((3, 7, 2, 2), (4, 19, 0, 4)):
    shape = [1, heads, rows * columns, dim]
    inputs |= {"q": numbers("H", [0x3C00], shape), "k": numbers("H", [0x3800], shape)}  # 1, 0.5
    inputs["v"] = numbers("H", [0x4000], shape)  # 2
    for dropout_p, schedule, deferred in ((p, n, late) for p in (0.3, 0.0) for n in (0, 1) for late in (False, True)):
        problem, how = (1, heads, rows, columns, dim, False, 0.25, dropout_p), (device, schedule, deferred)
        saved = {"logsumexp": numbers("f", [nan], shape[:3], True)}
        if row_blocks == 0:
            saved["content"] = numbers("H", [0x7E00], shape, True)  # NaN
        out = numbers("H", [0x7E00], shape, True)
        module.forward(problem, inputs | saved | {"out": out}, row_blocks, *how)
        if dropout_p == 0:  # a mean of equal values is that, but for rounding
            assert set(memory[-1]) <= set(range(0x4000 - digits, 0x4001 + digits))
        saved = {name: (*t[:4], False) for name, t in saved.items()} | {"grad_out": inputs["q"]}
        grads = {name: numbers("H", [0x7E00], shape, True) for name in ("grad_q", "grad_k", "grad_v")}
        slots = 1 if row_blocks else module.tiled_slots(problem)
        grads["sums"] = numbers("f", [nan], [1, heads, slots, 4], True)
        module.backward(problem, inputs | saved | grads, None if row_blocks else 0, *how)
        assert all(map(math.isfinite, memory[-1]))
print("done")
"""


def test_the_kernels_are_clean():
    done = emulation.run_sanitized(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("whole_image_forward.cu", "Sum scores[2 * key_tiles"),
        ("whole_image_backward.cu", "Sum mixed[2][2"),
        ("tiled_forward.cu", "Sum entries[2"),
        ("tiled_backward.cu", "Sum sums[channels / 8"),
        ("tiled_position.cuh", "Sum sums[channels / 8"),
    ],
)
def test_an_accumulator_too_few_is_caught(tmp_path, file, text):
    done = emulation.run_sanitized(SCRIPT, emulation.changed_sources(tmp_path, file, text, f"{text} - 1"))
    assert done.returncode != 0
    caught = re.search("AddressSanitizer: stack-buffer-overflow|index \\d+ out of bounds", done.stderr)
    assert caught, (done.returncode, done.stderr[-2000:])
