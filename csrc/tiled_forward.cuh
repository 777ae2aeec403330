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
    static constexpr int tile_keys = 64, score_keys = 32;  // in a stage of shared memory; of which scores are held
    // Of a warp, 16 rows each: two share what is read of K and V, if there are registers for both.
    static constexpr int row_tiles = has_dropout || channels > 64 ? 1 : 2;
    static constexpr int block_rows = row_tiles * tile_tokens;
    static constexpr int blocks_per_multiprocessor = has_dropout ? (channels > 64 ? 1 : 2) : channels > 48 ? 2 : 3;

    static int shared_bytes() { return (block_rows + 4 * tile_keys) * channels * 2; }
    static int64_t blocks(const Call& call) { return tiled::blocks(call.forward.problem, block_rows); }

    GPSA_DEVICE static void run(const Call& arguments) {
        const Forward& call = arguments.forward;
        const Problem& problem = call.problem;
        const Block block(problem, block_rows);

        SharedMemory memory;
        const Tile queries{memory.array<E>(block_rows * channels, "queries")};
        const Shared<E> keys = memory.array<E>(2 * tile_keys * channels, "keys");
        const Shared<E> values = memory.array<E>(2 * tile_keys * channels, "values");
        RowStream<E, channels, tile_keys> key_stream(call.k, block, keys, problem.head_dim);
        RowStream<E, channels, tile_keys> value_stream(call.v, block, values, problem.head_dim);
        const auto fetch = [&](int stage) {
            key_stream.fetch(stage);
            value_stream.fetch(stage);
            copy_commit();
        };
        const Global<const E> q_rows = rows_of<const E>(call.q, block.batch, block.head) + block.first * call.q.token;
        copy_rows(queries, q_rows, call.q.token, block.tokens - block.first, block_rows, problem.head_dim);
        fetch(0);
        copy_wait<0>();
        sync_block();

        const auto own = [&](int t) {  // a tile of queries, then what the epilogue reads and writes
            return Tile{queries.base, 16 * (row_tiles * warp() + t)};
        };
        Left q[row_tiles][channels / 16];
#pragma unroll
        for (int t = 0; t < row_tiles; ++t) load_rows(q[t], own(t));
        if constexpr (!has_dropout) {
            sync_warp();
#pragma unroll
            for (int t = 0; t < row_tiles; ++t) fetch_own_rows(own(t), call.out, block.tile(t), problem.head_dim);
        }

        const float log2_scale = Softmax::log2_scale(problem.scale, &q[0][0], row_tiles * (channels / 16));
        const Mask mask(call, arguments.statistics, block);
        Softmax softmax[row_tiles];
        Sum content[row_tiles][channels / 8] = {}, position[row_tiles][channels / 8] = {};
        int stage = 0;
#pragma unroll 1
        for (int start = 0; start < block.tokens; start += tile_keys, stage ^= 1) {
            if (start + tile_keys < block.tokens) fetch(stage ^ 1);
#pragma unroll 1
            for (int key = start; key < smaller(start + tile_keys, block.tokens); key += score_keys) {
                const int row = stage * tile_keys + key - start;
                Sum scores[row_tiles][score_keys / 8] = {};
                score(scores, q, {keys + row * channels});
                float largest[row_tiles][2];
                bool must_shift = false;
#pragma unroll
                for (int t = 0; t < row_tiles; ++t) {
                    Softmax::find_largest(largest[t], scores[t], block.tokens - key);
                    must_shift |= softmax[t].must_shift(largest[t], log2_scale);
                }
                if (any_lane(must_shift)) {
#pragma unroll
                    for (int t = 0; t < row_tiles; ++t) softmax[t].follow(largest[t], content[t], log2_scale);
                }
#pragma unroll
                for (int t = 0; t < row_tiles; ++t) softmax[t].exponentiate(scores[t], log2_scale);
                weigh(content, position, scores, {values + row * channels}, mask, block.row, key);
            }
            copy_wait<0>();
            sync_block();
        }

        const float keep_scale = mask.keep_scale();
        const float gate = load(Global<const float>(call.gate) + block.head);
        const float open = sigmoid(gate), closed = sigmoid(-gate);  // 1 - g would lose its digits as g -> 1
#pragma unroll
        for (int t = 0; t < row_tiles; ++t) {
            const Block tile = block.tile(t);
            for (float& sum : softmax[t].sum) sum = row_sum(sum);
            if (call.logsumexp) {
                const Global<float> to = Global<float>(call.logsumexp) + block.batch_head * block.tokens;
                store_logsumexp(to, tile.row, block.tokens, softmax[t].shift, softmax[t].sum);
            }
            float share[2];
            for (int half = 0; half < 2; ++half) share[half] = keep_scale * reciprocal_approx(softmax[t].sum[half]);
            for (int n = 0; n < channels / 8; ++n) {
                for (int i = 0; i < 4; ++i) content[t][n].values[i] *= share[i / 2];
            }
            if constexpr (has_dropout) {
                scale_rows<channels>(position[t], keep_scale);
            } else {
                unstage_rows<E, channels>(position[t], own(t));
            }
            for (int n = 0; n < channels / 8; ++n) {
                for (int i = 0; i < 4; ++i) {
                    float& p = position[t][n].values[i];
                    p = closed * content[t][n].values[i] + open * p;
                }
            }
            store_own_rows(position[t], own(t), call.out, tile, problem.head_dim);
            if (call.content.data) store_own_rows(content[t], own(t), call.content, tile, problem.head_dim);
        }
    }

