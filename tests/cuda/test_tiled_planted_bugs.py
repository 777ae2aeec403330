"""The checker is checked on the tiled kernels: each bug planted in a copy of the sources must be caught."""

from __future__ import annotations

import re

import emulation
import pytest
import torch
from dropped import dropped_out, masks
from reference import inputs, with_gradients

GRID_SIZE, HEAD_DIM = (3, 23), 48  # two tiles of tokens, the last of them partial; two of coordinates along x
SETTINGS = [{"schedule": schedule, "deferred_copies": deferred} for schedule in (0, 1) for deferred in (False, True)]
NO_DROPOUT, DROPOUT = 0.0, 0.25

# name: (file, text, what replaces it, what the message must match; None: nothing but a wrong result, dropout_p)
BUGS = {
    "missing barrier before the next tile of keys": (
        "tiled_forward.cuh",
        "copy_wait<0>();\n                sync_block();\n                key_stage",
        "copy_wait<0>();\n                key_stage",
        r"race|cp\.async into it is not waited for",
        NO_DROPOUT,
    ),
    "missing wait for the next tile of keys": (
        "tiled_forward.cuh",
        "copy_wait<0>();\n                sync_block();\n                key_stage",
        "sync_block();\n                key_stage",
        r"cp\.async into it is not waited for",
        NO_DROPOUT,
    ),
    "missing sync_warp before the queries are written over": (
        "tiled_forward.cuh",
        "if constexpr (!has_dropout) {\n            sync_warp();",
        "if constexpr (!has_dropout) {",
        r"race: write to shared array queries",
        NO_DROPOUT,
    ),
    "a collective called by some lanes of the forward kernel": (
        "tiles.cuh",
        "store(to + token, (shift",
        "store(to + (token + 0 * warp()), (shift",
        r"(divergence|deadlock).* warp\(\)",
        NO_DROPOUT,
    ),
    "a collective called by some lanes of the backward kernels": (
        "tiled_rows.cuh",
        "store(own + n, sum);",
        "store(partial + (count * warp() + n), sum);",
        r"(divergence|deadlock).* warp\(\)",
        NO_DROPOUT,
    ),
    "a row of the position read by one thread and written over by another": (
        "tiled_rows.cuh",
        "const int row = (32 * turn + lane()) / beside,",
        "const int row = (32 * turn + 31 - lane()) / beside,",
        r"write to out .* read by another thread",
        NO_DROPOUT,
    ),
    "a launch that reads what it writes": (
        "tiled_forward.cuh",
        "statistics, mixed, call.out, {}",
        "statistics, call.out, call.out, {}",
        r"read of out (before it is written|in the launch that writes it)",
        NO_DROPOUT,
    ),
    "mask of the last keys off by one": (
        "tiled_forward.cuh",
        "+ i % 2 >= keys)",
        "+ i % 2 > keys)",
        None,
        NO_DROPOUT,
    ),
    "what was summed before not rescaled": (
        "tiled_forward.cuh",
        "content[n].values[2 * half + i] *= rescale;",
        "content[n].values[2 * half + i] *= 1;",
        None,
        NO_DROPOUT,
    ),
    "position without its gate": (
        "tiled_forward.cuh",
        "+ open * p;",
        "+ p;",
        None,
        NO_DROPOUT,
    ),
    "a mask for the content alone": (
        "tiled_forward.cuh",
        "entries[m].values[i] = kept ? entry : 0;",
        "entries[m].values[i] = entry;",
        None,
        DROPOUT,
    ),
    "a line's last coordinates left out": (
        "tiled_position.cuh",
        "tile < lines.tiles() && start + 16 * tile < lines.size;",
        "tile < lines.tiles() && start + 16 * tile + 16 <= lines.size;",
        None,
        NO_DROPOUT,
    ),
    "a line's row left unwritten": (
        "tiled_position.cuh",
        "first, lines.size, 0, head_dim,",
        "first, lines.size - 1, 0, head_dim,",
        r"read of workspace array 1 before it is written",
        NO_DROPOUT,
    ),
    "transposed where it must not be": (
        "tiled_position.cuh",
        "entry = axis.entry(i, j, normaliser);",
        "entry = axis.entry(j, i, normaliser);",
        None,
        NO_DROPOUT,
    ),
    "a mean forgotten": (
        "tiled_position.cuh",
        "linear += share * (d - mean);",
        "linear += share * d;",
        None,
        NO_DROPOUT,
    ),
    "a slot left unwritten": (
        "tiled_backward.cuh",
        "slot_x = slot_y + along_y.blocks();",
        "slot_x = slot_y + along_y.blocks() - 1;",
        r"sums is written twice|never written|read by another",
        NO_DROPOUT,
    ),
    "content overwritten before all have read it": (
        "tiled_backward.cuh",
        "        sync_block();  // all have read the content\n",
        "",
        r"race: write to shared array values",
        NO_DROPOUT,
    ),
    "delta forgotten": (
        "tiled_backward.cuh",
        "weights[t][n].values[i] *= grad_weights[t][n].values[i] - delta[n][i % 2];",
        "weights[t][n].values[i] *= grad_weights[t][n].values[i];",
        None,
        NO_DROPOUT,
    ),
    "numbers of queries stored a tile late": (
        "tiled_backward.cuh",
        "store_number(number, stage ^ 1);",
        "store_number(number, stage);",
        r"race|uninitialised",
        NO_DROPOUT,
    ),
    "the content's gate forgotten in one gradient": (
        "tiled_backward.cuh",
        "(sums, closed * problem.scale);",
        "(sums, problem.scale);",
        None,
        NO_DROPOUT,
    ),
    "g taken twice in dV": (
        "tiled_backward.cuh",
        "+ late * positional[n].values[i];",
        "+ open * positional[n].values[i];",
        None,
        NO_DROPOUT,
    ),
    "g taken twice in the gradients of weights": (
        "tiled_position.cuh",
        "along_x ? open / early(call) : open;",
        "open;",
        None,
        NO_DROPOUT,
    ),
    "1 - g missing in the content's part of the gate's gradient": (
        "tiled_backward.cuh",
        "(n < 3 ? open : open * closed)",
        "open",
        None,
        NO_DROPOUT,
    ),
    "another mask backward": (
        "tiled_backward.cuh",
        "dropout.keep_transposed(query, key)",
        "dropout.keep(query, key)",
        None,
        DROPOUT,
    ),
}


