"""The checker is checked: each bug planted in a copy of the sources must be caught, the untouched copy must pass."""

from __future__ import annotations

import re
import shutil

import emulation
import pytest
import torch
from reference import inputs, literal

GRID_SIZE, HEAD_DIM = (5, 9), 48
SETTINGS = [{"seed": seed, "deferred_copies": deferred} for seed in (0, 1, 2) for deferred in (False, True)]

# name: (file, text, what replaces it, what the message must match; None: nothing but a wrong result)
BUGS = {
    "missing barrier between the contractions": (
        "position.cuh",
        "by_x);\n        sync_block();",
        "by_x);",
        r"race|uninitialised",
    ),
    "missing barrier after the position": (
        "whole_image_forward.cuh",
        "copy_wait<0>();\n        sync_block();",
        "copy_wait<0>();",
        r"cp\.async into it is not waited for|race",
    ),
    "missing sync_warp before writing in place": (
        "position.cuh",
        "        sync_warp();\n        store_line",
        "        store_line",
        r"race: write",
    ),
    "missing sync_warp before the store": (
        "whole_image_forward.cuh",
        "            sync_warp();\n",
        "",
        r"race: .* shared array position",
    ),
    "missing cp.async wait": (
        "whole_image_forward.cuh",
        "copy_wait<1>();",
        "",
        r"read of shared array keys and values .* while a cp\.async into it is not waited for",
    ),
    "one cp.async group too few waited for": (
        "whole_image_forward.cuh",
        "copy_wait<0>();",
        "copy_wait<1>();",
        r"cp\.async into it is not waited for|ends with copies that it has not waited for",
    ),
    "overrun into the neighbouring array": (
        "whole_image_forward.cuh",
        "row_count, row_count, head_dim",
        "row_count, row_count + 1, head_dim",
        r"cp\.async of 16 bytes .* is outside of .* shared array queries",
    ),
    "zero rows after the values forgotten": (
        "whole_image_forward.cuh",
        "call.v.token, tokens, keys, head_dim",
        "call.v.token, tokens, tokens, head_dim",
        r"read of uninitialised shared array keys and values",
    ),
    "read of a row that does not exist": (
        "whole_image_forward.cuh",
        "call.k.token, tokens, tokens, head_dim",
        "call.k.token, tokens + 1, tokens + 1, head_dim",
        r"read of 16 bytes outside of k|race|not waited for",
    ),
    "mask off by one": (
        "whole_image_forward.cuh",
        "+ i % 2 >= tokens)",
        "+ i % 2 > tokens)",
        None,
    ),
    "wrong fragment index": (
        "tiles.cuh",
        "at(lane() / 16 * 8 + lane() % 8, 2 * s + lane() / 8 % 2)",
        "at(lane() / 8 % 2 * 8 + lane() % 8, 2 * s + lane() / 16)",
        None,
    ),
    "store outside of the tokens": (
        "whole_image_forward.cuh",
        "if (token < tokens && chunk * 8 < head_dim) {",
        "if (token < tokens + 1 && chunk * 8 < head_dim) {",
        r"outside of",
    ),
    "a row left unwritten": (
        "whole_image_forward.cuh",
        "if (token < tokens && chunk * 8 < head_dim) {",
        "if (token < tokens - 1 && chunk * 8 < head_dim) {",
        r"96 bytes of out were never written",
    ),
    "two blocks write a row": (
        "whole_image_forward.cuh",
        "const int first_row = block_y() * part_rows;",
        "const int first_row = 0 * part_rows;",
        r"out is written twice",
    ),
    "a shuffle that half a warp skips": (
        "whole_image_forward.cuh",
        "for (float& sum : result.sum) sum = row_sum(sum);",
        "for (float& sum : result.sum) if (lane() < 16) sum = row_sum(sum);",
        r"divergence: .* reached while .* is at ",
    ),
    "a barrier that a warp never reaches": (
        "whole_image_forward.cuh",
        "copy_wait<0>();\n        sync_block();",
        "copy_wait<0>();\n        if (warp() != 2) sync_block();",
        r"deadlock .* threads 0-63 96-127 wait at sync_block",
    ),
    "1 - g where g belongs": (
        "whole_image_forward.cuh",
        "const float open = sigmoid(gate), closed = sigmoid(-gate);",
        "const float open = sigmoid(-gate), closed = sigmoid(gate);",
        None,
    ),
}


def build(tmp_path, file=None, text=None, replacement=None):
    """The kernels of a copy of csrc/ in which one text is replaced."""
    csrc = tmp_path / "csrc"
    shutil.copytree(emulation.ROOT / "csrc", csrc)
    if file is not None:
        source = (csrc / file).read_text()
        assert source.count(text) == 1, f"{text!r} occurs {source.count(text)} times in {file}"
        (csrc / file).write_text(source.replace(text, replacement))
    return emulation.load(emulation.build(csrc, ("-DGPSA_ONE_KERNEL", "-O1")))


def run(module, **settings):
    """What is wrong, or None."""
    tensors = [t.detach() for t in inputs(1, 1, GRID_SIZE, HEAD_DIM, torch.float16)]
    scale = HEAD_DIM**-0.5
    try:
        out = emulation.forward(*tensors, GRID_SIZE, scale, parts=2, module=module, **settings).out
    except RuntimeError as error:
        return str(error)
    expected = literal(*(t.double() for t in tensors), GRID_SIZE, scale)
    eager = literal(*tensors, GRID_SIZE, scale)
    wrong = not (out.double() - expected).abs().max() <= 2 * (eager - expected).abs().max()
    return "a wrong result" if wrong else None


def test_the_untouched_sources_pass(tmp_path):
    module = build(tmp_path)
    assert [run(module, **settings) for settings in SETTINGS] == [None] * len(SETTINGS)


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(tmp_path, name):
    file, text, replacement, message = BUGS[name]
    module = build(tmp_path, file, text, replacement)
    for settings in SETTINGS:  # under every schedule, not only under a lucky one
        found = run(module, **settings)
        assert found is not None, settings
        assert re.search("a wrong result" if message is None else message, found), (settings, found)
