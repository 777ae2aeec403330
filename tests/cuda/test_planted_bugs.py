"""The checker is checked: each bug planted in a copy of the sources must be caught, the untouched copy must pass."""

from __future__ import annotations

import re
from functools import cache

import emulation
import pytest
import torch
from dropped import dropped_out, masks
from reference import inputs, literal, with_gradients

from gpsa_kernels.tensors import parameter_gradients

GRID_SIZE, HEAD_DIM, DROPOUT_P = (5, 9), 48, 0.3
SETTINGS = [{"schedule": schedule, "deferred_copies": deferred} for schedule in (0, 1, 2) for deferred in (False, True)]

# name: (file, text, what replaces it, what the message must match; None: nothing but a wrong result)
FORWARD_BUGS = {
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
        "                sync_warp();\n                store_rows",
        "                store_rows",
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
        "at(lane() / 16 * 8 + lane() % 8, 2 * s + lane() / 8 % 2));\n    return b;",
        "at(lane() / 8 % 2 * 8 + lane() % 8, 2 * s + lane() / 16));\n    return b;",
        None,
    ),
    "store outside of the tokens": (
        "tiles.cuh",
        "if (token < tokens && chunk * 8 + offset",
        "if (token < tokens + 1 && chunk * 8 + offset",
        r"outside of",
    ),
    "a row left unwritten": (
        "tiles.cuh",
        "if (token < tokens && chunk * 8 + offset",
        "if (token < tokens - 1 && chunk * 8 + offset",
        r"96 bytes of out were never written",
    ),
    "two blocks write a row": (
        "whole_image_forward.cuh",
        "const int first_row = block_y() * rows_per_block;",
        "const int first_row = 0 * rows_per_block;",
        r"out is written twice",
    ),
    "a shuffle that half a warp skips": (
        "whole_image_forward.cuh",
        "for (float& sum : result.sum) sum = row_sum(sum);",
        "for (float& sum : result.sum) if (lane() < 16) sum = row_sum(sum);",
        r"divergence: .* reached while .* is at ",
    ),
    "a product that half a warp skips": (
        "tiles.cuh",
        "mma<E>(sums[1].values,",
        "if (lane() < 16) mma<E>(sums[1].values,",
        r"divergence: .*mma",
    ),
    "a collective called by some lanes": (
        "position.cuh",
        "store_line<E, channels>(sums, 0, axis.size, [&](int i, int chunk) { return to(i, line, chunk); });",
        "store_line<E, channels>(sums, 0, axis.size, [&](int i, int c) { return to(i, line + 0 * warp(), c); });",
        r"(divergence|deadlock).* warp\(\)",
    ),
    "a barrier that a warp never reaches": (
        "whole_image_forward.cuh",
        "copy_wait<0>();\n        sync_block();",
        "copy_wait<0>();\n        if (warp() != 2) sync_block();",
        r"deadlock .* threads 0-63 96-127 wait at sync_block",
    ),
    "g where 1 - g belongs": (
        "whole_image_forward.cuh",
        "closed = sigmoid(-gate);",
        "closed = sigmoid(gate);",
        None,
    ),
}

