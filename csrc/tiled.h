// The tiled kernels, for any number of tokens: what they are compiled for, how a grid is cut into blocks, and what lies
// in their workspace. Plain C++.
#pragma once

#include "gpsa.h"
#include "primitives.h"

namespace gpsa {

constexpr int tiled_threads = 128;
constexpr int tile_tokens = 64;  // of a block, 16 a warp; and as many it has in shared memory at a time

/// What a kernel is compiled for: element type and channels of a row in shared memory.
template <typename E_, int channels_>
struct Tiled {
    using E = E_;
    static constexpr int channels = channels_;
};

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

namespace tiled {

template <typename E, typename Visit>
const char* with_channels(const Problem& problem, Visit visit) {
    if (problem.head_dim <= 32) return visit(Tiled<E, 32>{});
    if (problem.head_dim <= 48) return visit(Tiled<E, 48>{});
    if (problem.head_dim <= 64) return visit(Tiled<E, 64>{});
    return visit(Tiled<E, 128>{});
}

/// Calls `visit` with the Tiled for a problem.
template <typename Visit>
const char* dispatch(const Problem& problem, Visit visit) {
    return problem.dtype == Dtype::float16 ? with_channels<Half>(problem, visit)
                                           : with_channels<Bfloat16>(problem, visit);
}

inline Lines along_x(const Problem& p) { return {p.columns, p.rows, 1, p.columns, true}; }
inline Lines along_y(const Problem& p) { return {p.rows, p.columns, p.columns, 1, false}; }

/// Tiles of the tokens of a (batch, head).
GPSA_HOST_DEVICE int tiles(const Problem& p) { return (p.rows * p.columns + tile_tokens - 1) / tile_tokens; }

/// Blocks of an attention kernel, one per tile of tokens.
inline int64_t blocks(const Problem& p) { return p.batch * p.heads * tiles(p); }

/// A (B, H, N, D) array without gaps.
inline Tensor contiguous_tensor(const Problem& p, void* data) {
    const int64_t head = int64_t{p.rows} * p.columns * p.head_dim;
    return {data, p.heads * head, head, p.head_dim};
}

/// The arrays of a workspace, one after the other at multiples of 256 bytes: where each begins, and its size.
class Workspace {
public:
    static constexpr int arrays = 4;
    int64_t begin[arrays] = {}, size[arrays] = {}, bytes = 0;
    int count = 0;

    template <typename T>
    T* array(void* workspace, int index) const {
        return reinterpret_cast<T*>(static_cast<char*>(workspace) + begin[index]);
    }

protected:
    int add(int64_t wanted) {
        begin[count] = bytes;
        size[count] = wanted;
        bytes += (wanted + 255) / 256 * 256;
        return count++;
    }
    static int64_t statistics_bytes(const Problem& p) { return int64_t{12} * p.heads * (p.rows + p.columns); }
    static int64_t tokens(const Problem& p) { return p.batch * p.heads * p.rows * p.columns; }
};

/// `statistics` (H, 3, C + R) float32: of every coordinate of both axes, what GridAxis says; `mixed` (B, H, N, D): V
/// mixed along x.
struct ForwardWorkspace : Workspace {
    int statistics, mixed = -1;

    explicit ForwardWorkspace(const Problem& p) : statistics(add(statistics_bytes(p))) {
        if (p.dropout_p == 0) mixed = add(tokens(p) * p.head_dim * 2);
    }
};

/// `statistics` and `mixed` as above; `mixed_grad` (B, H, N, D): dO mixed along y; `delta` (B, H, N) float32.
struct BackwardWorkspace : Workspace {
    int statistics, delta, mixed = -1, mixed_grad = -1;

    explicit BackwardWorkspace(const Problem& p) : statistics(add(statistics_bytes(p))), delta(add(tokens(p) * 4)) {
        if (p.dropout_p > 0) return;
        mixed = add(tokens(p) * p.head_dim * 2);
        mixed_grad = add(tokens(p) * p.head_dim * 2);
    }
};

/// Slots of `sums`: of the blocks of queries; without dropout also of those along y, then of those along x.
inline int slots(const Problem& p) {
    return tiles(p) + (p.dropout_p > 0 ? 0 : along_y(p).blocks() + along_x(p).blocks());
}

}  // namespace tiled
}  // namespace gpsa
