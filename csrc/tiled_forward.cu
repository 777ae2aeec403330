// Forward for any number of tokens: the positional branch goes to `out` (tiled_position.cuh), and one block per 128
// query rows of a (batch, head), 64 with dropout or more than 64 channels, adds the content branch.
//
//   O = (1 - g) softmax(scale Q K^T) V + g O_pos,   g = sigmoid(gate)
//
// 64 keys and their values are in shared memory while the next are copied; a warp has 32 or 16 query rows, the scores
// of 32 keys, and sums of exponentials so far (online softmax). Global traffic of a block: K and V of the (batch, head)
// once, its rows of all else once. With attention dropout R's entries are formed beside those of P.
#include "dropout.cuh"
#include "tiled_position.cuh"

namespace gpsa {

struct TiledForwardCall {
    Forward forward;
    PositionCall position;
};

template <typename E_, int channels_, bool has_dropout>
struct TiledForward : TiledKernel {
    using E = E_;
    using Call = TiledForwardCall;
    static constexpr int channels = channels_;
    static constexpr int tile_keys = 64, score_keys = 32;  // of a stage of shared memory; that have scores at a time
    // Of a warp, 16 rows each: two share what is read of K and V, if there are registers for both.
    static constexpr int row_tiles = has_dropout || channels > 64 ? 1 : 2;
    static constexpr int block_rows = row_tiles * tile_tokens;

    static constexpr int least_blocks(int architecture) {
        return sharing(has_dropout ? (channels > 64 ? 1 : 2) : channels > 48 ? 2 : 3, architecture);
    }
    static int shared_bytes() { return (block_rows + 5 * tile_keys) * channels * 2; }
    static int64_t blocks(const Call& call) { return tiled_blocks(call.forward.problem, block_rows); }

