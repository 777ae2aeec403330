"""The checker is checked: each bug planted in a copy of the sources must be caught, the untouched copy must pass."""

from __future__ import annotations

import math
import re
from functools import cache

import emulation
import pytest
import torch
from reference import inputs, literal, with_gradients

from gpsa_kernels.tensors import parameter_gradients

SEED, HEAD_DIM, SCALE = 5, 48, 48**-0.5
WRONG = "a wrong result"

# (name, file, what the message must match, text, what replaces it)
# fmt: off
BUGS = {
    "whole-image forward": [
        ("missing barrier between the contractions", "position.cuh", r"race|uninitialised",
         "by_x);\n        sync_block();", "by_x);"),
        ("missing barrier after the position", "whole_image_forward.cuh", r"cp\.async into it is not waited for|race",
         "copy_wait<0>();\n        sync_block();", "copy_wait<0>();"),
        ("missing sync_warp before writing in place", "position.cuh", r"race: write",
         "        sync_warp();\n        store_line", "        store_line"),
        ("missing sync_warp before the store", "whole_image_forward.cuh", r"race: .* shared array position",
         "                sync_warp();\n                store_rows", "                store_rows"),
        ("missing cp.async wait", "whole_image_forward.cuh",
         r"read of shared array keys and values .* while a cp\.async into it is not waited for",
         "copy_wait<1>();", ""),
        ("one cp.async group too few waited for", "whole_image_forward.cuh",
         r"cp\.async into it is not waited for|ends with copies that it has not waited for",
         "copy_wait<0>();", "copy_wait<1>();"),
        ("overrun into the neighbouring array", "whole_image_forward.cuh",
         r"cp\.async of 16 bytes .* is outside of .* shared array queries",
         "row_count, row_count, head_dim", "row_count, row_count + 1, head_dim"),
        ("zero rows after the values forgotten", "whole_image_forward.cuh",
         r"read of uninitialised shared array keys and values",
         "call.v.token, tokens, keys, head_dim", "call.v.token, tokens, tokens, head_dim"),
        ("read of a row that does not exist", "whole_image_forward.cuh",
         r"read of 16 bytes outside of k|race|not waited for",
         "call.k.token, tokens, tokens, head_dim", "call.k.token, tokens + 1, tokens + 1, head_dim"),
        ("mask off by one", "whole_image_forward.cuh", WRONG, "+ i % 2 >= tokens)", "+ i % 2 > tokens)"),
        ("wrong fragment index", "tiles.cuh", WRONG,
         "at(lane() / 16 * 8 + lane() % 8, 2 * s + lane() / 8 % 2));\n    return b;",
         "at(lane() / 8 % 2 * 8 + lane() % 8, 2 * s + lane() / 16));\n    return b;"),
        ("store outside of the tokens", "tiles.cuh", r"outside of",
         "if (token < tokens && chunk * 8 + offset", "if (token < tokens + 1 && chunk * 8 + offset"),
        ("a row left unwritten", "tiles.cuh", r"96 bytes of out were never written",
         "if (token < tokens && chunk * 8 + offset", "if (token < tokens - 1 && chunk * 8 + offset"),
        ("two blocks write a row", "whole_image_forward.cuh", r"out is written twice",
         "const int first_row = block_y() * rows_per_block;", "const int first_row = 0 * rows_per_block;"),
        ("a shuffle that half a warp skips", "whole_image_forward.cuh", r"divergence: .* reached while .* is at ",
         "for (float& sum : result.sum) sum = row_sum(sum);",
         "for (float& sum : result.sum) if (lane() < 16) sum = row_sum(sum);"),
        ("a product that half a warp skips", "tiles.cuh", r"divergence: .*mma",
         "mma<E>(sums[1].values,", "if (lane() < 16) mma<E>(sums[1].values,"),
        ("a collective called by some lanes", "position.cuh", r"(divergence|deadlock).* warp\(\)",
         "store_line<E, channels>(sums, 0, axis.size, [&](int i, int chunk) { return to(i, line, chunk); });",
         "store_line<E, channels>(sums, 0, axis.size, [&](int i, int c) { return to(i, line + 0 * warp(), c); });"),
        ("a barrier that a warp never reaches", "whole_image_forward.cuh",
         r"deadlock .* threads 0-63 96-127 wait at sync_block",
         "copy_wait<0>();\n        sync_block();", "copy_wait<0>();\n        if (warp() != 2) sync_block();"),
        ("g where 1 - g belongs", "whole_image_forward.cuh", WRONG,
         "closed = sigmoid(-gate);", "closed = sigmoid(gate);"),
    ],
    "whole-image backward": [
        ("missing barrier before the tables are formed", "whole_image_backward.cuh", r"race|uninitialised",
         "            sync_block();\n            const PositionGradient", "            const PositionGradient"),
        ("missing cp.async wait of V and dO", "whole_image_backward.cuh", r"not waited for", "copy_wait<1>();", ""),
        ("missing barrier before V is mixed", "whole_image_backward.cuh", r"race|not waited for|uninitialised",
         "copy_wait<1>();\n            sync_block();", "copy_wait<1>();"),
        ("missing sync_warp between the normalisers and the means", "position.cuh", r"race|uninitialised",
         "sync_warp();  // a coordinate's normaliser", "// a coordinate's normaliser"),
        ("missing barrier between the mixes and the gradients of the tables", "whole_image_backward.cuh",
         r"race|uninitialised",
         "grad_out, mixed_v, mixed);\n            sync_block();", "grad_out, mixed_v, mixed);"),
        ("missing barrier before a warp takes its tokens of R^T dO", "whole_image_backward.cuh", r"race|uninitialised",
         "mixed, grad_position);\n            sync_block();", "mixed, grad_position);"),
        ("missing cp.async wait", "whole_image_backward.cuh", r"not waited for", "copy_wait<0>();", ""),
        ("missing barrier before the map takes its place", "whole_image_backward.cuh",
         r"race|not waited for|uninitialised",
         "copy_wait<0>();\n        sync_block();", "copy_wait<0>();"),
        ("missing barrier before dS", "whole_image_backward.cuh", r"race|uninitialised",
         "shift);\n        sync_block();", "shift);"),
        ("missing sync_warp before dS takes P's place", "whole_image_backward.cuh",
         r"race: write to shared array attention map",
         "            sync_warp();  // all lanes have their P\n", ""),
        ("missing barrier before dQ", "whole_image_backward.cuh", r"race|uninitialised",
         "(grad_x.total - delta_sum));\n        sync_block();", "(grad_x.total - delta_sum));"),
        ("missing sync_warp before a gradient is stored", "whole_image_backward.cuh",
         r"race: .* shared array queries and keys",
         "        sync_warp();\n#pragma unroll\n        for (int t = 0; t < 2; ++t) {\n            store_rows",
         "#pragma unroll\n        for (int t = 0; t < 2; ++t) {\n            store_rows"),
        ("a collective called by some lanes", "whole_image_backward.cuh", r"(divergence|deadlock).* warp\(\)",
         "store(own + i, sums[i]);", "store(to + (4 * warp() + i), sums[i]);"),
        ("wrong fragment index", "tiles.cuh", WRONG,
         "at(lane() / 16 * 8 + lane() % 8, 2 * s + lane() / 8 % 2));\n    return a;",
         "at(lane() % 16, 2 * s + lane() / 16));\n    return a;"),
        ("delta in another order", "whole_image_backward.cuh", WRONG,
         "column / 8 * 2 + column % 2;", "column % 2 * 2 + column / 8;"),
        ("rows that pad K not zeros for dQ", "whole_image_backward.cuh", WRONG,
         "i < missing * channels / 8;", "i < 0 * missing;"),
        ("rows that pad dO forgotten", "whole_image_backward.cuh",
         r"read of uninitialised shared array gradient of the output",
         "call.grad_out.token, tokens, padded, head_dim", "call.grad_out.token, tokens, tokens, head_dim"),
        ("mask of the queries off by one", "whole_image_backward.cuh", r"read of 4 bytes outside of logsumexp",
         "query < tokens ? load(logsumexp", "query <= tokens ? load(logsumexp"),
        ("1 - g missing in dK", "whole_image_backward.cuh", WRONG,
         "scale(grad_k, score_share);", "scale(grad_k, problem.scale);"),
        ("1 - g missing in dQ", "whole_image_backward.cuh", WRONG,
         "scale(grad_q, score_share);", "scale(grad_q, problem.scale);"),
        ("g where 1 - g belongs in dV", "whole_image_backward.cuh", WRONG, "closed * sum[0]", "open * sum[0]"),
        ("g taken twice in dV", "whole_image_backward.cuh", WRONG, "late * pair.high", "open * pair.high"),
        ("the positional weights along y without what is left of g", "whole_image_backward.cuh", WRONG,
         "late * grad_y.linear", "open * grad_y.linear"),
        ("1 - g missing in the gate's gradient", "whole_image_backward.cuh", WRONG, "open * closed * (", "open * ("),
        ("dV by the table instead of its transpose", "position_gradient.cuh", WRONG,
         "along_y.transposed_tile<E>(0, 0)", "along_y.tile<E>(0, 0)"),
        ("the gradient of w2 from one axis alone", "whole_image_backward.cuh", WRONG,
         "open * grad_x.square + late * grad_y.square", "open * grad_x.square"),
        ("the content left out of the gate's gradient", "whole_image_backward.cuh", WRONG,
         "grad_x.total - delta_sum", "grad_x.total"),
        ("a tile that is there already counted in the sum of delta", "whole_image_backward.cuh", WRONG,
         "if (own.counts(t)) delta_sum", "delta_sum"),
        ("a tile stored twice", "whole_image_backward.cuh", r"grad_k is written twice",
         "own.counts(t) ? tokens : 0", "tokens"),
        ("store outside of the tokens", "whole_image_backward.cuh", r"write of 16 bytes outside of grad_k",
         "own.counts(t) ? tokens : 0", "own.counts(t) ? tokens + 1 : 0"),
        ("overrun into the neighbouring array", "whole_image_backward.cuh",
         r"cp\.async of 16 bytes .* is outside of .* shared array values",
         "call.v.token, tokens, padded, head_dim", "call.v.token, tokens, padded + 1, head_dim"),
        ("a row of dQ left unwritten", "whole_image_backward.cuh", r"96 bytes of grad_q were never written",
         "write(call.grad_q, batch, head, own, tokens,", "write(call.grad_q, batch, head, own, tokens - 1,"),
    ],
    "whole-image forward, dropout": [
        ("missing sync_warp before the store", "whole_image_forward.cuh", r"race: .* shared array queries",
         "                sync_warp();\n                store_rows", "                store_rows"),
        ("missing sync_warp before the output takes Q's place", "whole_image_forward.cuh",
         r"race: write to shared array queries",
         "                sync_warp();\n                store_line", "                store_line"),
        ("the output in the place of another block's rows", "whole_image_forward.cuh", r"outside of|race",
         "store_line<E, channels>(content, row, row_count,", "store_line<E, channels>(content, token, tokens,"),
        ("the mask of the transposed scores", "whole_image_forward.cuh", WRONG,
         "dropout.keep(query, 16 * tile)", "dropout.keep_transposed(query, 16 * tile)"),
        ("the mask of another (batch, head)", "whole_image_forward.cuh", WRONG,
         "const Dropout dropout(problem, block_x());", "const Dropout dropout(problem, block_x() + 1);"),
        ("the mask of another block's queries", "whole_image_forward.cuh", WRONG, "places, token,", "places, row,"),
        ("the position of another block's queries", "whole_image_forward.cuh", WRONG,
         "dense({along_x, along_y}, token);", "dense({along_x, along_y}, row);"),
        ("what is kept not scaled up", "whole_image_forward.cuh", WRONG, "open * up};", "open};"),
        ("the last keys left out", "whole_image_forward.cuh", WRONG, "16 * tile >= tokens", "16 * tile + 16 >= tokens"),
        ("the content not normalised", "whole_image_forward.cuh", WRONG,
         "return closed * reciprocal_approx(softmax.sum[half]);", "return closed;"),
    ],
    "whole-image backward, dropout": [
        ("the mask of the untransposed scores", "whole_image_backward.cuh", WRONG,
         "mask.keep_transposed(own.first(t), 16 * tile)", "mask.keep_transposed(16 * tile, own.first(t))"),
        ("the mask of another (batch, head)", "whole_image_backward.cuh", WRONG,
         "const Mask mask(problem, block_x());", "const Mask mask(problem, block_x() + 1);"),
        ("dP without the mask", "whole_image_backward.cuh", WRONG,
         "                            grad = factor * grad;\n", ""),
        ("P with the signs that tell the mask", "whole_image_backward.cuh", WRONG,
         "word &= 0x7fff7fffu;", "word &= ~0u;"),
        ("a tile that is there already counted in the positional sums", "whole_image_backward.cuh", WRONG,
         "counts(own.counts(1) ? 1.0f : 0.0f)", "counts(1.0f)"),
        ("the mean of d^2 along one axis alone", "whole_image_backward.cuh", WRONG,
         "load(means_x + (2 * from.x + 1)) + load(means_y + (2 * from.y + 1))", "load(means_x + (2 * from.x + 1))"),
    ],
    "tiled": [
        ("missing barrier before the next keys", "tiled_forward.cuh", r"race|cp\.async into it is not waited for",
         "copy_wait<0>();\n                sync_block();\n                key_stage",
         "copy_wait<0>();\n                key_stage"),
        ("missing wait for the next keys", "tiled_forward.cuh", r"cp\.async into it is not waited for",
         "copy_wait<0>();\n                sync_block();\n                key_stage",
         "sync_block();\n                key_stage"),
        ("missing sync_warp before the queries are written over", "tiled_forward.cuh",
         r"race: write to shared array queries",
         "if constexpr (!has_dropout) {\n            sync_warp();", "if constexpr (!has_dropout) {"),
        ("a collective called by some lanes of the forward kernel", "tiles.cuh", r"(divergence|deadlock).* warp\(\)",
         "store(to + token, (shift", "store(to + (token + 0 * warp()), (shift"),
        ("a collective called by some lanes of the backward kernels", "tiled_rows.cuh",
         r"(divergence|deadlock).* warp\(\)",
         "store(own + n, sum);", "store(partial + (count * warp() + n), sum);"),
        ("a row of the position read by one thread and written over by another", "tiled_rows.cuh",
         r"write to out .* read by another thread",
         "const int row = (32 * turn + lane()) / beside,", "const int row = (32 * turn + 31 - lane()) / beside,"),
        ("a launch that reads what it writes", "tiled_forward.cuh",
         r"read of out (before it is written|in the launch that writes it)",
         "statistics, mixed, call.out, {}", "statistics, call.out, call.out, {}"),
        ("mask of the last keys off by one", "tiled_forward.cuh", WRONG, "+ i % 2 >= keys)", "+ i % 2 > keys)"),
        ("what was summed before not rescaled", "tiled_forward.cuh", WRONG,
         "content[n].values[2 * half + i] *= rescale;", "content[n].values[2 * half + i] *= 1;"),
        ("position without its gate", "tiled_forward.cuh", WRONG,
         "+ open * p;", "+ p;"),
        ("a line's last coordinates left out", "tiled_position.cuh", WRONG,
         "tile < lines.tiles() && start + 16 * tile < lines.size;",
         "tile < lines.tiles() && start + 16 * tile + 16 <= lines.size;"),
        ("a line's row left unwritten", "tiled_position.cuh", r"read of workspace array 1 before it is written",
         "first, lines.size, 0, head_dim,", "first, lines.size - 1, 0, head_dim,"),
        ("transposed where it must not be", "tiled_position.cuh", WRONG,
         "entry = axis.entry(i, j, normaliser);", "entry = axis.entry(j, i, normaliser);"),
        ("a mean forgotten", "tiled_position.cuh", WRONG, "linear += share * (d - mean);", "linear += share * d;"),
        ("a slot left unwritten", "tiled_backward.cuh", r"sums is written twice|never written|read by another",
         "slot_x = slot_y + along_y.blocks();", "slot_x = slot_y + along_y.blocks() - 1;"),
        ("content overwritten before all have read it", "tiled_backward.cuh", r"race: write to shared array values",
         "        sync_block();  // all have read the content\n", ""),
        ("delta forgotten", "tiled_backward.cuh", WRONG,
         "weights[t][n].values[i] *= grad_weights[t][n].values[i] - delta[n][i % 2];",
         "weights[t][n].values[i] *= grad_weights[t][n].values[i];"),
        ("numbers of queries stored a tile late", "tiled_backward.cuh", r"race|uninitialised",
         "store_number(number, stage ^ 1);", "store_number(number, stage);"),
        ("the content's gate forgotten in one gradient", "tiled_backward.cuh", WRONG,
         "(sums, closed * problem.scale);", "(sums, problem.scale);"),
        ("g taken twice in dV", "tiled_backward.cuh", WRONG,
         "+ late * positional[n].values[i];", "+ open * positional[n].values[i];"),
        ("g taken twice in the gradients of weights", "tiled_position.cuh", WRONG,
         "along_x ? open / early(call) : open;", "open;"),
        ("1 - g missing in the content's part of the gate's gradient", "tiled_backward.cuh", WRONG,
         "(n < 3 ? open : open * closed)", "open"),
    ],
    "tiled, dropout": [
        ("a mask for the content alone", "tiled_forward.cuh", WRONG,
         "entries[m].values[i] = kept ? entry : 0;", "entries[m].values[i] = entry;"),
        ("another mask backward", "tiled_backward.cuh", WRONG,
         "dropout.keep_transposed(query, key)", "dropout.keep(query, key)"),
    ],
}
# fmt: on