BACKWARD_BUGS = {
    "missing barrier before the tables are formed": (
        "whole_image_backward.cuh",
        "            sync_block();\n            const PositionGradient",
        "            const PositionGradient",
        r"race|uninitialised",
    ),
    "missing cp.async wait of V and dO": (
        "whole_image_backward.cuh",
        "copy_wait<1>();",
        "",
        r"not waited for",
    ),
    "missing barrier before V is mixed": (
        "whole_image_backward.cuh",
        "copy_wait<1>();\n            sync_block();",
        "copy_wait<1>();",
        r"race|not waited for|uninitialised",
    ),
    "missing sync_warp between the normalisers and the means": (
        "position.cuh",
        "sync_warp();  // a coordinate's normaliser",
        "// a coordinate's normaliser",
        r"race|uninitialised",
    ),
    "missing barrier between the mixes and the gradients of the tables": (
        "whole_image_backward.cuh",
        "grad_out, mixed_v, mixed);\n            sync_block();",
        "grad_out, mixed_v, mixed);",
        r"race|uninitialised",
    ),
    "missing barrier before a warp takes its tokens of R^T dO": (
        "whole_image_backward.cuh",
        "mixed, grad_position);\n            sync_block();",
        "mixed, grad_position);",
        r"race|uninitialised",
    ),
    "missing cp.async wait": (
        "whole_image_backward.cuh",
        "copy_wait<0>();",
        "",
        r"not waited for",
    ),
    "missing barrier before the map takes its place": (
        "whole_image_backward.cuh",
        "copy_wait<0>();\n        sync_block();",
        "copy_wait<0>();",
        r"race|not waited for|uninitialised",
    ),
    "missing barrier before dS": (
        "whole_image_backward.cuh",
        "shift);\n        sync_block();",
        "shift);",
        r"race|uninitialised",
    ),
    "missing sync_warp before dS takes P's place": (
        "whole_image_backward.cuh",
        "            sync_warp();  // all lanes have their P\n",
        "",
        r"race: write to shared array attention map",
    ),
    "missing barrier before dQ": (
        "whole_image_backward.cuh",
        "(grad_x.total - delta_sum));\n        sync_block();",
        "(grad_x.total - delta_sum));",
        r"race|uninitialised",
    ),
    "missing sync_warp before a gradient is stored": (
        "whole_image_backward.cuh",
        "        sync_warp();\n#pragma unroll\n        for (int t = 0; t < 2; ++t) {\n            store_rows",
        "#pragma unroll\n        for (int t = 0; t < 2; ++t) {\n            store_rows",
        r"race: .* shared array queries and keys",
    ),
    "a collective called by some lanes": (
        "whole_image_backward.cuh",
        "store(own + i, sums[i]);",
        "store(to + (4 * warp() + i), sums[i]);",
        r"(divergence|deadlock).* warp\(\)",
    ),
    "wrong fragment index": (
        "tiles.cuh",
        "at(lane() / 16 * 8 + lane() % 8, 2 * s + lane() / 8 % 2));\n    return a;",
        "at(lane() % 16, 2 * s + lane() / 16));\n    return a;",
        None,
    ),
    "delta in another order": (
        "whole_image_backward.cuh",
        "column / 8 * 2 + column % 2;",
        "column % 2 * 2 + column / 8;",
        None,
    ),
    "rows that pad K not zeros for dQ": (
        "whole_image_backward.cuh",
        "i < missing * channels / 8;",
        "i < 0 * missing;",
        None,
    ),
    "rows that pad dO forgotten": (
        "whole_image_backward.cuh",
        "call.grad_out.token, tokens, padded, head_dim",
        "call.grad_out.token, tokens, tokens, head_dim",
        r"read of uninitialised shared array gradient of the output",
    ),
    "mask of the queries off by one": (
        "whole_image_backward.cuh",
        "query < tokens ? load(logsumexp",
        "query <= tokens ? load(logsumexp",
        r"read of 4 bytes outside of logsumexp",
    ),
    "1 - g missing in dK": (
        "whole_image_backward.cuh",
        "scale(grad_k, score_share);",
        "scale(grad_k, problem.scale);",
        None,
    ),
    "1 - g missing in dQ": (
        "whole_image_backward.cuh",
        "scale(grad_q, score_share);",
        "scale(grad_q, problem.scale);",
        None,
    ),
    "g where 1 - g belongs in dV": (
        "whole_image_backward.cuh",
        "closed * sum[0]",
        "open * sum[0]",
        None,
    ),
    "g taken twice in dV": (
        "whole_image_backward.cuh",
        "late * pair.high",
        "open * pair.high",
        None,
    ),
    "the positional weights along y without what is left of g": (
        "whole_image_backward.cuh",
        "late * grad_y.linear",
        "open * grad_y.linear",
        None,
    ),
    "1 - g missing in the gate's gradient": (
        "whole_image_backward.cuh",
        "open * closed * (",
        "open * (",
        None,
    ),
    "dV by the table instead of its transpose": (
        "position_gradient.cuh",
        "along_y.transposed_tile<E>(0, 0)",
        "along_y.tile<E>(0, 0)",
        None,
    ),
    "the gradient of w2 from one axis alone": (
        "whole_image_backward.cuh",
        "open * grad_x.square + late * grad_y.square",
        "open * grad_x.square",
        None,
    ),
    "the content left out of the gate's gradient": (
        "whole_image_backward.cuh",
        "grad_x.total - delta_sum",
        "grad_x.total",
        None,
    ),
    "a tile that is there already counted in the sum of delta": (
        "whole_image_backward.cuh",
        "if (own.counts(t)) delta_sum",
        "delta_sum",
        None,
    ),
    "a tile stored twice": (
        "whole_image_backward.cuh",
        "own.counts(t) ? tokens : 0",
        "tokens",
        r"grad_k is written twice",
    ),
    "store outside of the tokens": (
        "whole_image_backward.cuh",
        "own.counts(t) ? tokens : 0",
        "own.counts(t) ? tokens + 1 : 0",
        r"write of 16 bytes outside of grad_k",
    ),
    "overrun into the neighbouring array": (
        "whole_image_backward.cuh",
        "call.v.token, tokens, padded, head_dim",
        "call.v.token, tokens, padded + 1, head_dim",
        r"cp\.async of 16 bytes .* is outside of .* shared array values",
    ),
    "a row of dQ left unwritten": (
        "whole_image_backward.cuh",
        "write(call.grad_q, batch, head, own, tokens,",
        "write(call.grad_q, batch, head, own, tokens - 1,",
        r"96 bytes of grad_q were never written",
    ),
}

