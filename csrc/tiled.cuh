// What the tiled kernels, for any number of tokens, share: how a grid is cut into blocks, what lies in their workspace,
// how they are launched, and how a warp's rows move between global memory, shared memory and registers.
#pragma once

#include "launch.h"
#include "tiles.cuh"

namespace gpsa {

constexpr int tiled_threads = 128, tiled_warps = 4;
constexpr int tile_tokens = 64;  // of a block, 16 a warp; and as many it has in shared memory at a time

/// Tiles of `rows` tokens of a (batch, head).
GPSA_HOST_DEVICE int token_tiles(const Problem& p, int rows = tile_tokens) {
    return (p.rows * p.columns + rows - 1) / rows;
}

/// Blocks of an attention kernel, one per tile of tokens.
inline int64_t tiled_blocks(const Problem& p, int rows) { return p.batch * p.heads * token_tiles(p, rows); }

/// The lines of a grid along one axis, and how they are shared out: a block has up to 4 tiles of 16 coordinates of a
/// line, a warp each, and as many lines as it takes to have work for 4 warps.
struct Lines {
    int size, count;      // tokens of a line, lines
    int step, line_step;  // from a token to the next one of its line, from a line to the next
    bool along_x;

    GPSA_HOST_DEVICE int all_tiles() const { return (size + 15) / 16; }
    GPSA_HOST_DEVICE int tiles() const { return all_tiles() < 4 ? all_tiles() : 4; }
    GPSA_HOST_DEVICE int width() const { return 16 * tiles(); }
    /// log2 of how many of a block's 4 tiles a line takes: shifts are faster than divisions.
    GPSA_HOST_DEVICE int log2_room() const { return tiles() < 3 ? tiles() - 1 : 2; }
    GPSA_HOST_DEVICE int together() const { return 4 >> log2_room(); }
    GPSA_HOST_DEVICE int blocks_per_line() const { return (all_tiles() + 3) / 4; }
    GPSA_HOST_DEVICE int blocks() const { return ((count + together() - 1) >> (2 - log2_room())) * blocks_per_line(); }
    GPSA_HOST_DEVICE int token(int line, int i) const { return line * line_step + i * step; }
};

inline Lines lines_along_x(const Problem& p) { return {p.columns, p.rows, 1, p.columns, true}; }
inline Lines lines_along_y(const Problem& p) { return {p.rows, p.columns, p.columns, 1, false}; }

/// Slots of `sums`: of the blocks of queries; without dropout also of those along y, then of those along x.
inline int tiled_slots(const Problem& p) {
    return token_tiles(p) + (p.dropout_p > 0 ? 0 : lines_along_y(p).blocks() + lines_along_x(p).blocks());
}

/// The arrays of a workspace, one after the other at multiples of 256 bytes; those that a call does not need are empty.
struct TiledWorkspace {
    enum { statistics, mixed, delta, mixed_grad, arrays };
    int64_t begin[arrays], size[arrays], bytes = 0;

    TiledWorkspace(const Problem& p, bool backward) {
        const int64_t tokens = p.batch * p.heads * p.rows * p.columns;
        const int64_t mix = p.dropout_p > 0 ? 0 : tokens * p.head_dim * 2;
        size[statistics] = int64_t{12} * p.heads * (p.rows + p.columns);  // (H, C + R, 3) float32, as Axis reads them
        size[mixed] = mix;                                                // (B, H, N, D): V mixed along x
        size[delta] = backward ? tokens * 4 : 0;                          // (B, H, N) float32
        size[mixed_grad] = backward ? mix : 0;                            // (B, H, N, D): dO mixed along y
        for (int i = 0; i < arrays; ++i) {
            begin[i] = bytes;
            bytes += (size[i] + 255) / 256 * 256;
        }
    }
    float* floats(void* workspace, int index) const {
        return reinterpret_cast<float*>(static_cast<char*>(workspace) + begin[index]);
    }
    /// A (B, H, N, D) array without gaps.
    Tensor tensor(const Problem& p, void* workspace, int index) const {
        const int64_t head = int64_t{p.rows} * p.columns * p.head_dim;
        return {static_cast<char*>(workspace) + begin[index], p.heads * head, head, p.head_dim};
    }
};

struct TiledKernel {
    static constexpr int most_threads(int) { return tiled_threads; }

    /// `wanted` blocks share a multiprocessor and its registers. With those of three, forward for 48 channels spills on
    /// sm_100.
    static constexpr int sharing(int wanted, int architecture) {
        return wanted == 3 && architecture >= 1000 ? 2 : wanted;
    }
};

/// Launches tiled kernels one after the other, until one cannot be.
struct TiledLauncher {
    const Launcher& launch;
    const char* error = nullptr;

    template <typename Kernel>
    void operator()(Kernel kernel, const typename Kernel::Call& call) {
        if (error) return;
        const int64_t blocks = Kernel::blocks(call);
        error = blocks > 0x7fffffff ? "the problem needs more than 2^31 blocks"
                                    : launch(kernel, {blocks, tiled_threads, Kernel::shared_bytes()}, call);
    }
};

/// The place of a block of an attention kernel: which `rows` tokens of which (batch, head).
struct Block {
    int tokens, head, first, row;  // row: the first of this warp's
    int64_t batch_head, batch;

    GPSA_DEVICE explicit Block(const Problem& problem, int rows = tile_tokens)
        : tokens(problem.rows * problem.columns),
          first(block_x() % token_tiles(problem, rows) * rows),
          row(first + rows / tiled_warps * warp()),
          batch_head(block_x() / token_tiles(problem, rows)) {
        const int index = int(batch_head);  // a division of 32 bits is the faster one
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

/// A warp's own rows as a left operand.
template <typename E, int channels>
GPSA_DEVICE void load_own_rows(Left (&a)[channels / 16], const Rows<E, channels>& rows) {
    load_left<E>(a, [&](int i, int chunk) { return rows.chunk(i, chunk); });
}

/// The elements of a warp's own rows that this lane holds of accumulators.
template <typename E, int channels>
GPSA_DEVICE void unstage_own_rows(Sum* sums, const Rows<E, channels>& rows) {
    each_pair<channels / 8>([&](int half, int n) {
        const Pair p = unpack<E>(load_pair<E>(rows.chunk(fragment_row() + 8 * half, n) + fragment_column()));
        sums[n].values[2 * half] = p.low;
        sums[n].values[2 * half + 1] = p.high;
    });
}

/// 16 accumulated rows, rounded, by way of this warp's `staged` to the tokens from `first` on, 16 bytes a lane.
template <typename E, int channels>
GPSA_DEVICE void store_own_rows(
    const Sum* sums, const Rows<E, channels>& staged, Global<E> to, int64_t stride, int first, int tokens,
    int head_dim) {
    sync_warp();
    stage_rows<E, channels>(sums, 0, 16, [&](int i, int chunk) { return staged.chunk(i, chunk); });
    sync_warp();
    store_rows<channels>(
        to, stride, first, tokens, head_dim, [&](int token, int chunk) { return staged.chunk(token - first, chunk); });
}
template <typename E, int channels>
GPSA_DEVICE void store_own_rows(
    const Sum* sums, const Rows<E, channels>& staged, const Tensor& to, const Block& block, int first, int head_dim) {
    store_own_rows(sums, staged, rows_of<E>(to, block.batch, block.head), to.token, first, block.tokens, head_dim);
}

}  // namespace gpsa
