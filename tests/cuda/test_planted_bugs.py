"""The checker is checked: each bug planted in a copy of the sources must be caught, the untouched copy must pass."""

from __future__ import annotations

import re
from functools import cache, partial

import emulation
import pytest
import torch
from reference import attention, inputs

from gpsa_kernels.check.exactness import deviations, kept_by_dropout

WRONG = "a wrong result"

# (name, file, [-what goes-]{+what comes+}, what the message must match, if the result is not just wrong)
# fmt: off
BUGS = {
    "whole-image forward": [
        ("missing barrier between the contractions", "whole_image_position.cuh",
         "by_x); [-sync_block();-]", "race|uninitialised"),
        ("missing barrier after the position", "whole_image_forward.cu",
         "copy_wait<0>(); [-sync_block();-]", r"cp\.async into it is not waited for|race"),
        ("missing sync_warp before writing in place", "whole_image_position.cuh",
         "[-sync_warp();-] stage_rows", "race: write"),
        ("missing sync_warp before the store", "whole_image_forward.cu",
         "[-sync_warp();-] store_rows", "race: .* shared array position"),
        ("missing cp.async wait", "whole_image_forward.cu",
         "[-copy_wait<1>();-]", r"read of shared array keys and values .* while a cp\.async into it is not waited for"),
        ("one cp.async group too few waited for", "whole_image_forward.cu", "copy_wait<[-0-]{+1+}>();",
         r"cp\.async into it is not waited for|ends with copies that it has not waited for"),
        ("overrun into the neighbouring array", "whole_image_forward.cu",
         "row_count, row_count{+ + 1+}, head_dim", r"cp\.async of 16 bytes .* is outside of .* shared array queries"),
        ("zero rows after the values forgotten", "whole_image_forward.cu",
         "call.v.token, tokens, [-keys-]{+tokens+}, head_dim", "read of uninitialised shared array keys and values"),
        ("read of a row that does not exist", "whole_image_forward.cu",
         "call.k.token, tokens[-, tokens-]{+ + 1, tokens + 1+}, head_dim",
         "read of 16 bytes outside of k|race|not waited for"),
        ("mask off by one", "whole_image_forward.cu", "mask_keys<last>(scores, tokens{+ + 1+});"),
        ("wrong fragment index", "tiles.cuh",
         "at(lane() / [-16-]{+8 % 2+} * 8 + lane() % 8, 2 * s + lane() / [-8 % 2-]{+16+})); return b;"),
        ("store outside of the tokens", "tiles.cuh", "if (token < tokens{+ + 1+} && chunk * 8 + offset", "outside of"),
        ("a row left unwritten", "tiles.cuh",
         "if (token < tokens{+ - 1+} && chunk * 8 + offset", "96 bytes of out were never written"),
        ("two blocks write a row", "whole_image_forward.cu",
         "const int first_row = [-block_y()-]{+0+} * most_rows;", "out is written twice"),
        ("a shuffle that half a warp skips", "whole_image_forward.cu",
         "for (float& s : sum){+ if (lane() < 16)+} s = sum_of_lanes<4>(s);", "divergence: .* reached while .* is at "),
        ("a product that half a warp skips", "tiles.cuh",
         "{+if (lane() < 16) +}mma<E>(sums[1].values,", "divergence: .*mma"),
        ("a collective called by some lanes", "whole_image_position.cuh",
         "(sums, 0, axis.size, [&](int i, int chunk) { return to(i, line{+ + 0 * warp()+}, chunk); });",
         r"(divergence|deadlock).* warp\(\)"),
        ("a barrier that a warp never reaches", "whole_image_forward.cu",
         "copy_wait<0>(); {+ if (warp() != 2)+} sync_block();", "deadlock .* threads 0-63 96-127 wait at sync_block"),
        ("g where 1 - g belongs", "whole_image_forward.cu", "closed = sigmoid([---]gate);"),
    ],
    "whole-image backward": [
        ("missing barrier before the tables are formed", "whole_image_backward.cu",
         "[-sync_block();-] const PositionGradient", "race|uninitialised"),
        ("missing cp.async wait of V and dO", "whole_image_backward.cu", "[-copy_wait<1>();-]", "not waited for"),
        ("missing barrier before V is mixed", "whole_image_backward.cu",
         "copy_wait<1>(); [-sync_block();-]", "race|not waited for|uninitialised"),
        ("missing barrier between the mixes and the gradients of the tables", "whole_image_backward.cu",
         "grad_out, mixed_v, mixed); [-sync_block();-]", "race|uninitialised"),
        ("missing barrier before a warp takes its tokens of R^T dO", "whole_image_backward.cu",
         "mixed, grad_position); [-sync_block();-]", "race|uninitialised"),
        ("missing cp.async wait", "whole_image_backward.cu", "[-copy_wait<0>();-]", "not waited for"),
        ("missing barrier before the map takes its place", "whole_image_backward.cu",
         "copy_wait<0>(); [-sync_block();-]", "race|not waited for|uninitialised"),
        ("missing barrier before dS", "whole_image_backward.cu", "shift); [-sync_block();-]", "race|uninitialised"),
        ("missing sync_warp before dS takes P's place", "whole_image_backward.cu",
         "[-sync_warp(); // all lanes have their P-]", "race: write to shared array attention map"),
        ("missing barrier before dQ", "whole_image_backward.cu",
         "(sums[3] - delta_sum)}); [-sync_block();-]", "race|uninitialised"),
        ("missing sync_warp before a gradient is stored", "whole_image_backward.cu",
         "[-sync_warp();-] #pragma unroll for (int t = 0; t < 2; ++t) { const int end",
         "race: .* shared array queries and keys"),
        ("a collective called by some lanes", "tiles.cuh",
         "store([-own + n-]{+partial + (count * warp() + n)+}, sums[n]);", r"(divergence|deadlock).* warp\(\)"),
        ("wrong fragment index", "tiles.cuh",
         "at(lane() [-/ 16 * 8 + lane() % 8-]{+% 16+}, 2 * s + lane() / [-8 % 2-]{+16+})); return a;"),
        ("delta in another order", "whole_image_backward.cu",
         "column [-/ 8 * 2 + column % 2-]{+% 2 * 2 + column / 8+};"),
        ("rows that pad K not zeros for dQ", "whole_image_backward.cu",
         "i < [-missing * channels / 8-]{+0 * missing+};"),
        ("rows that pad dO forgotten", "whole_image_backward.cu",
         "call.grad_out.token, tokens, [-padded-]{+tokens+}, head_dim",
         "read of uninitialised shared array gradient of the output"),
        ("mask of the queries off by one", "whole_image_backward.cu",
         "query <{+=+} tokens ? load(logsumexp", "read of 4 bytes outside of logsumexp"),
        ("1 - g missing in dK", "whole_image_backward.cu",
         "[-scale_own(grad_k-]{+for (auto& tile : grad_k) scale<channels / 8>(tile, problem.scale+});"),
        ("1 - g missing in dQ", "whole_image_backward.cu",
         "[-scale_own(grad_q-]{+for (auto& tile : grad_q) scale<channels / 8>(tile, problem.scale+});"),
        ("g where 1 - g belongs in dV", "whole_image_backward.cu", "[-closed-]{+open+} * sum[0]"),
        ("g taken twice in dV", "whole_image_backward.cu", "[-late-]{+open+} * pair.high"),
        ("the positional weights along y without what is left of g", "whole_image_backward.cu",
         "[-late-]{+open+} * sums[1]"),
        ("1 - g missing in the gate's gradient", "whole_image_backward.cu", "open * [-closed * -]("),
        ("dV by the table instead of its transpose", "whole_image_position.cuh",
         "along_y.template [-transposed_tile<E>(1-]{+tile<E>(0, 0+})"),
        ("the gradient of w2 from one axis alone", "whole_image_position.cuh", "early * x.square[- + y.square-]"),
        ("the content left out of the gate's gradient", "whole_image_backward.cu", "sums[3][- - delta_sum-]"),
        ("a tile that is there already counted in the sum of delta", "whole_image_backward.cu",
         "[-if (own.counts(t)) -]delta_sum"),
        ("a tile stored twice", "whole_image_backward.cu",
         "[-own.counts(t) ? tokens : 0-]{+tokens+}", "grad_k is written twice"),
        ("store outside of the tokens", "whole_image_backward.cu",
         "own.counts(t) ? tokens{+ + 1+} : 0", "write of 16 bytes outside of grad_k"),
        ("overrun into the neighbouring array", "whole_image_backward.cu",
         "call.v.token, tokens, padded{+ + 1+}, head_dim",
         r"cp\.async of 16 bytes .* is outside of .* shared array values"),
        ("a row left unwritten", "whole_image_backward.cu",
         "end{+ - 1+}, head_dim, at);", "96 bytes of grad_. were never written"),
    ],
    "whole-image forward, dropout": [
        ("missing sync_warp before the store", "whole_image_forward.cu",
         "[-sync_warp();-] store_rows", "race: .* shared array queries"),
        ("missing sync_warp before the output takes Q's place", "whole_image_forward.cu",
         "[-sync_warp();-] stage_rows", "race: write to shared array queries"),
        ("the output in the place of another block's rows", "whole_image_forward.cu",
         "stage_rows<E, channels>(content, [-row, row_count-]{+token, tokens+},", "outside of|race"),
        ("the mask of the transposed scores", "whole_image_forward.cu",
         "dropout.[-keep-]{+keep_transposed+}(token, 16 * tile)"),
        ("the mask of another (batch, head)", "whole_image_forward.cu",
         "const Dropout dropout(problem, block_x(){+ + 1+});"),
        ("the mask of another block's queries", "whole_image_forward.cu", "dropout.keep([-token-]{+row+}, 16 * tile)"),
        ("the position of another block's queries", "whole_image_forward.cu", "dense(position, [-token-]{+row+});"),
        ("what is kept not scaled up", "whole_image_forward.cu", "open * [-up * -]entry"),
        ("the last keys left out", "whole_image_forward.cu", "16 * tile{+ + 16+} >= tokens"),
        ("the content not normalised", "whole_image_forward.cu",
         "return closed[- * reciprocal_approx(softmax.sum[half])-];"),
    ],
    "whole-image backward, dropout": [
        ("the mask of the untransposed scores", "whole_image_backward.cu",
         "mask.keep_transposed([-own.first(t), 16 * tile-]{+16 * tile, own.first(t)+})"),
        ("the mask of another (batch, head)", "whole_image_backward.cu",
         "const Mask mask(problem, block_x(){+ + 1+});"),
        ("dP without the mask", "whole_image_backward.cu", "[-grad = factor * grad;-]"),
        ("P with the signs that tell the mask", "whole_image_backward.cu", "word &= [-0x7fff7fffu-]{+~0u+};"),
        ("a tile that is there already counted in the positional sums", "whole_image_backward.cu",
         "counts([-own.counts(1) ? 1.0f : 0-]{+1+}.0f)"),
        ("the mean of d^2 along one axis alone", "whole_image_backward.cu",
         "position.along_x.mean_square(from.x)[- + position.along_y.mean_square(from.y)-]"),
    ],
    "tiled": [
        ("missing barrier before the next keys", "tiled_forward.cu",
         "copy_wait<0>(); [-sync_block();-] key_stage", r"race|cp\.async into it is not waited for"),
        ("missing wait for the next keys", "tiled_forward.cu",
         "[-copy_wait<0>();-] sync_block(); key_stage", r"cp\.async into it is not waited for"),
        ("missing sync_warp before the queries are written over", "tiled_forward.cu",
         "if constexpr (!has_dropout) { [-sync_warp();-]", "race: write to shared array queries"),
        ("a collective called by some lanes of the forward kernel", "tiles.cuh",
         "store(to + [-token-]{+(token + 0 * warp())+}, (shift", r"(divergence|deadlock).* warp\(\)"),
        ("a row of the position read by one thread and written over by another", "tiled.cuh",
         "const int row = (32 * turn +{+ 31 -+} lane()) / beside,", "write to out .* read by another thread"),
        ("a launch that reads what it writes", "tiled_forward.cu",
         "lines_along_y(problem), [-mixed-]{+call.out+}, call.out}",
         "read of out (before it is written|in the launch that writes it)"),
        ("mask of the last keys off by one", "tiles.cuh", "+ i % 2 >[-=-] keys)"),
        ("what was summed before not rescaled", "tiled_forward.cu", "content[n].values[i] *= [-rescale[i / 2]-]{+1+};"),
        ("position without its gate", "tiled_forward.cu", "+ [-open * -]p;"),
        ("a line's last coordinates left out", "tiled_position.cuh",
         "tile < lines.tiles() && start + 16 * tile [-<-]{++ 16 <=+} lines.size;"),
        ("a line's row left unwritten", "tiled_position.cuh",
         "place.own_row, lines.size{+ - 1+}, head_dim);", "read of workspace array 1 before it is written"),
        ("transposed where it must not be", "tiled_position.cuh", "entry = axis.entry([-i, j-]{+j, i+}, shift);"),
        ("a mean forgotten", "tiled_position.cuh", "sums[0] += share * [-(d - mean)-]{+d+};"),
        ("a slot left unwritten", "tiled_backward.cu",
         "slot_x = slot_y + along_y.blocks(){+ - 1+};", "sums is written twice|never written|read by another"),
        ("content overwritten before all have read it", "tiled_backward.cu",
         "[-sync_block(); // all have read the content-]", "race: write to shared array values"),
        ("delta forgotten", "tiled_backward.cu",
         "weights[t][n].values[i] *= grad_weights[t][n].values[i][- - delta[n][i % 2]-];"),
        ("numbers of queries stored a tile late", "tiled_backward.cu",
         "store_number(number, stage[- ^ 1-]);", "race|uninitialised"),
        ("the content's gate forgotten in one gradient", "tiled_backward.cu", "(sums, [-closed * -]problem.scale);"),
        ("g taken twice in dV", "tiled_backward.cu", "+ [-late-]{+open+} * positional[n].values[i];"),
        ("g taken twice in the gradients of weights", "tiled_position.cuh", "[-along_x ? open / early(call) : -]open;"),
        ("1 - g missing in the content's part of the gate's gradient", "tiled_backward.cu",
         "[-(n < 3 ? open : open * closed)-]{+open+}"),
    ],
    "tiled, dropout": [
        ("a mask for the content alone", "tiled_forward.cu", "entries[m].values[i] = [-kept ? entry : 0-]{+entry+};"),
        ("another mask backward", "tiled_backward.cu", "dropout.[-keep_transposed-]{+keep+}(query, key)"),
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


emulated = partial(attention, backend="emulated")


@cache
def mask(grid_size, dropout_p):
    with emulation.using():
        return kept_by_dropout(emulated, 1, 1, grid_size, torch.float16, "cpu", dropout_p=dropout_p)


def check(kernels, csrc, is_expected):
    """That under every schedule, not only a lucky one, what is wrong (or None) is what is expected."""
    grid_size, dropout_p, row_blocks, schedules = KERNELS[kernels]
    dropout = {"mask": mask(grid_size, dropout_p), "dropout_p": dropout_p} if dropout_p else {}
    library = emulation.load(emulation.build(csrc, emulation.ONE_KERNEL))
    for how in ({"schedule": n, "deferred_copies": late} for n in range(schedules) for late in (False, True)):
        with emulation.using(library, row_blocks=row_blocks, **how):
            try:
                tensors, gradients = inputs(1, 1, grid_size, 48, torch.float16), "forward" not in kernels
                found = deviations(emulated, tensors, grid_size, gradients=gradients, **dropout)
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
    csrc = emulation.changed_sources(tmp_path, file, change)
    check(kernels, csrc, lambda wrong: wrong is not None and re.search(message, wrong))