FORWARD_DROPOUT_BUGS = {
    "missing sync_warp before the store": (
        "whole_image_forward.cuh",
        "                sync_warp();\n                store_rows",
        "                store_rows",
        r"race: .* shared array queries",
    ),
    "missing sync_warp before the output takes Q's place": (
        "whole_image_forward.cuh",
        "                sync_warp();\n                store_line",
        "                store_line",
        r"race: write to shared array queries",
    ),
    "the output in the place of another block's rows": (
        "whole_image_forward.cuh",
        "store_line<E, channels>(content, row, row_count,",
        "store_line<E, channels>(content, token, tokens,",
        r"outside of|race",
    ),
    "the mask of the transposed scores": (
        "whole_image_forward.cuh",
        "dropout.keep(query, 16 * tile)",
        "dropout.keep_transposed(query, 16 * tile)",
        None,
    ),
    "the mask of another (batch, head)": (
        "whole_image_forward.cuh",
        "const Dropout dropout(problem, block_x());",
        "const Dropout dropout(problem, block_x() + 1);",
        None,
    ),
    "the mask of another block's queries": (
        "whole_image_forward.cuh",
        "places, token,",
        "places, row,",
        None,
    ),
    "the position of another block's queries": (
        "whole_image_forward.cuh",
        "dense({along_x, along_y}, token);",
        "dense({along_x, along_y}, row);",
        None,
    ),
    "what is kept not scaled up": (
        "whole_image_forward.cuh",
        "open * up};",
        "open};",
        None,
    ),
    "the last keys left out": (
        "whole_image_forward.cuh",
        "16 * tile >= tokens",
        "16 * tile + 16 >= tokens",
        None,
    ),
    "the content not normalised": (
        "whole_image_forward.cuh",
        "return closed * reciprocal_approx(softmax.sum[half]);",
        "return closed;",
        None,
    ),
}

