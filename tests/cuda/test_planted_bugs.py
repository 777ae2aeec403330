"""The checker is checked: each bug planted in a copy of the sources must be caught, the untouched copy must pass."""

from __future__ import annotations

import re
from functools import cache

import emulation
import pytest
import torch
from reference import inputs

from gpsa_kernels import gpsa_attention
from gpsa_kernels.check.exactness import deviations, kept_by_dropout

WRONG = "a wrong result"

# (name, .cuh file, [-what goes-]{+what comes+}, what the message must match, if the result is not just wrong)
# fmt: off
BUGS = {
    "whole-image forward": [
        ("missing barrier between the contractions", "position", "by_x); [-sync_block();-]", "race|uninitialised"),
        ("missing barrier after the position", "whole_image_forward",
         "copy_wait<0>(); [-sync_block();-]", r"cp\.async into it is not waited for|race"),
        ("missing sync_warp before writing in place", "position", "[-sync_warp();-] store_line", "race: write"),
        ("missing sync_warp before the store", "whole_image_forward",
         "[-sync_warp();-] store_rows", "race: .* shared array position"),
        ("missing cp.async wait", "whole_image_forward",
         "[-copy_wait<1>();-]", r"read of shared array keys and values .* while a cp\.async into it is not waited for"),
        ("one cp.async group too few waited for", "whole_image_forward", "copy_wait<[-0-]{+1+}>();",
         r"cp\.async into it is not waited for|ends with copies that it has not waited for"),
        ("overrun into the neighbouring array", "whole_image_forward",
         "row_count, row_count{+ + 1+}, head_dim", r"cp\.async of 16 bytes .* is outside of .* shared array queries"),
        ("zero rows after the values forgotten", "whole_image_forward",
         "call.v.token, tokens, [-keys-]{+tokens+}, head_dim", "read of uninitialised shared array keys and values"),
        ("read of a row that does not exist", "whole_image_forward",
         "call.k.token, tokens[-, tokens-]{+ + 1, tokens + 1+}, head_dim",
         "read of 16 bytes outside of k|race|not waited for"),
        ("mask off by one", "whole_image_forward", "+ i % 2 >[-=-] tokens)"),
        ("wrong fragment index", "tiles",
         "at(lane() / [-16-]{+8 % 2+} * 8 + lane() % 8, 2 * s + lane() / [-8 % 2-]{+16+})); return b;"),
        ("store outside of the tokens", "tiles", "if (token < tokens{+ + 1+} && chunk * 8 + offset", "outside of"),
        ("a row left unwritten", "tiles",
         "if (token < tokens{+ - 1+} && chunk * 8 + offset", "96 bytes of out were never written"),
        ("two blocks write a row", "whole_image_forward",
         "const int first_row = [-block_y()-]{+0+} * rows_per_block;", "out is written twice"),
        ("a shuffle that half a warp skips", "whole_image_forward",
         "for (float& sum : result.sum){+ if (lane() < 16)+} sum = row_sum(sum);",
         "divergence: .* reached while .* is at "),
        ("a product that half a warp skips", "tiles",
         "{+if (lane() < 16) +}mma<E>(sums[1].values,", "divergence: .*mma"),
        ("a collective called by some lanes", "position",
         "(sums, 0, axis.size, [&](int i, int chunk) { return to(i, line{+ + 0 * warp()+}, chunk); });",
         r"(divergence|deadlock).* warp\(\)"),
        ("a barrier that a warp never reaches", "whole_image_forward",
         "copy_wait<0>(); {+ if (warp() != 2)+} sync_block();", "deadlock .* threads 0-63 96-127 wait at sync_block"),
        ("g where 1 - g belongs", "whole_image_forward", "closed = sigmoid([---]gate);"),
    ],
    "whole-image backward": [
        ("missing barrier before the tables are formed", "whole_image_backward",
         "[-sync_block();-] const PositionGradient", "race|uninitialised"),
        ("missing cp.async wait of V and dO", "whole_image_backward", "[-copy_wait<1>();-]", "not waited for"),
        ("missing barrier before V is mixed", "whole_image_backward",
         "copy_wait<1>(); [-sync_block();-]", "race|not waited for|uninitialised"),
        ("missing sync_warp between the normalisers and the means", "position",
         "[-sync_warp();-] // a coordinate's normaliser", "race|uninitialised"),
        ("missing barrier between the mixes and the gradients of the tables", "whole_image_backward",
         "grad_out, mixed_v, mixed); [-sync_block();-]", "race|uninitialised"),
        ("missing barrier before a warp takes its tokens of R^T dO", "whole_image_backward",
         "mixed, grad_position); [-sync_block();-]", "race|uninitialised"),
        ("missing cp.async wait", "whole_image_backward", "[-copy_wait<0>();-]", "not waited for"),
        ("missing barrier before the map takes its place", "whole_image_backward",
         "copy_wait<0>(); [-sync_block();-]", "race|not waited for|uninitialised"),
        ("missing barrier before dS", "whole_image_backward", "shift); [-sync_block();-]", "race|uninitialised"),
        ("missing sync_warp before dS takes P's place", "whole_image_backward",
         "[-sync_warp(); // all lanes have their P-]", "race: write to shared array attention map"),
        ("missing barrier before dQ", "whole_image_backward",
         "(grad_x.total - delta_sum)); [-sync_block();-]", "race|uninitialised"),
        ("missing sync_warp before a gradient is stored", "whole_image_backward",
         "[-sync_warp();-] #pragma unroll for (int t = 0; t < 2; ++t) { store_rows",
         "race: .* shared array queries and keys"),
        ("a collective called by some lanes", "whole_image_backward",
         "store([-own + i-]{+to + (4 * warp() + i)+}, sums[i]);", r"(divergence|deadlock).* warp\(\)"),
        ("wrong fragment index", "tiles",
         "at(lane() [-/ 16 * 8 + lane() % 8-]{+% 16+}, 2 * s + lane() / [-8 % 2-]{+16+})); return a;"),
        ("delta in another order", "whole_image_backward", "column [-/ 8 * 2 + column % 2-]{+% 2 * 2 + column / 8+};"),
        ("rows that pad K not zeros for dQ", "whole_image_backward", "i < [-missing * channels / 8-]{+0 * missing+};"),
        ("rows that pad dO forgotten", "whole_image_backward",
         "call.grad_out.token, tokens, [-padded-]{+tokens+}, head_dim",
         "read of uninitialised shared array gradient of the output"),
        ("mask of the queries off by one", "whole_image_backward",
         "query <{+=+} tokens ? load(logsumexp", "read of 4 bytes outside of logsumexp"),
        ("1 - g missing in dK", "whole_image_backward", "scale(grad_k, [-score_share-]{+problem.scale+});"),
        ("1 - g missing in dQ", "whole_image_backward", "scale(grad_q, [-score_share-]{+problem.scale+});"),
        ("g where 1 - g belongs in dV", "whole_image_backward", "[-closed-]{+open+} * sum[0]"),
        ("g taken twice in dV", "whole_image_backward", "[-late-]{+open+} * pair.high"),
        ("the positional weights along y without what is left of g", "whole_image_backward",
         "[-late-]{+open+} * grad_y.linear"),
        ("1 - g missing in the gate's gradient", "whole_image_backward", "open * [-closed * -]("),
        ("dV by the table instead of its transpose", "position_gradient",
         "along_y.[-transposed_tile-]{+tile+}<E>(0, 0)"),
        ("the gradient of w2 from one axis alone", "whole_image_backward",
         "open * grad_x.square[- + late * grad_y.square-]"),
        ("the content left out of the gate's gradient", "whole_image_backward", "grad_x.total[- - delta_sum-]"),
        ("a tile that is there already counted in the sum of delta", "whole_image_backward",
         "[-if (own.counts(t)) -]delta_sum"),
        ("a tile stored twice", "whole_image_backward",
         "[-own.counts(t) ? tokens : 0-]{+tokens+}", "grad_k is written twice"),
        ("store outside of the tokens", "whole_image_backward",
         "own.counts(t) ? tokens{+ + 1+} : 0", "write of 16 bytes outside of grad_k"),
        ("overrun into the neighbouring array", "whole_image_backward",
         "call.v.token, tokens, padded{+ + 1+}, head_dim",
         r"cp\.async of 16 bytes .* is outside of .* shared array values"),
        ("a row of dQ left unwritten", "whole_image_backward",
         "write(call.grad_q, batch, head, own, tokens{+ - 1+},", "96 bytes of grad_q were never written"),
    ],
    "whole-image forward, dropout": [
        ("missing sync_warp before the store", "whole_image_forward",
         "[-sync_warp();-] store_rows", "race: .* shared array queries"),
        ("missing sync_warp before the output takes Q's place", "whole_image_forward",
         "[-sync_warp();-] store_line", "race: write to shared array queries"),
        ("the output in the place of another block's rows", "whole_image_forward",
         "store_line<E, channels>(content, [-row, row_count-]{+token, tokens+},", "outside of|race"),
        ("the mask of the transposed scores", "whole_image_forward",
         "dropout.[-keep-]{+keep_transposed+}(query, 16 * tile)"),
        ("the mask of another (batch, head)", "whole_image_forward",
         "const Dropout dropout(problem, block_x(){+ + 1+});"),
        ("the mask of another block's queries", "whole_image_forward", "places, [-token-]{+row+},"),
        ("the position of another block's queries", "whole_image_forward",
         "dense({along_x, along_y}, [-token-]{+row+});"),
        ("what is kept not scaled up", "whole_image_forward", "open[- * up-]};"),
        ("the last keys left out", "whole_image_forward", "16 * tile{+ + 16+} >= tokens"),
        ("the content not normalised", "whole_image_forward",
         "return closed[- * reciprocal_approx(softmax.sum[half])-];"),
    ],
    "whole-image backward, dropout": [
        ("the mask of the untransposed scores", "whole_image_backward",
         "mask.keep_transposed([-own.first(t), 16 * tile-]{+16 * tile, own.first(t)+})"),
        ("the mask of another (batch, head)", "whole_image_backward", "const Mask mask(problem, block_x(){+ + 1+});"),
        ("dP without the mask", "whole_image_backward", "[-grad = factor * grad;-]"),
        ("P with the signs that tell the mask", "whole_image_backward", "word &= [-0x7fff7fffu-]{+~0u+};"),
        ("a tile that is there already counted in the positional sums", "whole_image_backward",
         "counts([-own.counts(1) ? 1.0f : 0-]{+1+}.0f)"),
        ("the mean of d^2 along one axis alone", "whole_image_backward",
         "load(means_x + (2 * from.x + 1))[- + load(means_y + (2 * from.y + 1))-]"),
    ],
    "tiled": [
        ("missing barrier before the next keys", "tiled_forward",
         "copy_wait<0>(); [-sync_block();-] key_stage", r"race|cp\.async into it is not waited for"),
        ("missing wait for the next keys", "tiled_forward",
         "[-copy_wait<0>();-] sync_block(); key_stage", r"cp\.async into it is not waited for"),
        ("missing sync_warp before the queries are written over", "tiled_forward",
         "if constexpr (!has_dropout) { [-sync_warp();-]", "race: write to shared array queries"),
        ("a collective called by some lanes of the forward kernel", "tiles",
         "store(to + [-token-]{+(token + 0 * warp())+}, (shift", r"(divergence|deadlock).* warp\(\)"),
        ("a collective called by some lanes of the backward kernels", "tiled_rows",
         "store([-own + n-]{+partial + (count * warp() + n)+}, sum);", r"(divergence|deadlock).* warp\(\)"),
        ("a row of the position read by one thread and written over by another", "tiled_rows",
         "const int row = (32 * turn +{+ 31 -+} lane()) / beside,", "write to out .* read by another thread"),
        ("a launch that reads what it writes", "tiled_forward", "statistics, [-mixed-]{+call.out+}, call.out, {}",
         "read of out (before it is written|in the launch that writes it)"),
        ("mask of the last keys off by one", "tiled_forward", "+ i % 2 >[-=-] keys)"),
        ("what was summed before not rescaled", "tiled_forward",
         "content[n].values[2 * half + i] *= [-rescale-]{+1+};"),
        ("position without its gate", "tiled_forward", "+ [-open * -]p;"),
        ("a line's last coordinates left out", "tiled_position",
         "tile < lines.tiles() && start + 16 * tile [-<-]{++ 16 <=+} lines.size;"),
        ("a line's row left unwritten", "tiled_position",
         "first, lines.size{+ - 1+}, 0, head_dim,", "read of workspace array 1 before it is written"),
        ("transposed where it must not be", "tiled_position", "entry = axis.entry([-i, j-]{+j, i+}, normaliser);"),
        ("a mean forgotten", "tiled_position", "linear += share * [-(d - mean)-]{+d+};"),
        ("a slot left unwritten", "tiled_backward",
         "slot_x = slot_y + along_y.blocks(){+ - 1+};", "sums is written twice|never written|read by another"),
        ("content overwritten before all have read it", "tiled_backward",
         "[-sync_block(); // all have read the content-]", "race: write to shared array values"),
        ("delta forgotten", "tiled_backward",
         "weights[t][n].values[i] *= grad_weights[t][n].values[i][- - delta[n][i % 2]-];"),
        ("numbers of queries stored a tile late", "tiled_backward",
         "store_number(number, stage[- ^ 1-]);", "race|uninitialised"),
        ("the content's gate forgotten in one gradient", "tiled_backward", "(sums, [-closed * -]problem.scale);"),
        ("g taken twice in dV", "tiled_backward", "+ [-late-]{+open+} * positional[n].values[i];"),
        ("g taken twice in the gradients of weights", "tiled_position", "[-along_x ? open / early(call) : -]open;"),
        ("1 - g missing in the content's part of the gate's gradient", "tiled_backward",
         "[-(n < 3 ? open : open * closed)-]{+open+}"),
    ],
    "tiled, dropout": [
        ("a mask for the content alone", "tiled_forward", "entries[m].values[i] = [-kept ? entry : 0-]{+entry+};"),
        ("another mask backward", "tiled_backward", "dropout.[-keep_transposed-]{+keep+}(query, key)"),
    ],
}
# fmt: on