    GPSA_DEVICE static void run(const Call& arguments) {
        const Forward& call = arguments.forward;
        const Problem& problem = call.problem;
        const Block block(problem, block_rows);

        SharedMemory memory;
        const Tile queries{memory.array<E>(block_rows * channels, "queries")};
        const Shared<E> keys = memory.array<E>(2 * tile_keys * channels, "keys");
        const Shared<E> values = memory.array<E>(3 * tile_keys * channels, "values");
        RowStream<E, channels, tile_keys> next_keys(call.k, block, 0, keys, problem.head_dim);
        RowStream<E, channels, tile_keys> next_values(call.v, block, 0, values, problem.head_dim);
        RowStream<E, channels, block_rows>(call.q, block, block.first, queries.base, problem.head_dim).fetch(0);
        next_keys.fetch(0);
        next_values.fetch(0);
        copy_commit();
        copy_wait<0>();
        sync_block();

        const Tile own{queries.base, 16 * row_tiles * warp()};  // queries, then what the epilogue reads and writes
        Left q[row_tiles][channels / 16];
#pragma unroll
        for (int t = 0; t < row_tiles; ++t) load_own_rows(q[t], own.tile(t));
        if constexpr (!has_dropout) {
            sync_warp();
#pragma unroll
            for (int t = 0; t < row_tiles; ++t) {
                fetch_own_rows(own.tile(t), call.out, block, block.row + 16 * t, problem.head_dim);
            }
        }

        const float log2_scale = log2_scale_of(problem.scale, &q[0][0], row_tiles * (channels / 16));
        const Mask mask(arguments, block);
        const RightLoader<channels, false> load_keys;
        const RightLoader<channels, true> load_values;
        Softmax softmax[row_tiles];
        Sum scores[row_tiles][score_keys / 8], content[row_tiles][channels / 8] = {};
        Sum position[row_tiles][channels / 8] = {};
        Weights weights;
        Shared<E> k = keys, v = values;
        // From the scores on: where exponentials have grown too large, or where not all keys exist.
        const auto start_anew = [&](int key) {
            score(scores, q, k, load_keys);
#pragma unroll
            for (int t = 0; t < row_tiles; ++t) {
                softmax[t].follow(scores[t], content[t], log2_scale, block.tokens - key);
                softmax[t].exponentiate(scores[t], log2_scale);
            }
        };
        int key_stage = 0, value_stage = 0;
        const auto fetch = [&](int key) {  // what follows on the tile of keys from `key` on
            if (key + tile_keys >= block.tokens) return;
            next_keys.fetch(key_stage ^ 1);
            next_values.fetch(value_stage == 2 ? 0 : value_stage + 1);
            copy_commit();
        };
        fetch(0);
        start_anew(0);
#pragma unroll 1
        for (int key = score_keys;; key += score_keys) {
            // The products with V wait until the next exponentials are under way: the two use different units.
#pragma unroll
            for (int t = 0; t < row_tiles; ++t) softmax[t].add();
            weights.set(scores, mask, block.row, key - score_keys);
            const Shared<E> weighed = v;
            if (key >= block.tokens) break;
            k = k + score_keys * channels;
            v = v + score_keys * channels;
            if (key % tile_keys == 0) {
                copy_wait<0>();
                sync_block();
                key_stage ^= 1;
                value_stage = value_stage == 2 ? 0 : value_stage + 1;
                if (key_stage == 0) k = keys;
                if (value_stage == 0) v = values;
                fetch(key);
            }
            score(scores, q, k, load_keys);
            weigh(content, position, weights, weighed, load_values);
            bool again = block.tokens - key < score_keys;
#pragma unroll
            for (int t = 0; t < row_tiles; ++t) again |= softmax[t].exponentiate(scores[t], log2_scale);
            if (any_lane(again)) start_anew(key);
        }
        const float gate = load(Global<const float>(call.gate) + block.head);
        weigh(content, position, weights, v, load_values);
        copy_wait<0>();
        sync_warp();

        const float open = sigmoid(gate), closed = sigmoid(-gate);  // 1 - g would lose its digits as g -> 1
        float keep_scale = 1;
        if constexpr (has_dropout) keep_scale = mask.dropout.keep_scale;
#pragma unroll
        for (int t = 0; t < row_tiles; ++t) {
            for (float& sum : softmax[t].sum) sum = sum_of_lanes<4>(sum);
            const int row = block.row + 16 * t;
            if (call.logsumexp) {
                const Global<float> to = Global<float>(call.logsumexp) + block.batch_head * block.tokens;
                store_logsumexp(to, row, block.tokens, softmax[t].shift, softmax[t].sum);
            }
            float share[2];
            for (int half = 0; half < 2; ++half) share[half] = keep_scale * reciprocal_approx(softmax[t].sum[half]);
            each_value<channels / 8>([&](int n, int i) { content[t][n].values[i] *= share[i / 2]; });
            if constexpr (has_dropout) {
                scale<channels / 8>(position[t], keep_scale);
            } else {
                unstage_own_rows(position[t], own.tile(t));
            }
            each_value<channels / 8>([&](int n, int i) {
                float& p = position[t][n].values[i];
                p = closed * content[t][n].values[i] + open * p;
            });
            store_own_rows(position[t], own.tile(t), call.out, block, row, problem.head_dim);
            if (call.content.data) store_own_rows(content[t], own.tile(t), call.content, block, row, problem.head_dim);
        }
    }

private:
    using Tile = Rows<E, channels>;

    /// Of rows r and r + 8, in the exponent of 2: what is subtracted from scores, and this lane's sum of exponentials.
    /// What is subtracted is the row's largest score when it was last looked for, which is rare: only once exponentials
    /// have become large. A quotient of two sums is as exact.
    struct Softmax {
        static constexpr float most = 1024;  // of the exponentials that a lane adds up at a time; float16 holds 65504
        float shift[2] = {-FLT_MAX, -FLT_MAX}, sum[2] = {0, 0}, next[2];

        /// Subtracts the largest of these scores from now on, if it is larger.
        GPSA_DEVICE void follow(Sum* scores, Sum* content, float log2_scale, int keys) {
            if (keys < score_keys) mask_keys<score_keys / 8>(scores, keys);
            float largest[2], rescale[2];
            largest_scores<score_keys / 8>(largest, scores);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float before = shift[half];  // finite: -inf - -inf is not 0
                shift[half] = maximum(before, maximum_of_lanes<4>(largest[half]) * log2_scale);
                rescale[half] = exp2_approx(before - shift[half]);
                sum[half] *= rescale[half];
            }
            each_value<channels / 8>([&](int n, int i) { content[n].values[i] *= rescale[i / 2]; });
        }