BACKWARD_DROPOUT_BUGS = {
    "the mask of the untransposed scores": (
        "whole_image_backward.cuh",
        "mask.keep_transposed(own.first(t), 16 * tile)",
        "mask.keep_transposed(16 * tile, own.first(t))",
        None,
    ),
    "the mask of another (batch, head)": (
        "whole_image_backward.cuh",
        "const Mask mask(problem, block_x());",
        "const Mask mask(problem, block_x() + 1);",
        None,
    ),
    "dP without the mask": (
        "whole_image_backward.cuh",
        "                            grad = factor * grad;\n",
        "",
        None,
    ),
    "P with the signs that tell the mask": (
        "whole_image_backward.cuh",
        "word &= 0x7fff7fffu;",
        "word &= ~0u;",
        None,
    ),
    "a tile that is there already counted in the positional sums": (
        "whole_image_backward.cuh",
        "counts(own.counts(1) ? 1.0f : 0.0f)",
        "counts(1.0f)",
        None,
    ),
    "the mean of d^2 along one axis alone": (
        "whole_image_backward.cuh",
        "load(means_x + (2 * from.x + 1)) + load(means_y + (2 * from.y + 1))",
        "load(means_x + (2 * from.x + 1))",
        None,
    ),
}


def build(csrc):
    return emulation.load(emulation.build(csrc, ("-DGPSA_ONE_KERNEL", "-O1")))


SCALE = HEAD_DIM**-0.5


def problem():
    tensors = [t.detach() for t in inputs(1, 1, GRID_SIZE, HEAD_DIM, torch.float16)]
    return tensors, torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).half()


def forward(module, **settings):
    tensors, _ = problem()
    return [emulation.forward(*tensors, GRID_SIZE, SCALE, row_blocks=2, module=module, **settings).out]


def backward(module, **settings):
    tensors, grad_out = problem()
    q, k, *_ = tensors
    logsumexp = (SCALE * q.double() @ k.double().mT).logsumexp(-1).float()
    grads = emulation.backward(grad_out, *tensors, logsumexp, GRID_SIZE, SCALE, module=module, **settings)
    return [grads.q, grads.k, grads.v, *parameter_gradients(grads.sums, *tensors[3:])]


def dropout_forward(module, **settings):
    return forward(module, dropout_p=DROPOUT_P, dropout_seed=5, **settings)


def dropout_backward(module, **settings):
    return backward(module, dropout_p=DROPOUT_P, dropout_seed=5, **settings)


@cache
def formula(kernel, dtype):
    """What a kernel's results are compared with, every step in a dtype."""
    tensors, grad_out = problem()
    arguments = [t.to(dtype) for t in tensors], grad_out.to(dtype), GRID_SIZE, SCALE
    if kernel in (dropout_forward, dropout_backward):
        mask = masks(tensors[0], GRID_SIZE, DROPOUT_P, seed=5)
        results = with_gradients(dropped_out, *arguments, mask, DROPOUT_P)
    else:
        results = with_gradients(literal, *arguments)
    return results[:1] if kernel in (forward, dropout_forward) else results[1:]


def run(kernel, module, **settings):
    """What is wrong, or None."""
    try:
        ours = kernel(module, **settings)
    except RuntimeError as error:
        return str(error)
    results = zip(ours, formula(kernel, torch.float64), formula(kernel, torch.float16), strict=True)
    for got, expected, low in results:
        if not (got.double() - expected).abs().max() <= 2 * (low - expected).abs().max():
            return "a wrong result"
    return None


BUGS = {
    forward: FORWARD_BUGS,
    backward: BACKWARD_BUGS,
    dropout_forward: FORWARD_DROPOUT_BUGS,
    dropout_backward: BACKWARD_DROPOUT_BUGS,
}


@pytest.mark.parametrize("kernel", BUGS)
def test_the_untouched_sources_pass(kernel):
    module = build(emulation.ROOT / "csrc")
    assert [run(kernel, module, **settings) for settings in SETTINGS] == [None] * len(SETTINGS)


@pytest.mark.parametrize(("kernel", "name"), [(kernel, name) for kernel, bugs in BUGS.items() for name in bugs])
def test_a_planted_bug_is_caught(tmp_path, kernel, name):
    file, text, replacement, message = BUGS[kernel][name]
    module = build(emulation.changed_sources(tmp_path, file, text, replacement))
    for settings in SETTINGS:  # under every schedule, not only under a lucky one
        found = run(kernel, module, **settings)
        assert found is not None, settings
        assert re.search("a wrong result" if message is None else message, found), (settings, found)