def build(csrc):
    return emulation.load(emulation.build(csrc, ("-DGPSA_ONE_KERNEL", "-O1")))


@pytest.fixture(scope="module")
def results():
    """Inputs, the formula's results in float64, and in float16, by dropout_p."""
    tensors, scale = inputs(1, 1, GRID_SIZE, HEAD_DIM, torch.float16), HEAD_DIM**-0.5
    grad_out = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).half()
    found = {}
    for dropout_p in (NO_DROPOUT, DROPOUT):
        settings = GRID_SIZE, scale, masks(tensors[0], GRID_SIZE, dropout_p, 5), dropout_p
        truth = with_gradients(dropped_out, [t.double() for t in tensors], grad_out.double(), *settings)
        eager = with_gradients(dropped_out, tensors, grad_out, *settings)
        found[dropout_p] = tensors, grad_out, truth, eager
    return found


def run(module, results, dropout_p, **settings):
    """What is wrong, or None."""
    tensors, grad_out, truth, eager = results[dropout_p]
    options = settings | {"dropout_p": dropout_p, "dropout_seed": 5, "module": module}
    try:
        got = with_gradients(emulation.tiled_attention, tensors, grad_out, GRID_SIZE, HEAD_DIM**-0.5, **options)
    except RuntimeError as error:
        return str(error)
    for result, expected, low in zip(got, truth, eager, strict=True):
        allowed = 2 * (low - expected).abs().max() + 2 * torch.finfo(torch.float16).eps * expected.abs().max()
        if not (result.double() - expected).abs().max() <= allowed:
            return "a wrong result"
    return None


def test_the_untouched_sources_pass(results):
    module = build(emulation.ROOT / "csrc")
    for dropout_p in (NO_DROPOUT, DROPOUT):
        assert [run(module, results, dropout_p, **settings) for settings in SETTINGS] == [None] * len(SETTINGS)


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(tmp_path, results, name):
    file, text, replacement, message, dropout_p = BUGS[name]
    module = build(emulation.changed_sources(tmp_path, file, text, replacement))
    for settings in SETTINGS:  # under every schedule, not only under a lucky one
        found = run(module, results, dropout_p, **settings)
        assert found is not None, settings
        assert re.search("a wrong result" if message is None else message, found), (settings, found)