BOTH, FORWARD, BACKWARD = slice(None), slice(1), slice(1, None)
KERNELS = {  # the grid, the probability of dropout, how many schedules, which of the result and the gradients
    "whole-image forward": ((5, 9), 0.0, 3, FORWARD),
    "whole-image backward": ((5, 9), 0.0, 3, BACKWARD),
    "whole-image forward, dropout": ((5, 9), 0.3, 3, FORWARD),
    "whole-image backward, dropout": ((5, 9), 0.3, 3, BACKWARD),
    "tiled": ((3, 23), 0.0, 2, BOTH),  # two tiles of tokens, the last of them partial; two of coordinates along x
    "tiled, dropout": ((3, 23), 0.25, 2, BOTH),
}


def build(csrc):
    return emulation.load(emulation.build(csrc, ("-DGPSA_ONE_KERNEL", "-O1")))


def problem(grid_size):
    tensors = [t.detach() for t in inputs(1, 1, grid_size, HEAD_DIM, torch.float16)]
    return tensors, torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).half()


def branch_by_branch(q, k, v, pos_weight, gate, grid_size, scale, mask, dropout_p):
    """The formula without its division by a sum of 1, as the tiled kernels add it up."""
    eye = torch.eye(q.size(2), dtype=q.dtype).expand(*q.shape[:2], -1, -1)
    logits = (torch.full_like(gate, logit) for logit in (-math.inf, math.inf))
    content, position = (literal(q, k, eye, pos_weight, logit, grid_size, scale) for logit in logits)
    g = torch.sigmoid(gate).view(-1, 1, 1)
    return (((1 - g) * content + g * position) * mask / (1 - dropout_p)) @ v