private:
    using Tile = Rows<E, channels>;

    /// Of rows r and r + 8, in the exponent of 2: what is subtracted from scores, and this lane's sum of exponentials.
    /// What is subtracted is the row's largest score, or one that is up to 8 less: rescaling is rare, and the quotient
    /// of two sums is as exact.
    struct Softmax {
        float shift[2] = {-FLT_MAX, -FLT_MAX}, sum[2] = {0, 0};

        /// |scale| in the exponent of 2, whose sign the queries get.
        GPSA_DEVICE static float log2_scale(float scale, Left* q, int count) {
#pragma unroll
            for (int n = 0; n < count; ++n) {
                for (uint32_t& word : q[n].words) word ^= scale < 0 ? 0x80008000u : 0;
            }
            // A scale of 0 is replaced by one whose products vanish beside 1 but still keep -inf.
            return scale == 0 ? FLT_MIN : (scale < 0 ? -scale : scale) * log2_e;
        }

        /// This lane's largest scores; they are -inf for keys that do not exist.
        GPSA_DEVICE static void find_largest(float (&largest)[2], Sum* scores, int keys) {
            if (keys < score_keys) {
#pragma unroll
                for (int n = 0; n < score_keys / 8; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        if (8 * n + fragment_column() + i % 2 >= keys) scores[n].values[i] = -INFINITY;
                    }
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                largest[half] = -INFINITY;
#pragma unroll
                for (int n = 0; n < score_keys / 8; ++n) {
                    const float* pair = &scores[n].values[2 * half];
                    largest[half] = maximum(largest[half], maximum(pair[0], pair[1]));
                }
            }
        }

        GPSA_DEVICE bool must_shift(const float (&largest)[2], float log2_scale) const {
            return !(largest[0] * log2_scale - shift[0] <= 8 && largest[1] * log2_scale - shift[1] <= 8);
        }

        GPSA_DEVICE void follow(const float (&largest)[2], Sum* content, float log2_scale) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                // at least the old one, which is finite: -inf - -inf is not 0
                const float next = maximum(shift[half], row_maximum(largest[half]) * log2_scale);
                const float rescale = exp2_approx(shift[half] - next);
                shift[half] = next;
                sum[half] *= rescale;
#pragma unroll
                for (int n = 0; n < channels / 8; ++n) {
                    for (int i = 0; i < 2; ++i) content[n].values[2 * half + i] *= rescale;
                }
            }
        }

        /// scores = exp(scale scores) relative to the shift.
        GPSA_DEVICE void exponentiate(Sum* scores, float log2_scale) {
#pragma unroll
            for (int n = 0; n < score_keys / 8; ++n) {
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

    /// scores = Q K^T for a warp's rows of Q and a tile of keys.
    GPSA_DEVICE static void score(
        Sum (&scores)[row_tiles][score_keys / 8], const Left (&q)[row_tiles][channels / 16], const Tile& k) {
#pragma unroll
        for (int n = 0; n < score_keys / 16; ++n) {
#pragma unroll
            for (int s = 0; s < channels / 16; ++s) {
                const Right b = load_right_over_channels<E>(s, [&](int j, int chunk) { return k.chunk(j, chunk, n); });
#pragma unroll
                for (int t = 0; t < row_tiles; ++t) multiply<E>(&scores[t][2 * n], q[t][s], b);
            }
        }
    }

    /// content += P V, P rounded to 16 bits; with dropout position += R V, too, and of both only what is kept.
    GPSA_DEVICE static void weigh(
        Sum (&content)[row_tiles][channels / 8], Sum (&position)[row_tiles][channels / 8],
        Sum (&weights)[row_tiles][score_keys / 8], const Tile& v, const Mask& mask, int row, int start) {
#pragma unroll
        for (int n = 0; n < score_keys / 16; ++n) {
            Left dense{}, a[row_tiles];
            if constexpr (has_dropout) {
                Sum entries[2];
                const uint32_t keep = mask.dropout.keep(row, start + 16 * n);
                mask.dense.entries(start + 16 * n, [&](int m, int i, float entry, int, float, float) {
                    const bool kept = keep >> (4 * m + i) & 1;
                    entries[m].values[i] = kept ? entry : 0;
                    if (!kept) weights[0][2 * n + m].values[i] = 0;
                });
                dense = as_left<E>(entries);
            }
#pragma unroll
            for (int t = 0; t < row_tiles; ++t) a[t] = as_left<E>(&weights[t][2 * n]);
#pragma unroll
            for (int s = 0; s < channels / 16; ++s) {
                const Right b = load_right_over_tokens<E>(s, [&](int j, int chunk) { return v.chunk(j, chunk, n); });
#pragma unroll
                for (int t = 0; t < row_tiles; ++t) multiply<E>(&content[t][2 * s], a[t], b);
                if constexpr (has_dropout) multiply<E>(&position[0][2 * s], dense, b);
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
