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
        ("missing barrier between the contractions", "whole_image_position.cuh", r"race|uninitialised",
         "by_x);\n        sync_block();", "by_x);"),
        ("missing barrier after the position", "whole_image_forward.cu", r"cp\.async into it is not waited for|race",
         "copy_wait<0>();\n        sync_block();", "copy_wait<0>();"),
        ("missing sync_warp before writing in place", "whole_image_position.cuh", r"race: write",
         "        sync_warp();\n        stage_rows", "        stage_rows"),
        ("missing sync_warp before the store", "whole_image_forward.cu", r"race: .* shared array position",
         "                sync_warp();\n                store_rows", "                store_rows"),
        ("missing cp.async wait", "whole_image_forward.cu",
         r"read of shared array keys and values .* while a cp\.async into it is not waited for",
         "copy_wait<1>();", ""),
        ("one cp.async group too few waited for", "whole_image_forward.cu",
         r"cp\.async into it is not waited for|ends with copies that it has not waited for",
         "copy_wait<0>();", "copy_wait<1>();"),
        ("overrun into the neighbouring array", "whole_image_forward.cu",
         r"cp\.async of 16 bytes .* is outside of .* shared array queries",
         "row_count, row_count, head_dim", "row_count, row_count + 1, head_dim"),
        ("zero rows after the values forgotten", "whole_image_forward.cu",
         r"read of uninitialised shared array keys and values",
         "call.v.token, tokens, keys, head_dim", "call.v.token, tokens, tokens, head_dim"),
        ("read of a row that does not exist", "whole_image_forward.cu",
         r"read of 16 bytes outside of k|race|not waited for",
         "call.k.token, tokens, tokens, head_dim", "call.k.token, tokens + 1, tokens + 1, head_dim"),
        ("mask off by one", "whole_image_forward.cu", WRONG, "mask_keys<last>(scores, tokens);",
         "mask_keys<last>(scores, tokens + 1);"),
        ("wrong fragment index", "tiles.cuh", WRONG,
         "at(lane() / 16 * 8 + lane() % 8, 2 * s + lane() / 8 % 2));\n    return b;",
         "at(lane() / 8 % 2 * 8 + lane() % 8, 2 * s + lane() / 16));\n    return b;"),
        ("store outside of the tokens", "tiles.cuh", r"outside of",
         "if (token < tokens && chunk * 8 + offset", "if (token < tokens + 1 && chunk * 8 + offset"),
        ("a row left unwritten", "tiles.cuh", r"96 bytes of out were never written",
         "if (token < tokens && chunk * 8 + offset", "if (token < tokens - 1 && chunk * 8 + offset"),
        ("two blocks write a row", "whole_image_forward.cu", r"out is written twice",
         "const int first_row = block_y() * most_rows;", "const int first_row = 0 * most_rows;"),
        ("a shuffle that half a warp skips", "whole_image_forward.cu", r"divergence: .* reached while .* is at ",
         "for (float& s : sum) s = sum_of_lanes<4>(s);",
         "for (float& s : sum) if (lane() < 16) s = sum_of_lanes<4>(s);"),
        ("a product that half a warp skips", "tiles.cuh", r"divergence: .*mma",
         "mma<E>(sums[1].values,", "if (lane() < 16) mma<E>(sums[1].values,"),
        ("a collective called by some lanes", "whole_image_position.cuh", r"(divergence|deadlock).* warp\(\)",
         "stage_rows<E, channels>(sums, 0, axis.size, [&](int i, int chunk) { return to(i, line, chunk); });",
         "stage_rows<E, channels>(sums, 0, axis.size, [&](int i, int c) { return to(i, line + 0 * warp(), c); });"),
        ("a barrier that a warp never reaches", "whole_image_forward.cu",
         r"deadlock .* threads 0-63 96-127 wait at sync_block",
         "copy_wait<0>();\n        sync_block();", "copy_wait<0>();\n        if (warp() != 2) sync_block();"),
        ("g where 1 - g belongs", "whole_image_forward.cu", WRONG,
         "closed = sigmoid(-gate);", "closed = sigmoid(gate);"),
    ],
    "whole-image backward": [
        ("missing barrier before the tables are formed", "whole_image_backward.cu", r"race|uninitialised",
         "            sync_block();\n            const PositionGradient", "            const PositionGradient"),
        ("missing cp.async wait of V and dO", "whole_image_backward.cu", r"not waited for", "copy_wait<1>();", ""),
        ("missing barrier before V is mixed", "whole_image_backward.cu", r"race|not waited for|uninitialised",
         "copy_wait<1>();\n            sync_block();", "copy_wait<1>();"),
        ("missing barrier between the mixes and the gradients of the tables", "whole_image_backward.cu",
         r"race|uninitialised",
         "grad_out, mixed_v, mixed);\n            sync_block();", "grad_out, mixed_v, mixed);"),
        ("missing barrier before a warp takes its tokens of R^T dO", "whole_image_backward.cu", r"race|uninitialised",
         "mixed, grad_position);\n            sync_block();", "mixed, grad_position);"),
        ("missing cp.async wait", "whole_image_backward.cu", r"not waited for", "copy_wait<0>();", ""),
        ("missing barrier before the map takes its place", "whole_image_backward.cu",
         r"race|not waited for|uninitialised",
         "copy_wait<0>();\n        sync_block();", "copy_wait<0>();"),
        ("missing barrier before dS", "whole_image_backward.cu", r"race|uninitialised",
         "shift);\n        sync_block();", "shift);"),
        ("missing sync_warp before dS takes P's place", "whole_image_backward.cu",
         r"race: write to shared array attention map",
         "            sync_warp();  // all lanes have their P\n", ""),
        ("missing barrier before dQ", "whole_image_backward.cu", r"race|uninitialised",
         "(sums[3] - delta_sum)});\n        sync_block();", "(sums[3] - delta_sum)});"),
        ("missing sync_warp before a gradient is stored", "whole_image_backward.cu",
         r"race: .* shared array queries and keys",
         "sync_warp();\n#pragma unroll\n            for (int t = 0; t < 2; ++t) {\n                const int end",
         "\n#pragma unroll\n            for (int t = 0; t < 2; ++t) {\n                const int end"),
        ("a collective called by some lanes", "tiles.cuh", r"(divergence|deadlock).* warp\(\)",
         "store(own + n, sums[n]);", "store(partial + (count * warp() + n), sums[n]);"),
        ("wrong fragment index", "tiles.cuh", WRONG,
         "at(lane() / 16 * 8 + lane() % 8, 2 * s + lane() / 8 % 2));\n    return a;",
         "at(lane() % 16, 2 * s + lane() / 16));\n    return a;"),
        ("delta in another order", "whole_image_backward.cu", WRONG,
         "column / 8 * 2 + column % 2;", "column % 2 * 2 + column / 8;"),
        ("rows that pad K not zeros for dQ", "whole_image_backward.cu", WRONG,
         "i < missing * channels / 8;", "i < 0 * missing;"),
        ("rows that pad dO forgotten", "whole_image_backward.cu",
         r"read of uninitialised shared array gradient of the output",
         "call.grad_out.token, tokens, padded, head_dim", "call.grad_out.token, tokens, tokens, head_dim"),
        ("mask of the queries off by one", "whole_image_backward.cu", r"read of 4 bytes outside of logsumexp",
         "query < tokens ? load(logsumexp", "query <= tokens ? load(logsumexp"),
        ("1 - g missing in dK", "whole_image_backward.cu", WRONG,
         "scale_own(grad_k);", "for (auto& tile : grad_k) scale<channels / 8>(tile, problem.scale);"),
        ("1 - g missing in dQ", "whole_image_backward.cu", WRONG,
         "scale_own(grad_q);", "for (auto& tile : grad_q) scale<channels / 8>(tile, problem.scale);"),
        ("g where 1 - g belongs in dV", "whole_image_backward.cu", WRONG, "closed * sum[0]", "open * sum[0]"),
        ("g taken twice in dV", "whole_image_backward.cu", WRONG, "late * pair.high", "open * pair.high"),
        ("the positional weights along y without what is left of g", "whole_image_backward.cu", WRONG,
         "late * sums[1]", "open * sums[1]"),
        ("1 - g missing in the gate's gradient", "whole_image_backward.cu", WRONG, "open * closed * (", "open * ("),
        ("dV by the table instead of its transpose", "whole_image_position.cuh", WRONG,
         "along_y.transposed_tile<E>(1)", "along_y.tile<E>(0, 0)"),
        ("the gradient of w2 from one axis alone", "whole_image_position.cuh", WRONG,
         "early * x.square + y.square", "early * x.square"),
        ("the content left out of the gate's gradient", "whole_image_backward.cu", WRONG,
         "sums[3] - delta_sum", "sums[3]"),
        ("a tile that is there already counted in the sum of delta", "whole_image_backward.cu", WRONG,
         "if (own.counts(t)) delta_sum", "delta_sum"),
        ("a tile stored twice", "whole_image_backward.cu", r"grad_k is written twice",
         "own.counts(t) ? tokens : 0", "tokens"),
        ("store outside of the tokens", "whole_image_backward.cu", r"write of 16 bytes outside of grad_k",
         "own.counts(t) ? tokens : 0", "own.counts(t) ? tokens + 1 : 0"),
        ("overrun into the neighbouring array", "whole_image_backward.cu",
         r"cp\.async of 16 bytes .* is outside of .* shared array values",
         "call.v.token, tokens, padded, head_dim", "call.v.token, tokens, padded + 1, head_dim"),
        ("a row left unwritten", "whole_image_backward.cu", r"96 bytes of grad_. were never written",
         "end, head_dim, at);", "end - 1, head_dim, at);"),
    ],
    "whole-image forward, dropout": [
        ("missing sync_warp before the store", "whole_image_forward.cu", r"race: .* shared array queries",
         "                sync_warp();\n                store_rows", "                store_rows"),
        ("missing sync_warp before the output takes Q's place", "whole_image_forward.cu",
         r"race: write to shared array queries",
         "                sync_warp();\n                stage_rows", "                stage_rows"),
        ("the output in the place of another block's rows", "whole_image_forward.cu", r"outside of|race",
         "stage_rows<E, channels>(content, row, row_count,", "stage_rows<E, channels>(content, token, tokens,"),
        ("the mask of the transposed scores", "whole_image_forward.cu", WRONG,
         "dropout.keep(token, 16 * tile)", "dropout.keep_transposed(token, 16 * tile)"),
        ("the mask of another (batch, head)", "whole_image_forward.cu", WRONG,
         "const Dropout dropout(problem, block_x());", "const Dropout dropout(problem, block_x() + 1);"),
        ("the mask of another block's queries", "whole_image_forward.cu", WRONG,
         "dropout.keep(token, 16 * tile)", "dropout.keep(row, 16 * tile)"),
        ("the position of another block's queries", "whole_image_forward.cu", WRONG,
         "dense(position, token);", "dense(position, row);"),
        ("what is kept not scaled up", "whole_image_forward.cu", WRONG, "open * up * entry", "open * entry"),
        ("the last keys left out", "whole_image_forward.cu", WRONG, "16 * tile >= tokens", "16 * tile + 16 >= tokens"),
        ("the content not normalised", "whole_image_forward.cu", WRONG,
         "return closed * reciprocal_approx(softmax.sum[half]);", "return closed;"),
    ],
    "whole-image backward, dropout": [
        ("the mask of the untransposed scores", "whole_image_backward.cu", WRONG,
         "mask.keep_transposed(own.first(t), 16 * tile)", "mask.keep_transposed(16 * tile, own.first(t))"),
        ("the mask of another (batch, head)", "whole_image_backward.cu", WRONG,
         "const Mask mask(problem, block_x());", "const Mask mask(problem, block_x() + 1);"),
        ("dP without the mask", "whole_image_backward.cu", WRONG,
         "                        grad = factor * grad;\n", ""),
        ("P with the signs that tell the mask", "whole_image_backward.cu", WRONG,
         "word &= 0x7fff7fffu;", "word &= ~0u;"),
        ("a tile that is there already counted in the positional sums", "whole_image_backward.cu", WRONG,
         "counts(own.counts(1) ? 1.0f : 0.0f)", "counts(1.0f)"),
        ("the mean of d^2 along one axis alone", "whole_image_backward.cu", WRONG,
         "position.along_x.mean_square(from.x) + position.along_y.mean_square(from.y)",
         "position.along_x.mean_square(from.x)"),
    ],
    "tiled": [
        ("missing barrier before the next keys", "tiled_forward.cu", r"race|cp\.async into it is not waited for",
         "copy_wait<0>();\n                sync_block();\n                key_stage",
         "copy_wait<0>();\n                key_stage"),
        ("missing wait for the next keys", "tiled_forward.cu", r"cp\.async into it is not waited for",
         "copy_wait<0>();\n                sync_block();\n                key_stage",
         "sync_block();\n                key_stage"),
        ("missing sync_warp before the queries are written over", "tiled_forward.cu",
         r"race: write to shared array queries",
         "if constexpr (!has_dropout) {\n            sync_warp();", "if constexpr (!has_dropout) {"),
        ("a collective called by some lanes of the forward kernel", "tiles.cuh", r"(divergence|deadlock).* warp\(\)",
         "store(to + token, (shift", "store(to + (token + 0 * warp()), (shift"),
        ("a row of the position read by one thread and written over by another", "tiled.cuh",
         r"write to out .* read by another thread",
         "const int row = (32 * turn + lane()) / beside,", "const int row = (32 * turn + 31 - lane()) / beside,"),
        ("a launch that reads what it writes", "tiled_forward.cu",
         r"read of out (before it is written|in the launch that writes it)",
         "lines_along_y(problem), mixed, call.out}", "lines_along_y(problem), call.out, call.out}"),
        ("mask of the last keys off by one", "tiles.cuh", WRONG, "+ i % 2 >= keys)", "+ i % 2 > keys)"),
        ("what was summed before not rescaled", "tiled_forward.cu", WRONG,
         "content[n].values[i] *= rescale[i / 2];", "content[n].values[i] *= 1;"),
        ("position without its gate", "tiled_forward.cu", WRONG,
         "+ open * p;", "+ p;"),
        ("a line's last coordinates left out", "tiled_position.cuh", WRONG,
         "tile < lines.tiles() && start + 16 * tile < lines.size;",
         "tile < lines.tiles() && start + 16 * tile + 16 <= lines.size;"),
        ("a line's row left unwritten", "tiled_position.cuh", r"read of workspace array 1 before it is written",
         "place.own_row, lines.size, head_dim);", "place.own_row, lines.size - 1, head_dim);"),
        ("transposed where it must not be", "tiled_position.cuh", WRONG,
         "entry = axis.entry(i, j, shift);", "entry = axis.entry(j, i, shift);"),
        ("a mean forgotten", "tiled_position.cuh", WRONG, "sums[0] += share * (d - mean);", "sums[0] += share * d;"),
        ("a slot left unwritten", "tiled_backward.cu", r"sums is written twice|never written|read by another",
         "slot_x = slot_y + along_y.blocks();", "slot_x = slot_y + along_y.blocks() - 1;"),
        ("content overwritten before all have read it", "tiled_backward.cu", r"race: write to shared array values",
         "        sync_block();  // all have read the content\n", ""),
        ("delta forgotten", "tiled_backward.cu", WRONG,
         "weights[t][n].values[i] *= grad_weights[t][n].values[i] - delta[n][i % 2];",
         "weights[t][n].values[i] *= grad_weights[t][n].values[i];"),
        ("numbers of queries stored a tile late", "tiled_backward.cu", r"race|uninitialised",
         "store_number(number, stage ^ 1);", "store_number(number, stage);"),
        ("the content's gate forgotten in one gradient", "tiled_backward.cu", WRONG,
         "(sums, closed * problem.scale);", "(sums, problem.scale);"),
        ("g taken twice in dV", "tiled_backward.cu", WRONG,
         "+ late * positional[n].values[i];", "+ open * positional[n].values[i];"),
        ("g taken twice in the gradients of weights", "tiled_position.cuh", WRONG,
         "along_x ? open / early(call) : open;", "open;"),
        ("1 - g missing in the content's part of the gate's gradient", "tiled_backward.cu", WRONG,
         "(n < 3 ? open : open * closed)", "open"),
    ],
    "tiled, dropout": [
        ("a mask for the content alone", "tiled_forward.cu", WRONG,
         "entries[m].values[i] = kept ? entry : 0;", "entries[m].values[i] = entry;"),
        ("another mask backward", "tiled_backward.cu", WRONG,
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
