// What the tiled kernels share: the 64 tokens of a block, and the 16 rows of a warp on their way between global memory,
// shared memory and registers.
#pragma once

#include "tiled.h"
#include "tiles.cuh"

namespace gpsa {

/// The place of a block of an attention kernel: which `rows` tokens of which (batch, head).
struct Block {
    int tokens, head, first, row;  // row: the first of this warp's
    int64_t batch_head, batch;

    GPSA_DEVICE explicit Block(const Problem& problem, int rows = tile_tokens)
        : tokens(problem.rows * problem.columns),
          first(block_x() % tiled::tiles(problem, rows) * rows),
          row(first + rows / (tiled_threads / 32) * warp()),
          batch_head(block_x() / tiled::tiles(problem, rows)) {
        const int index = static_cast<int>(batch_head);  // a division of 32 bits is the faster one
        batch = index / problem.heads;
        head = index % problem.heads;
    }
};

/// The tokens of a (batch, head), `count` at a time, on their way into one of two stages of shared memory. A thread's
/// addresses advance by constants: rows of all its turns and tiles are a multiple of 8 apart, and swizzled alike.
template <typename E, int channels, int count>
class RowStream {
public:
    GPSA_DEVICE RowStream(const Tensor& tensor, const Block& block, int first, Shared<E> stages, int head_dim)
        : from(rows_of<const E>(tensor, block.batch, block.head) + (first + row()) * tensor.token),
          to(Rows<E, channels>{stages}.chunk(row(), thread() % beside)),
          stride(tensor.token),
          left(block.tokens - first - row()),
          head_dim(head_dim) {}

    /// Starts copying the next ones, zeros where there are none.
    GPSA_DEVICE void fetch(int stage) {
#pragma unroll
        for (int first = 0; first < count; first += turn) {
            if (count < turn && row() >= count) break;  // not all threads have one
            copy_chunks<chunks>(to + (stage * count + first) * channels, from, first < left, head_dim);
            from = from + (count < turn ? count : turn) * stride;
        }
        left -= count;
    }

private:
    static constexpr int chunks = channels / 8, beside = ChunkShare<chunks>::beside, turn = tiled_threads / beside;
    static_assert(turn % 8 == 0 && (count % turn == 0 || turn % count == 0), "all rows of a thread are swizzled alike");
    Global<const E> from;
    const Shared<E> to;
    const int64_t stride;
    int left;
    const int head_dim;

    GPSA_DEVICE static int row() { return thread() / beside; }
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

/// Starts copying 16 tokens from `first` on into a warp's own rows.
template <typename E, int channels>
GPSA_DEVICE void fetch_own_rows(
    const Rows<E, channels>& rows, const Tensor& tensor, const Block& block, int first, int head_dim) {
    const Global<const E> from = rows_of<const E>(tensor, block.batch, block.head);
    constexpr int chunks = channels / 8, beside = ChunkShare<chunks>::beside;
#pragma unroll
    for (int turn = 0; turn < ChunkShare<chunks>::turns; ++turn) {
        const int row = (32 * turn + lane()) / beside, token = first + row;
        copy_chunks<chunks>(
            rows.chunk(row, lane() % beside), from + token * tensor.token, token < block.tokens, head_dim);
    }
    copy_commit();
}

/// 16 accumulated rows, rounded, by way of this warp's `staged` to the tokens from `first` on, 16 bytes a lane.
template <typename E, int channels>
GPSA_DEVICE void store_own_rows(
    const Sum* sums, const Rows<E, channels>& staged, const Tensor& to, const Block& block, int first, int head_dim) {
    sync_warp();
    stage_rows<E, channels>(sums, staged);
    sync_warp();
    store_rows<channels / 8>(
        rows_of<E>(to, block.batch, block.head), to.token, first, block.tokens, 0, head_dim,
        [&](int token, int chunk) { return staged.chunk(token - first, chunk); });
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
