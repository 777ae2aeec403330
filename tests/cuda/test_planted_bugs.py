"""The checker is checked: each bug planted in a copy of the sources must be caught, the untouched copy must pass."""

import re
from functools import cache, partial

import emulation
import pytest
import torch
from reference import attention, inputs

from gpsa_kernels.check.exactness import deviations, kept_by_dropout

WRONG = "a wrong result"

# by kernels and file: (name, [-what goes-]{+what comes+}, what the message must match if the result is not just wrong)
# fmt: off
BUGS = {
    ("whole-image forward", "whole_image_position.cuh"): [
        ("missing barrier between the contractions", "by_x); [-sync_block();-]", "race|uninitialised"),
        ("missing sync_warp before writing in place", "[-sync_warp();-] stage_rows", "race: write"),
        ("a collective called by some lanes",
         "(sums, 0, axis.size, [&](int i, int chunk) { return to(i, line{+ + 0 * warp()+}, chunk); });",
         r"(divergence|deadlock).* warp\(\)"),
    ],
    ("whole-image forward", "whole_image_forward.cu"): [
        ("missing barrier after the position", "copy_wait<0>(); [-sync_block();-]",
         r"cp\.async into it is not waited for|race"),
        ("missing sync_warp before the store", "[-sync_warp();-] store_rows", "race: .* shared array position"),
        ("missing cp.async wait", "[-copy_wait<1>();-]",
         r"read of shared array keys and values .* while a cp\.async into it is not waited for"),
        ("one cp.async group too few waited for", "copy_wait<[-0-]{+1+}>();",
         r"cp\.async into it is not waited for|ends with copies that it has not waited for"),
        ("overrun into the neighbouring array", "row_count, row_count{+ + 1+}, head_dim",
         r"cp\.async of 16 bytes .* is outside of .* shared array queries"),
        ("zero rows after the values forgotten", "call.v.token, tokens, [-keys-]{+tokens+}, head_dim",
         "read of uninitialised shared array keys and values"),
        ("read of a row that does not exist", "call.k.token, tokens[-, tokens-]{+ + 1, tokens + 1+}, head_dim",
         "read of 16 bytes outside of k|race|not waited for"),
        ("mask off by one", "mask_keys<last>(scores, tokens{+ + 1+});"),
        ("two blocks write a row", "const int first_row = [-block_y()-]{+0+} * most_rows;", "out is written twice"),
        ("a shuffle that half a warp skips", "for (float& s : sum){+ if (lane() < 16)+} s = sum_of_lanes<4>(s);",
         "divergence: .* reached while .* is at "),
        ("a barrier that a warp never reaches", "copy_wait<0>(); {+ if (warp() != 2)+} sync_block();",
         "deadlock .* threads 0-63 96-127 wait at sync_block"),
        ("g where 1 - g belongs", "closed = sigmoid([---]gate);"),
    ],
    ("whole-image forward", "tiles.cuh"): [
        ("wrong fragment index",
         "at(lane() / [-16-]{+8 % 2+} * 8 + lane() % 8, 2 * s + lane() / [-8 % 2-]{+16+})); return b;"),
        ("store outside of the tokens", "if (token < tokens{+ + 1+} && chunk * 8 + offset", "outside of"),
        ("a row left unwritten", "if (token < tokens{+ - 1+} && chunk * 8 + offset",
         "96 bytes of out were never written"),
        ("a product that half a warp skips", "{+if (lane() < 16) +}mma<E>(sums[1].values,", "divergence: .*mma"),
    ],
    ("whole-image backward", "whole_image_backward.cu"): [
        ("missing barrier before the tables are formed", "[-sync_block();-] const PositionGradient",
         "race|uninitialised"),
        ("missing cp.async wait of V and dO", "[-copy_wait<1>();-]", "not waited for"),
        ("missing barrier before V is mixed", "copy_wait<1>(); [-sync_block();-]", "race|not waited for|uninitialised"),
        ("missing barrier between the mixes and the gradients of the tables",
         "grad_out, mixed_v, mixed); [-sync_block();-]", "race|uninitialised"),
        ("missing barrier before a warp takes its tokens of R^T dO", "mixed, grad_position); [-sync_block();-]",
         "race|uninitialised"),
        ("missing cp.async wait", "[-copy_wait<0>();-]", "not waited for"),
        ("missing barrier before the map takes its place", "copy_wait<0>(); [-sync_block();-]",
         "race|not waited for|uninitialised"),
        ("missing barrier before dS", "shift); [-sync_block();-]", "race|uninitialised"),
        ("missing sync_warp before dS takes P's place", "[-sync_warp(); // all lanes have their P-]",
         "race: write to shared array attention map"),
        ("missing barrier before dQ", "(sums[3] - delta_sum)}); [-sync_block();-]", "race|uninitialised"),
        ("missing sync_warp before a gradient is stored",
         "[-sync_warp();-] #pragma unroll for (int t = 0; t < 2; ++t) { const int end",
         "race: .* shared array queries and keys"),
        ("delta in another order", "column [-/ 8 * 2 + column % 2-]{+% 2 * 2 + column / 8+};"),
        ("rows that pad K not zeros for dQ", "i < [-missing * channels / 8-]{+0 * missing+};"),
        ("rows that pad dO forgotten", "call.grad_out.token, tokens, [-padded-]{+tokens+}, head_dim",
         "read of uninitialised shared array gradient of the output"),
        ("mask of the queries off by one", "query <{+=+} tokens ? load(logsumexp",
         "read of 4 bytes outside of logsumexp"),
        ("1 - g missing in dK",
         "[-scale_own(grad_k-]{+for (auto& tile : grad_k) scale<channels / 8>(tile, problem.scale+});"),
        ("1 - g missing in dQ",
         "[-scale_own(grad_q-]{+for (auto& tile : grad_q) scale<channels / 8>(tile, problem.scale+});"),
        ("g where 1 - g belongs in dV", "[-closed-]{+open+} * sum[0]"),
        ("g taken twice in dV", "[-late-]{+open+} * pair.high"),
        ("the positional weights along y without what is left of g", "[-late-]{+open+} * sums[1]"),
        ("1 - g missing in the gate's gradient", "open * [-closed * -]("),
        ("the content left out of the gate's gradient", "sums[3][- - delta_sum-]"),
        ("a tile that is there already counted in the sum of delta", "[-if (own.counts(t)) -]delta_sum"),
        ("a tile stored twice", "[-own.counts(t) ? tokens : 0-]{+tokens+}", "grad_k is written twice"),
        ("store outside of the tokens", "own.counts(t) ? tokens{+ + 1+} : 0", "write of 16 bytes outside of grad_k"),
        ("overrun into the neighbouring array", "call.v.token, tokens, padded{+ + 1+}, head_dim",
         r"cp\.async of 16 bytes .* is outside of .* shared array values"),
        ("a row left unwritten", "end{+ - 1+}, head_dim, at);", "96 bytes of grad_. were never written"),
    ],
    ("whole-image backward", "tiles.cuh"): [
        ("a collective called by some lanes", "store([-own + n-]{+partial + (count * warp() + n)+}, sums[n]);",
         r"(divergence|deadlock).* warp\(\)"),
        ("wrong fragment index",
         "at(lane() [-/ 16 * 8 + lane() % 8-]{+% 16+}, 2 * s + lane() / [-8 % 2-]{+16+})); return a;"),
    ],
    ("whole-image backward", "whole_image_position.cuh"): [
        ("dV by the table instead of its transpose", "along_y.[-transposed_tile<E>(1-]{+tile<E>(0, 0+})"),
        ("the gradient of w2 from one axis alone", "early * x.square[- + y.square-]"),
    ],
    ("whole-image forward, dropout", "whole_image_forward.cu"): [
        ("missing sync_warp before the store", "[-sync_warp();-] store_rows", "race: .* shared array queries"),
        ("missing sync_warp before the output takes Q's place", "[-sync_warp();-] stage_rows",
         "race: write to shared array queries"),
        ("the output in the place of another block's rows",
         "stage_rows<E, channels>(content, [-row, row_count-]{+token, tokens+},", "outside of|race"),
        ("the mask of the transposed scores", "dropout.[-keep-]{+keep_transposed+}(token, 16 * tile)"),
        ("the mask of another (batch, head)", "const Dropout dropout(problem, block_x(){+ + 1+});"),
        ("the mask of another block's queries", "dropout.keep([-token-]{+row+}, 16 * tile)"),
        ("the position of another block's queries", "dense(position, [-token-]{+row+});"),
        ("what is kept not scaled up", "open * [-up * -]entry"),
        ("the last keys left out", "16 * tile{+ + 16+} >= tokens"),
        ("the content not normalised", "return closed[- * reciprocal_approx(softmax.sum[half])-];"),
    ],
    ("whole-image backward, dropout", "whole_image_backward.cu"): [
        ("the mask of the untransposed scores",
         "mask.keep_transposed([-own.first(t), 16 * tile-]{+16 * tile, own.first(t)+})"),
        ("the mask of another (batch, head)", "const Mask mask(problem, block_x(){+ + 1+});"),
        ("dP without the mask", "[-grad = factor * grad;-]"),
        ("P with the signs that tell the mask", "word &= [-0x7fff7fffu-]{+~0u+};"),
        ("a tile that is there already counted in the positional sums", "counts([-own.counts(1) ? 1.0f : 0-]{+1+}.0f)"),
        ("the mean of d^2 along one axis alone",
         "position.along_x.mean_square(from.x)[- + position.along_y.mean_square(from.y)-]"),
    ],
    ("tiled", "tiled_forward.cu"): [
        ("missing barrier before the next keys", "copy_wait<0>(); [-sync_block();-] key_stage",
         r"race|cp\.async into it is not waited for"),
        ("missing wait for the next keys", "[-copy_wait<0>();-] sync_block(); key_stage",
         r"cp\.async into it is not waited for"),
        ("missing sync_warp before the queries are written over", "if constexpr (!has_dropout) { [-sync_warp();-]",
         "race: write to shared array queries"),
        ("a launch that reads what it writes", "lines_along_y(problem), [-mixed-]{+call.out+}, call.out}",
         "read of out (before it is written|in the launch that writes it)"),
        ("what was summed before not rescaled", "content[n].values[i] *= [-rescale[i / 2]-]{+1+};"),
        ("position without its gate", "+ [-open * -]p;"),
    ],
    ("tiled", "tiles.cuh"): [
        ("a collective called by some lanes of the forward kernel",
         "store(to + [-token-]{+(token + 0 * warp())+}, (shift", r"(divergence|deadlock).* warp\(\)"),
        ("mask of the last keys off by one", "+ i % 2 >[-=-] keys)"),
    ],
    ("tiled", "tiled.cuh"): [
        ("a row of the position read by one thread and written over by another",
         "const int row = (32 * turn +{+ 31 -+} lane()) / beside,", "write to out .* read by another thread"),
    ],
    ("tiled", "tiled_position.cuh"): [
        ("a line's last coordinates left out",
         "tile < lines.tiles() && start + 16 * tile [-<-]{++ 16 <=+} lines.size;"),
        ("a line's row left unwritten", "place.own_row, lines.size{+ - 1+}, head_dim);",
         "read of workspace array 1 before it is written"),
        ("transposed where it must not be", "entry = axis.entry([-i, j-]{+j, i+}, shift);"),
        ("a mean forgotten", "sums[0] += share * [-(d - mean)-]{+d+};"),
        ("g taken twice in the gradients of weights", "[-along_x ? open / early(call) : -]open;"),
    ],
    ("tiled", "tiled_backward.cu"): [
        ("a slot left unwritten", "slot_x = slot_y + along_y.blocks(){+ - 1+};",
         "sums is written twice|never written|read by another"),
        ("content overwritten before all have read it", "[-sync_block(); // all have read the content-]",
         "race: write to shared array values"),
        ("delta forgotten", "weights[t][n].values[i] *= grad_weights[t][n].values[i][- - delta[n][i % 2]-];"),
        ("numbers of queries stored a tile late", "store_number(number, stage[- ^ 1-]);", "race|uninitialised"),
        ("the content's gate forgotten in one gradient", "(sums, [-closed * -]problem.scale);"),
        ("g taken twice in dV", "+ [-late-]{+open+} * positional[n].values[i];"),
        ("1 - g missing in the content's part of the gate's gradient", "[-(n < 3 ? open : open * closed)-]{+open+}"),
    ],
    ("tiled, dropout", "tiled_forward.cu"): [
        ("a mask for the content alone", "entries[m].values[i] = [-kept ? entry : 0-]{+entry+};"),
    ],
    ("tiled, dropout", "tiled_backward.cu"): [
        ("another mask backward", "dropout.[-keep_transposed-]{+keep+}(query, key)"),
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
    ("kernels", "file", "bug"),
    [pytest.param(*where, bug, id=f"{where[0]}: {bug[0]}") for where, bugs in BUGS.items() for bug in bugs],
)
def test_a_planted_bug_is_caught(tmp_path, kernels, file, bug):
    _, change, message = (*bug, WRONG)[:3]
    csrc = emulation.changed_sources(tmp_path, file, change)
    check(kernels, csrc, lambda wrong: wrong is not None and re.search(message, wrong))
