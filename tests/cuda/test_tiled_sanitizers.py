"""The emulated tiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import emulation
import pytest

# without torch, which the sanitizers would only slow down
SCRIPT = """
import array, importlib.util, math, sys
spec = importlib.util.spec_from_file_location("gpsa_emulated", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
heads, rows, columns, dim = 2, 4, 19, 40  # two tiles of tokens, two of coordinates along x
tokens = rows * columns
shape, strides = [1, heads, tokens, dim], [heads * tokens * dim, tokens * dim, dim, 1]
memory = []

def tensor(value, output=False):
    memory.append(array.array("H", [value] * (heads * tokens * dim)))
    return memory[-1].buffer_info()[0], 2, shape, strides, output

def numbers(kind, values, shape, output=False):
    memory.append(array.array(kind, values))
    strides = [math.prod(shape[axis + 1:]) for axis in range(len(shape))]
    return memory[-1].buffer_info()[0], memory[-1].itemsize, shape, strides, output

nan = float("nan")
device = 132, 227 * 1024
inputs = {"q": tensor(0x3C00), "k": tensor(0x3800), "v": tensor(0x4000)}  # 1, 0.5, 2
inputs["pos_weight"] = numbers("f", [0.3, -0.2, -0.1] * heads, [heads, 3])
inputs["gate"] = numbers("f", [0.5] * heads, [heads])
inputs["seed"] = numbers("q", [7], [1])
content, logsumexp = tensor(0x7E00), numbers("f", [nan] * (heads * tokens), [1, heads, tokens])
for dropout_p in (0.0, 0.5):
    problem = 1, heads, rows, columns, dim, False, 0.25, dropout_p
    slots = module.tiled_slots(problem)
    for schedule, deferred in ((0, False), (1, True)):
        saved = {"content": (*content[:4], True), "logsumexp": (*logsumexp[:4], True)}
        out = tensor(0x7E00, True)
        module.forward(problem, inputs | {"out": out} | saved, 0, device, schedule, deferred)
        if dropout_p == 0:
            assert set(memory[-1]) <= set(range(0x3FFC, 0x4005)), "a mean of equal values is that, but for rounding"
        grads = {name: tensor(0x7E00, True) for name in ("grad_q", "grad_k", "grad_v")}
        grads["sums"] = numbers("f", [nan] * (4 * heads * slots), [1, heads, slots, 4], True)
        saved = {"content": content, "logsumexp": logsumexp, "grad_out": inputs["q"]}
        module.backward(problem, inputs | grads | saved, device, schedule, deferred)
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
        ("tiled_forward.cuh", "Sum content[channels / 8"),
        ("tiled_backward.cuh", "Sum grad_k[channels / 8"),
        ("tiled_position.cuh", "Sum sums[channels / 8"),
    ],
)
def test_an_accumulator_too_few_is_caught(tmp_path, file, text):
    done = emulation.run_sanitized(SCRIPT, emulation.changed_sources(tmp_path, file, text, f"{text} - 1"))
    assert done.returncode != 0
    assert "AddressSanitizer: stack-buffer-overflow" in done.stderr, (done.returncode, done.stderr[-2000:])
