// Forward for any number of tokens: the positional branch goes to `out` (tiled_position.cuh), and one block per 64
// query rows of a (batch, head) adds the content branch.
//
//   O = (1 - g) softmax(scale Q K^T) V + g O_pos,   g = sigmoid(gate)
//
// 64 keys (32 with dropout) and their values are in shared memory while the next are copied; a warp has 16 query rows,
// their largest scores and sums of exponentials so far (online softmax). Global traffic of a block: K and V of the
// (batch, head) once, its rows of Q once, of `out` read once and written once; of `content` and logsumexp, where
// wanted, written once.
//
// With attention dropout the positional branch is no product of two axes any more: its entries are formed beside those
// of the content, one exponential each, and `out` is only written.
#pragma once

#include <cfloat>

#include "dropout.cuh"
#include "tiled_position.cuh"

namespace gpsa {

struct TiledForwardCall {
    Forward forward;
    const float* statistics;
};

template <typename Config, bool has_dropout>
struct TiledForward {
    using E = typename Config::E;
    using Call = TiledForwardCall;
    static constexpr int channels = Config::channels;
    static constexpr int tile_keys = has_dropout ? 32 : 64;  // there are more registers for the scores of 64 without
    static constexpr int blocks_per_multiprocessor = has_dropout ? (channels > 64 ? 1 : 2) : channels > 48 ? 2 : 3;

    static int shared_bytes() { return (tile_tokens + 4 * tile_keys) * channels * 2; }
    static int64_t blocks(const Call& call) { return tiled::blocks(call.forward.problem); }

    GPSA_DEVICE static void run(const Call& arguments) {
        const Forward& call = arguments.forward;
        const Problem& problem = call.problem;
        const Block block(problem);

        SharedMemory memory;
        const Tile queries{memory.array<E>(tile_tokens * channels, "queries")};
        const Shared<E> keys = memory.array<E>(2 * tile_keys * channels, "keys");
        const Shared<E> values = memory.array<E>(2 * tile_keys * channels, "values");
        const auto copy = [&](const Tile& to, Global<const E> from, int64_t stride, int start, int count) {
            copy_rows(to, from + start * stride, stride, block.tokens - start, count, problem.head_dim);
        };
        const Global<const E> k = rows_of<const E>(call.k, block.batch, block.head);
        const Global<const E> v = rows_of<const E>(call.v, block.batch, block.head);
        const auto fetch = [&](int start, int stage) {
            copy({keys, stage * tile_keys}, k, call.k.token, start, tile_keys);
            copy({values, stage * tile_keys}, v, call.v.token, start, tile_keys);
            copy_commit();
        };
        copy(queries, rows_of<const E>(call.q, block.batch, block.head), call.q.token, block.first, tile_tokens);
        fetch(0, 0);
        copy_wait<0>();
        sync_block();

        const Tile own{queries.base, 16 * warp()};  // queries, then what the epilogue reads and writes
        Left q[channels / 16];
        load_rows(q, own);
        if constexpr (!has_dropout) {
            sync_warp();
            fetch_own_rows(own, call.out, block, problem.head_dim);
        }

        const Mask mask(call, arguments.statistics, block);
        Softmax softmax;
        Sum content[channels / 8] = {}, position[channels / 8] = {};
        int stage = 0;
#pragma unroll 1
        for (int start = 0; start < block.tokens; start += tile_keys, stage ^= 1) {
            if (start + tile_keys < block.tokens) fetch(start + tile_keys, stage ^ 1);
            Sum scores[tile_keys / 8] = {};
            score(scores, q, {keys, stage * tile_keys});
            softmax.exponentiate(scores, content, problem.scale, block.tokens - start);
            weigh(content, position, scores, {values, stage * tile_keys}, mask, block.row, start);
            copy_wait<0>();
            sync_block();
        }
        for (float& sum : softmax.sum) sum = row_sum(sum);
        if (call.logsumexp) {
            const Global<float> to = Global<float>(call.logsumexp) + block.batch_head * block.tokens;
            store_logsumexp(to, block.row, block.tokens, softmax.shift, softmax.sum);
        }

        const float keep_scale = mask.keep_scale();
        float share[2];
        for (int half = 0; half < 2; ++half) share[half] = keep_scale * reciprocal_approx(softmax.sum[half]);
        for (int n = 0; n < channels / 8; ++n) {
            for (int i = 0; i < 4; ++i) content[n].values[i] *= share[i / 2];
        }
        const float gate = load(Global<const float>(call.gate) + block.head);
        const float open = sigmoid(gate), closed = sigmoid(-gate);  // 1 - g would lose its digits as g -> 1
        if constexpr (has_dropout) {
            scale_rows<channels>(position, keep_scale);
        } else {
            unstage_rows<E, channels>(position, own);
        }
        for (int n = 0; n < channels / 8; ++n) {
            for (int i = 0; i < 4; ++i) {
                position[n].values[i] = closed * content[n].values[i] + open * position[n].values[i];
            }
        }
        store_own_rows(position, own, call.out, block, problem.head_dim);
        if (call.content.data) store_own_rows(content, own, call.content, block, problem.head_dim);
    }

private:
    using Tile = Rows<E, channels>;

    /// Of rows r and r + 8: the largest score so far, and this lane's sum of exponentials relative to it.
    struct Softmax {
        float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, shift[2] = {0, 0};

