// What the tiled kernels share: the 64 tokens of a block, and the 16 rows of a warp on their way between global memory,
// shared memory and registers.
#pragma once

#include "tiled.h"
#include "tiles.cuh"

namespace gpsa {

/// A block of an attention kernel: which 64 tokens of which (batch, head).
struct Block {
    int tokens, head, first, row;  // row: the first of this warp's 16
    int64_t batch_head, batch;

    GPSA_DEVICE explicit Block(const Problem& problem)
        : tokens(problem.rows * problem.columns),
          first(block_x() % tiled::tiles(problem) * tile_tokens),
          row(first + 16 * warp()),
          batch_head(block_x() / tiled::tiles(problem)) {
        const int index = static_cast<int>(batch_head);  // a division of 32 bits is the faster one
        batch = index / problem.heads;
        head = index % problem.heads;
    }
};

/// The 16 rows of a warp as left operands.
template <typename E, int channels>
GPSA_DEVICE void load_rows(Left* rows, const Rows<E, channels>& from) {
#pragma unroll
    for (int s = 0; s < channels / 16; ++s) {
        rows[s] = load_left<E>(s, [&](int i, int chunk) { return from.chunk(i, chunk); });
    }
}

/// 16 accumulated rows, rounded, as rows in shared memory.
template <typename E, int channels>
GPSA_DEVICE void stage_rows(const Sum* sums, const Rows<E, channels>& staged) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < channels / 8; ++n) {
            const float* pair = &sums[n].values[2 * half];
            store_pair<E>(staged.chunk(fragment_row() + 8 * half, n) + fragment_column(), pack<E>(pair[0], pair[1]));
        }
    }
}

/// The reverse, of elements that this lane holds.
template <typename E, int channels>
GPSA_DEVICE void unstage_rows(Sum* sums, const Rows<E, channels>& staged) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < channels / 8; ++n) {
            const Pair p = unpack<E>(load_pair<E>(staged.chunk(fragment_row() + 8 * half, n) + fragment_column()));
            sums[n].values[2 * half] = p.low;
            sums[n].values[2 * half + 1] = p.high;
        }
    }
}

/// Starts copying a warp's tokens into rows of its own.
template <typename E, int channels>
GPSA_DEVICE void fetch_own_rows(const Rows<E, channels>& rows, const Tensor& tensor, const Block& block, int head_dim) {
    const Global<const E> from = rows_of<const E>(tensor, block.batch, block.head);
    constexpr int chunks = channels / 8, beside = ChunkShare<chunks>::beside;
#pragma unroll
    for (int turn = 0; turn < ChunkShare<chunks>::turns; ++turn) {
        const int row = (32 * turn + lane()) / beside, token = block.row + row;
        copy_chunks<chunks>(
            rows.chunk(row, lane() % beside), from + token * tensor.token, token < block.tokens, head_dim);
    }
    copy_commit();
}

/// Accumulated rows, rounded, by way of this warp's `staged` to global memory, 16 bytes a lane.
template <typename E, int channels>
GPSA_DEVICE void store_own_rows(
    const Sum* sums, const Rows<E, channels>& staged, const Tensor& to, const Block& block, int head_dim) {
    sync_warp();
    stage_rows<E, channels>(sums, staged);
    sync_warp();
    store_rows<channels / 8>(
        rows_of<E>(to, block.batch, block.head), to.token, block.row, block.tokens, 0, head_dim,
        [&](int token, int chunk) { return staged.chunk(token - block.row, chunk); });
}

/// Accumulated rows times a factor.
template <int channels>
GPSA_DEVICE void scale_rows(Sum* sums, float factor) {
#pragma unroll
    for (int n = 0; n < channels / 8; ++n) {
#pragma unroll
        for (float& value : sums[n].values) value *= factor;
    }
}

/// The sums over a block's 4 warps of what each lane holds, for thread 0. `partial`: room for 4 * count numbers.
template <int count>
GPSA_DEVICE void add_up(float (&result)[count], const float (&values)[count], Shared<float> partial) {
    const Shared<float> own = partial + count * warp();  // by all lanes: warp() is a shuffle
#pragma unroll
    for (int n = 0; n < count; ++n) {
        const float sum = warp_sum(values[n]);
        if (lane() == 0) store(own + n, sum);
    }
    sync_block();
    if (thread() != 0) return;
    for (int n = 0; n < count; ++n) {
        result[n] = load(partial + n);
        for (int w = 1; w < tiled_threads / 32; ++w) result[n] += load(partial + (count * w + n));
    }
}

}  // namespace gpsa
