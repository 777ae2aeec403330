"""The emulated kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import emulation
import pytest

# without torch, which the sanitizers would only slow down
SCRIPT = """
import array, importlib.util, math, sys
spec = importlib.util.spec_from_file_location("gpsa_emulated", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
heads, rows, columns, dim = 2, 3, 7, 40
tokens = rows * columns
shape = [1, heads, tokens, dim]
strides = [heads * tokens * dim, tokens * dim, dim, 1]

def halves(value):
    return array.array("H", [value] * (heads * tokens * dim))

def tensor(memory, output=False):
    return memory.buffer_info()[0], 2, shape, strides, output

def floats(memory, shape, strides, output=False):
    return memory.buffer_info()[0], 4, shape, strides, output

q, k, v, out = halves(0x3C00), halves(0x3800), halves(0x4000), halves(0xFFFF)  # 1, 0.5, 2, NaN
weights, gate = array.array("f", [0.3, -0.2, -0.1] * heads), array.array("f", [0.5] * heads)
inputs = {"q": tensor(q), "k": tensor(k), "v": tensor(v)}
inputs |= {"pos_weight": floats(weights, [heads, 3], [3, 1]), "gate": floats(gate, [heads], [1])}
problem, device = (1, heads, rows, columns, dim, False, 0.25), (132, 227 * 1024)

grads = {name: halves(0xFFFF) for name in ("grad_q", "grad_k", "grad_v")}
sums = array.array("f", [float("nan")] * (4 * heads))
logsumexp = array.array("f", [0.25 * dim * 0.5 + math.log(tokens)] * (heads * tokens))  # of equal scores
seed_of_dropout = array.array("q", [5])
inputs["seed"] = seed_of_dropout.buffer_info()[0], 8, [1], [1], False
backward_inputs = {"grad_out": tensor(q)}
backward_inputs["logsumexp"] = floats(logsumexp, [1, heads, tokens], [heads * tokens, tokens, 1])
outputs = {name: tensor(memory, True) for name, memory in grads.items()}
outputs["sums"] = floats(sums, [1, heads, 1, 4], [4 * heads, 4, 4, 1], True)

for schedule in (0, 1):
    for deferred in (False, True):
        for dropout_p in (0.3, 0.0):
            out[:] = halves(0xFFFF)
            module.forward((*problem, dropout_p), inputs | {"out": tensor(out, True)}, 2, device, schedule, deferred)
        assert set(out) <= set(range(0x3FFE, 0x4003)), "a mean of equal values is that value, but for rounding"
        for dropout_p in (0.0, 0.3):
            module.backward((*problem, dropout_p), inputs | backward_inputs | outputs, device, schedule, deferred)
            assert all(map(math.isfinite, sums))
        assert sum(grads["grad_v"]) > 0
print("done")
"""


def test_the_kernels_are_clean():
    done = emulation.run_sanitized(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("whole_image_forward.cuh", "Sum scores[2 * key_tiles"),
        ("whole_image_backward.cuh", "Sum grad_k[2][channels / 8"),
    ],
)
def test_an_accumulator_too_few_is_caught(tmp_path, file, text):
    done = emulation.run_sanitized(SCRIPT, emulation.changed_sources(tmp_path, file, text, f"{text} - 1"))
    assert done.returncode != 0
    assert "AddressSanitizer: stack-buffer-overflow" in done.stderr