@cache
def formula(kernels, dtype):
    """What the kernels give, every step in a dtype."""
    grid_size, dropout_p, _, given = KERNELS[kernels]
    tensors, grad_out = problem(grid_size)
    arguments = [t.to(dtype) for t in tensors], grad_out.to(dtype), grid_size, SCALE
    mask = emulation.masks(tensors[0], grid_size, dropout_p, SEED)
    function = branch_by_branch if kernels.startswith("tiled") else literal
    return with_gradients(function, *arguments, mask, dropout_p)[given]


def results(kernels, **settings):
    grid_size, dropout_p, _, given = KERNELS[kernels]
    tensors, grad_out = problem(grid_size)
    settings |= {"dropout_p": dropout_p, "dropout_seed": SEED}
    if given == BACKWARD:
        saved = {"logsumexp": (SCALE * tensors[0].double() @ tensors[1].double().mT).logsumexp(-1).float()}
    else:
        row_blocks = 2 if given == FORWARD else 0
        done = emulation.forward(tensors, grid_size, SCALE, save=given == BOTH, row_blocks=row_blocks, **settings)
        out, saved = done.tensors.pop("out"), done.tensors
        if given == FORWARD:
            return [out]
    *grads, sums = emulation.backward(grad_out, tensors, saved, grid_size, SCALE, **settings).tensors.values()
    grads += parameter_gradients(sums, *tensors[3:])
    return grads if given == BACKWARD else [out, *grads]