        /// scores = exp(scale scores) relative to the shift. Whether any is too large, or not a number.
        GPSA_DEVICE bool exponentiate(Sum* scores, float log2_scale) {
            gpsa::exponentiate<score_keys / 8>(next, scores, log2_scale, shift);
            return !(next[0] <= most && next[1] <= most);
        }
        GPSA_DEVICE void add() {
            for (int half = 0; half < 2; ++half) sum[half] += next[half];
        }
    };

    struct DropoutMask {
        const Dropout dropout;
        const DenseRows<GridAxis> dense;
        GPSA_DEVICE DropoutMask(const Call& call, const Block& block)
            : dropout(call.forward.problem, block.batch_head), dense(call.position.axes(block.head), block.row) {}
    };
    using Mask = std::conditional_t<has_dropout, DropoutMask, Nothing>;

    /// The weights of a tile of keys, rounded to 16 bits: those of the content and, with dropout, of the position, and
    /// of both only what is kept.
    struct Weights {
        Left content[row_tiles][score_keys / 16], position[score_keys / 16];

        GPSA_DEVICE void set(Sum (&scores)[row_tiles][score_keys / 8], const Mask& mask, int row, int key) {
#pragma unroll
            for (int n = 0; n < score_keys / 16; ++n) {
                if constexpr (has_dropout) {
                    Sum entries[2];
                    const uint32_t keep = mask.dropout.keep(row, key + 16 * n);
                    mask.dense.entries_from(key + 16 * n, [&](int m, int i, float entry, int, float, float) {
                        const bool kept = keep >> (4 * m + i) & 1;
                        entries[m].values[i] = kept ? entry : 0;
                        if (!kept) scores[0][2 * n + m].values[i] = 0;
                    });
                    position[n] = as_left<E>(entries);
                }
#pragma unroll
                for (int t = 0; t < row_tiles; ++t) content[t][n] = as_left<E>(&scores[t][2 * n]);
            }
        }
    };

    /// scores = Q K^T for a warp's rows of Q and a tile of keys.
    GPSA_DEVICE static void score(
        Sum (&scores)[row_tiles][score_keys / 8], const Left (&q)[row_tiles][channels / 16], Shared<E> k,
        const RightLoader<channels, false>& load_keys) {
        std::memset(scores, 0, sizeof scores);
#pragma unroll
        for (int n = 0; n < score_keys / 16; ++n) {
#pragma unroll
            for (int s = 0; s < channels / 16; ++s) {
                const Right b = load_keys(k + 16 * n * channels, s);
#pragma unroll
                for (int t = 0; t < row_tiles; ++t) multiply<E>(&scores[t][2 * n], q[t][s], b);
            }
        }
    }

    /// content += P V; with dropout position += R V, too.
    GPSA_DEVICE static void weigh(
        Sum (&content)[row_tiles][channels / 8], Sum (&position)[row_tiles][channels / 8], const Weights& weights,
        Shared<E> v, const RightLoader<channels, true>& load_values) {
#pragma unroll
        for (int n = 0; n < score_keys / 16; ++n) {
#pragma unroll
            for (int s = 0; s < channels / 16; ++s) {
                const Right b = load_values(v + 16 * n * channels, s);
#pragma unroll
                for (int t = 0; t < row_tiles; ++t) multiply<E>(&content[t][2 * s], weights.content[t][n], b);
                if constexpr (has_dropout) multiply<E>(&position[0][2 * s], weights.position[n], b);
            }
        }
    }
};

const char* launch_tiled_forward(const Forward& call, const Launcher& launcher) {
    const Problem& problem = call.problem;
    const TiledWorkspace workspace(problem, false);
    const PositionCall position{problem, call.pos_weight, workspace.floats(call.workspace, TiledWorkspace::statistics)};
    return dispatch(problem, [&](auto element, auto channels, auto has_dropout) {
        using E = decltype(element);
        TiledLauncher launch{launcher};
        launch(PositionStatistics{}, position);
        if constexpr (!has_dropout.value) {
            const Tensor mixed = workspace.tensor(problem, call.workspace, TiledWorkspace::mixed);
            using Mix = MixLines<E, channels.value, false>;
            launch(Mix{}, {position, lines_along_x(problem), call.v, mixed});
            launch(Mix{}, {position, lines_along_y(problem), mixed, call.out});
        }
        launch(TiledForward<E, channels.value, has_dropout.value>{}, {call, position});
        return launch.error;
    });
}

}  // namespace gpsa
