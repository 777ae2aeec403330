// Which whole-image kernel serves a problem, and with how many blocks and bytes. Plain C++.
#pragma once

#include "gpsa.h"
#include "primitives.h"

namespace gpsa {

constexpr int whole_image_tokens = 256;  // the most that a row of scores in registers can have
constexpr int whole_image_threads = 128;

/// What a kernel is compiled for: element type, channels of a row in shared memory, tiles of 16 keys in a score row.
template <typename E_, int channels_, int key_tiles_>
struct WholeImage {
    using E = E_;
    static constexpr int channels = channels_;
    static constexpr int key_tiles = key_tiles_;
};

namespace whole_image {

template <typename E, int channels, typename Visit>
const char* with_keys(const Problem& problem, Visit visit) {
    const int tokens = problem.rows * problem.columns;
    if (tokens <= 64) return visit(WholeImage<E, channels, 4>{});
    if (tokens <= 208) return visit(WholeImage<E, channels, 13>{});  // 13 tiles: 14 x 14 tokens
    return visit(WholeImage<E, channels, 16>{});
}

template <typename E, typename Visit>
const char* with_channels(const Problem& problem, Visit visit) {
    if (problem.head_dim <= 32) return with_keys<E, 32>(problem, visit);
    if (problem.head_dim <= 48) return with_keys<E, 48>(problem, visit);
    if (problem.head_dim <= 64) return with_keys<E, 64>(problem, visit);
    return with_keys<E, 128>(problem, visit);
}

/// Calls `visit` with the WholeImage for a problem.
template <typename Visit>
const char* dispatch(const Problem& problem, Visit visit) {
    return problem.dtype == Dtype::float16 ? with_channels<Half>(problem, visit)
                                           : with_channels<Bfloat16>(problem, visit);
}

constexpr int dropout_channels = 64;  // with more there are no registers for scores, R and the output

/// Whether the forward kernels serve a problem, given enough shared memory.
inline bool forward_fits(const Problem& problem) {
    return static_cast<int64_t>(problem.rows) * problem.columns <= whole_image_tokens &&
           (problem.dropout_p == 0 || problem.head_dim <= dropout_channels);
}

/// Into how many blocks the query rows of a (batch, head) are split: enough to give every multiprocessor one, and no
/// more than there are tiles of 16 rows for all warps of a block.
inline int row_blocks(const Problem& problem, int multiprocessors) {
    const int tiles = (problem.rows * problem.columns + 15) / 16;
    const int most = (tiles + whole_image_threads / 32 - 1) / (whole_image_threads / 32);
    const int64_t batch_heads = problem.batch * problem.heads;
    const int64_t wanted = batch_heads > 0 ? (multiprocessors + batch_heads - 1) / batch_heads : 1;
    const int64_t row_blocks = wanted < most ? wanted : most;
    return row_blocks > 1 ? static_cast<int>(row_blocks) : 1;
}

/// Query rows of a block, but for the last one's.
GPSA_HOST_DEVICE int rows_per_block(int tokens, int row_blocks) {
    return ((tokens + 15) / 16 + row_blocks - 1) / row_blocks * 16;
}

}  // namespace whole_image
}  // namespace gpsa