        /// scores = exp(scale (scores - the row's largest)), exactly 0 for keys that do not exist; what was summed
        /// before is made relative to the same.
        GPSA_DEVICE void exponentiate(Sum* scores, Sum* content, float scale, int keys) {
            if (scale < 0) {
                scale = -scale;
#pragma unroll
                for (int n = 0; n < tile_keys / 8; ++n) {
                    for (float& s : scores[n].values) s = -s;
                }
            }
            // A scale of 0 is replaced by one whose products vanish beside 1 but still keep -inf.
            const float log2_scale = scale == 0 ? FLT_MIN : scale * log2_e;
            if (keys < tile_keys) {
#pragma unroll
                for (int n = 0; n < tile_keys / 8; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        if (8 * n + fragment_column() + i % 2 >= keys) scores[n].values[i] = -INFINITY;
                    }
                }
            }
            float rescale[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float most = largest[half];
#pragma unroll
                for (int n = 0; n < tile_keys / 8; ++n) {
                    most = maximum(most, maximum(scores[n].values[2 * half], scores[n].values[2 * half + 1]));
                }
                most = row_maximum(most);
                shift[half] = most == -INFINITY ? 0 : most * log2_scale;  // -inf - -inf is not 0
                rescale[half] = exp2_approx(largest[half] * log2_scale - shift[half]);
                largest[half] = most;
                sum[half] *= rescale[half];
            }
#pragma unroll
            for (int n = 0; n < channels / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) content[n].values[i] *= rescale[i / 2];
            }
#pragma unroll
            for (int n = 0; n < tile_keys / 8; ++n) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float* pair = &scores[n].values[2 * half];
                    for (int i = 0; i < 2; ++i) pair[i] = exp2_approx(pair[i] * log2_scale - shift[half]);
                    sum[half] += pair[0] + pair[1];
                }
            }
        }
    };

    /// What attention dropout needs beside the content; nothing without it.
    struct NoMask {
        GPSA_DEVICE NoMask(const Forward&, const float*, const Block&) {}
        GPSA_DEVICE float keep_scale() const { return 1; }
    };
    struct DropoutMask {
        const Dropout dropout;
        const DenseRows<GridAxis> dense;
        GPSA_DEVICE DropoutMask(const Forward& call, const float* statistics, const Block& block)
            : dropout(call.problem, block.batch_head),
              dense(dense_position(call.problem, call.pos_weight, statistics, block.head), block.row) {}
        GPSA_DEVICE float keep_scale() const { return dropout.keep_scale; }
    };
    using Mask = std::conditional_t<has_dropout, DropoutMask, NoMask>;

    /// scores = Q K^T for 16 rows of Q and a tile of keys.
    GPSA_DEVICE static void score(Sum* scores, const Left* q, const Tile& k) {
#pragma unroll
        for (int n = 0; n < tile_keys / 16; ++n) {
#pragma unroll
            for (int s = 0; s < channels / 16; ++s) {
                const Right b = load_right_over_channels<E>(s, [&](int j, int chunk) { return k.chunk(j, chunk, n); });
                multiply<E>(&scores[2 * n], q[s], b);
            }
        }
    }

    /// content += P V, P rounded to 16 bits; with dropout position += R V, too, and of both only what is kept.
    GPSA_DEVICE static void weigh(
        Sum* content, Sum* position, Sum* weights, const Tile& v, const Mask& mask, int row, int start) {
#pragma unroll
        for (int n = 0; n < tile_keys / 16; ++n) {
            Left dense{};
            if constexpr (has_dropout) {
                Sum entries[2];
                const uint32_t keep = mask.dropout.keep(row, start + 16 * n);
                mask.dense.entries(start + 16 * n, [&](int m, int i, float entry, int, float, float) {
                    const bool kept = keep >> (4 * m + i) & 1;
                    entries[m].values[i] = kept ? entry : 0;
                    if (!kept) weights[2 * n + m].values[i] = 0;
                });
                dense = as_left<E>(entries);
            }
            const Left a = as_left<E>(&weights[2 * n]);
#pragma unroll
            for (int s = 0; s < channels / 16; ++s) {
                const Right b = load_right_over_tokens<E>(s, [&](int j, int chunk) { return v.chunk(j, chunk, n); });
                multiply<E>(&content[2 * s], a, b);
                if constexpr (has_dropout) multiply<E>(&position[2 * s], dense, b);
            }
        }
    }
};

/// The launches of a forward call, in order: `launch(kernel, call)` for each, until one says why not.
template <typename Config, typename Launch>
const char* tiled_forward(const Forward& call, Launch launch) {
    const Problem& problem = call.problem;
    const tiled::ForwardWorkspace workspace(problem);
    auto* const statistics = workspace.array<float>(call.workspace, workspace.statistics);
    const char* error = launch(PositionStatistics{}, StatisticsCall{problem, call.pos_weight, statistics});
    const TiledForwardCall attention{call, statistics};
    if (problem.dropout_p > 0) return error ? error : launch(TiledForward<Config, true>{}, attention);
    const Tensor mixed = tiled::contiguous_tensor(problem, workspace.array<void>(call.workspace, workspace.mixed));
    const Lines along_x = tiled::along_x(problem), along_y = tiled::along_y(problem);
    const MixCall mix_x{problem, along_x, call.pos_weight, statistics, call.v, mixed, {}, nullptr, nullptr, 0, 0};
    const MixCall mix_y{problem, along_y, call.pos_weight, statistics, mixed, call.out, {}, nullptr, nullptr, 0, 0};
    if (!error) error = launch(MixLines<Config, false>{}, mix_x);
    if (!error) error = launch(MixLines<Config, false>{}, mix_y);
    return error ? error : launch(TiledForward<Config, false>{}, attention);
}

}  // namespace gpsa
