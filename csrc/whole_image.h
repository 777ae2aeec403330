// Which whole-image kernel serves a problem, and with how many blocks and bytes. Plain C++.
#pragma once

#include "dispatch.h"

namespace gpsa {

constexpr int whole_image_tokens = 256;         // the most that a row of scores in registers can have
constexpr int whole_image_threads = 128;        // of a block of which several share a multiprocessor
constexpr int whole_image_threads_alone = 256;  // of one that has it alone, in as many registers as two

/// What a kernel is compiled for: element type, channels of a row in shared memory, tiles of 16 keys in a score row.
template <typename E_, int channels_, int key_tiles_>
struct WholeImage {
    using E = E_;
    static constexpr int channels = channels_;
    static constexpr int key_tiles = key_tiles_;
};

namespace whole_image {

template <typename E, int channels>
using FewKeys = WholeImage<E, channels, 4>;

/// Calls `visit` with the WholeImage for a problem.
template <typename Visit>
const char* dispatch(const Problem& problem, Visit visit) {
    return gpsa::dispatch<FewKeys>(problem, [&](auto few) {
        using Few = decltype(few);
        const int tokens = problem.rows * problem.columns;
        if (tokens <= 64) return visit(few);
        if (tokens <= 208) return visit(WholeImage<typename Few::E, Few::channels, 13>{});  // 13 tiles: 14 x 14 tokens
        return visit(WholeImage<typename Few::E, Few::channels, 16>{});
    });
}

constexpr int dropout_channels = 64;  // with more there are no registers for scores, R and the output

/// Whether the forward kernels serve a problem, given enough shared memory.
inline bool forward_fits(const Problem& problem) {
    return static_cast<int64_t>(problem.rows) * problem.columns <= whole_image_tokens &&
           (problem.dropout_p == 0 || problem.head_dim <= dropout_channels);
}

/// Into how many blocks the query rows of a (batch, head) are split: as many as have a multiprocessor each, or, where
/// there are more (batch, head)s than these, as many as run at once, `resident` on each; and no more than there are
/// tiles of 16 rows for all `warps` of a block.
inline int row_blocks(const Problem& problem, int multiprocessors, int resident, int warps) {
    const int tiles = (problem.rows * problem.columns + 15) / 16;
    const int most = (tiles + warps - 1) / warps;
    const int64_t batch_heads = problem.batch * problem.heads;
    const int64_t at_once = batch_heads > multiprocessors ? int64_t{multiprocessors} * resident : multiprocessors;
    const int64_t row_blocks = batch_heads > 0 ? at_once / batch_heads : 1;
    return row_blocks < 1 ? 1 : row_blocks < most ? static_cast<int>(row_blocks) : most;
}

/// Query rows of a block, but for the last one's.
GPSA_HOST_DEVICE int rows_per_block(int tokens, int row_blocks) {
    return ((tokens + 15) / 16 + row_blocks - 1) / row_blocks * 16;
}

}  // namespace whole_image
}  // namespace gpsa