def run(kernels, **settings):
    """What is wrong, or None."""
    try:
        ours = results(kernels, **settings)
    except RuntimeError as error:
        return str(error)
    for got, expected, low in zip(ours, formula(kernels, torch.float64), formula(kernels, torch.float16), strict=True):
        allowed = 2 * (low - expected).abs().max()
        if kernels.startswith("tiled"):
            allowed += 2 * torch.finfo(torch.float16).eps * expected.abs().max()
        if not (got.double() - expected).abs().max() <= allowed:
            return WRONG
    return None


def settings(kernels):
    """Every schedule, not only a lucky one."""
    return [{"schedule": n, "deferred_copies": late} for n in range(KERNELS[kernels][2]) for late in (False, True)]


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_untouched_sources_pass(kernels):
    module = build(emulation.ROOT / "csrc")
    assert {run(kernels, module=module, **how) for how in settings(kernels)} == {None}


@pytest.mark.parametrize(
    ("kernels", "bug"), [pytest.param(k, bug, id=f"{k}: {bug[0]}") for k, bugs in BUGS.items() for bug in bugs]
)
def test_a_planted_bug_is_caught(tmp_path, kernels, bug):
    _, file, message, text, replacement = bug
    module = build(emulation.changed_sources(tmp_path, file, text, replacement))
    for how in settings(kernels):
        found = run(kernels, module=module, **how)
        assert found is not None, how
        assert re.search(message, found), (how, found)