KERNELS = {  # the grid, the probability of dropout, row blocks, how many schedules
    "whole-image forward": ((5, 9), 0.0, 2, 3),
    "whole-image backward": ((5, 9), 0.0, 1, 3),
    "whole-image forward, dropout": ((5, 9), 0.3, 2, 3),
    "whole-image backward, dropout": ((5, 9), 0.3, 1, 3),
    "tiled": ((3, 23), 0.0, 0, 2),  # two tiles of tokens, the last of them partial; two of coordinates along x
    "tiled, dropout": ((3, 23), 0.25, 0, 2),
}


def attention(*arguments, **kwargs):
    torch.manual_seed(5)
    return gpsa_attention(*arguments, **kwargs, backend="emulated")


@cache
def mask(grid_size, dropout_p):
    with emulation.using():
        return kept_by_dropout(attention, 1, 1, grid_size, torch.float16, "cpu", dropout_p=dropout_p)


def check(kernels, csrc, is_expected):
    """That under every schedule, not only a lucky one, what is wrong (or None) is what is expected."""
    grid_size, dropout_p, row_blocks, schedules = KERNELS[kernels]
    dropout = {"mask": mask(grid_size, dropout_p), "dropout_p": dropout_p} if dropout_p else {}
    library = emulation.load(emulation.build(csrc, emulation.ONE_KERNEL))
    for how in ({"schedule": n, "deferred_copies": late} for n in range(schedules) for late in (False, True)):
        with emulation.using(library, row_blocks=row_blocks, **how):
            try:
                tensors, gradients = inputs(1, 1, grid_size, 48, torch.float16), "forward" not in kernels
                found = deviations(attention, tensors, grid_size, gradients=gradients, **dropout)
                wrong = None if all(d.error <= d.allowed for d in found) else WRONG
            except RuntimeError as error:
                wrong = str(error)
        assert is_expected(wrong), (how, wrong)


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_untouched_sources_pass(kernels):
    check(kernels, emulation.CSRC, lambda wrong: wrong is None)


@pytest.mark.parametrize(
    ("kernels", "bug"), [pytest.param(k, bug, id=f"{k}: {bug[0]}") for k, bugs in BUGS.items() for bug in bugs]
)
def test_a_planted_bug_is_caught(tmp_path, kernels, bug):
    _, file, change, message = (*bug, WRONG)[:4]
    csrc = emulation.changed_sources(tmp_path, f"{file}.cuh", change)
    check(kernels, csrc, lambda wrong: wrong is not None and re.search(message, wrong))
