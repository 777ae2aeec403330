// Forward, N <= 256 tokens: one block per (batch, head), or several that share its query rows.
//
//   O = (1 - g) softmax(scale Q K^T) V + g (Ay (x) Ax) V,   g = sigmoid(gate)
//
// In shared memory, 16 bits: K, V (N, D), Q (the block's rows, D), and one buffer (N, D) that holds V mixed along one
// axis, then the positional branch, then the output. In registers: for 16 query rows of a warp, all their scores.
// With attention dropout, a mask over the whole map, R = Ay (x) Ax is formed entry by entry beside P, there is one
// product with V, and the rows of Q make way for those of the output.
// Global traffic of a block: K, V, its rows of Q and of O, each once, 16 bytes at a time; 4 numbers of parameters.
#pragma once

#include "dropout.cuh"
#include "position.cuh"
#include "whole_image.h"

namespace gpsa {

template <typename Config, bool has_dropout_>
struct WholeImageForward {
    static constexpr bool has_dropout = has_dropout_;
    using E = typename Config::E;
    static constexpr int channels = Config::channels;
    static constexpr int key_tiles = Config::key_tiles;
    static constexpr int keys = 16 * key_tiles;

    /// Rows of the array that K and V share. A tile of keys that ends after the last one reads into V, and is masked;
    /// a tile of values that does reads zeros, which its weights of zero need (0 * NaN is NaN).
    GPSA_HOST_DEVICE static int key_value_rows(int tokens) { return tokens + keys; }

    /// Bytes of shared memory, in the order of run()'s arrays.
    static int shared_bytes(const Problem& problem, int row_blocks) {
        const int tokens = problem.rows * problem.columns, query_rows = whole_image::rows_per_block(tokens, row_blocks);
        const auto bytes = [](int elements, int size) { return (elements * size + 15) / 16 * 16; };
        return bytes(key_value_rows(tokens) * channels, 2) +
               bytes((query_rows < tokens ? query_rows : tokens) * channels, 2) + bytes(position_elements(problem), 2) +
               bytes(problem.rows + problem.columns + place_numbers, 4);
    }

    GPSA_DEVICE static void run(const Forward& call, int row_blocks) {
        const Problem& problem = call.problem;
        const int tokens = problem.rows * problem.columns, head_dim = problem.head_dim;
        const int batch = block_x() / problem.heads, head = block_x() % problem.heads;
        const int rows_per_block = whole_image::rows_per_block(tokens, row_blocks);
        const int first_row = block_y() * rows_per_block;
        const int row_count = smaller(rows_per_block, tokens - first_row);
        if (row_count <= 0) return;

        SharedMemory memory;
        const Shared<E> keys_values = memory.array<E>(key_value_rows(tokens) * channels, "keys and values");
        const Rows<E, channels> k{keys_values}, v{keys_values, tokens};
        const Rows<E, channels> q{memory.array<E>(smaller(rows_per_block, tokens) * channels, "queries")};
        const GridRows<E, channels> position(  // not used with dropout
            has_dropout ? q.base : memory.array<E>(position_elements(problem), "position"), problem.columns);
        const int coordinates = problem.rows + problem.columns;
        const Shared<float> normalisers = memory.array<float>(coordinates + place_numbers, "normalisers and places");
        const Shared<float> places = normalisers + coordinates;

        const Global<const float> weights = Global<const float>(call.pos_weight) + 3 * head;
        const float square = load(weights + 2);
        const Axis along_x(problem.columns, load(weights), square, normalisers);
        const Axis along_y(problem.rows, load(weights + 1), square, normalisers + problem.columns);
        const float gate = load(Global<const float>(call.gate) + head);
        const float open = sigmoid(gate), closed = sigmoid(-gate);  // 1 - g would lose its digits as g -> 1

        copy_rows(v, rows_of<const E>(call.v, batch, head), call.v.token, tokens, keys, head_dim);
        copy_commit();
        copy_rows(k, rows_of<const E>(call.k, batch, head), call.k.token, tokens, tokens, head_dim);
        const Global<const E> queries = rows_of<const E>(call.q, batch, head) + first_row * call.q.token;
        copy_rows(q, queries, call.q.token, row_count, row_count, head_dim);
        copy_commit();

        Axis::prepare(along_x, along_y);
        if constexpr (has_dropout) store_places({along_x, along_y}, places);

        if constexpr (!has_dropout) {
            copy_wait<1>();
            sync_block();
            mix_position<E>(along_x, along_y, v, position);
        }
        copy_wait<0>();
        sync_block();

        const Global<E> out = rows_of<E>(call.out, batch, head);
#pragma unroll 1
        for (int row = 16 * rotated_warp(); row < row_count; row += 16 * (threads() / 32)) {
            Sum scores[2 * key_tiles] = {};
            const float log2_scale = score(scores, q, row, row_count, k, problem.scale);
            const Softmax softmax = exponentiate(scores, log2_scale, tokens);
            const int token = first_row + row;
            if (call.logsumexp) {
                const Global<float> to = Global<float>(call.logsumexp) + static_cast<int64_t>(block_x()) * tokens;
                store_logsumexp(to, token, tokens, softmax.shift, softmax.sum);
            }
            const auto share = [&](int half) { return closed * reciprocal_approx(softmax.sum[half]); };
            const auto store_out = [&](auto at) {
                sync_warp();
                store_rows<channels / 8>(out, call.out.token, token, tokens, 0, head_dim, at);
            };
            Sum content[channels / 8] = {};
            if constexpr (has_dropout) {
                const Dropout dropout(problem, block_x());
                const DenseRows<Axis> dense({along_x, along_y}, token);
                const float up = dropout.keep_scale;
                const Mixture mixture{dropout, dense, places, token, {share(0) * up, share(1) * up}, open * up};
                weigh(content, scores, v, tokens, mixture);
                sync_warp();
                store_line<E, channels>(content, row, row_count, [&](int i, int chunk) { return q.chunk(i, chunk); });
                store_out([&](int i, int chunk) { return q.chunk(i - first_row, chunk); });
            } else {
                weigh(content, scores, v, tokens, [](Sum*, int) {});
                blend(position, token, tokens, open, content, share(0), share(1));
                store_out([&](int i, int chunk) { return position.chunk(i, chunk); });
            }
        }
    }

private:
    static constexpr int place_numbers = has_dropout ? 2 * keys : 0;

    GPSA_HOST_DEVICE static int position_elements(const Problem& problem) {
        return has_dropout ? 0 : GridRows<E, channels>::elements(problem.rows, problem.columns);
    }

    /// Of 4 warps with 13 tiles of rows, one has a tile more: by a hash, in every block another one, as each scheduler
    /// of a multiprocessor has the same warp of all its blocks. The number of warps is a power of two.
    GPSA_DEVICE static int rotated_warp() {
        return (warp() + static_cast<int>(block_x() * 0x9e3779b9u >> 28)) & (threads() / 32 - 1);
    }

    /// Of rows r and r + 8: log2 of the largest exponential, and the sum of exponentials relative to it.
    struct Softmax {
        float shift[2], sum[2];
    };

    /// scores = sign(scale) Q K^T for 16 rows of Q and all keys. K's fragments serve one tile of rows, Q's all tiles of
    /// keys. Returns |scale| in the exponent of 2.
    GPSA_DEVICE static float score(
        Sum* scores, const Rows<E, channels>& q, int row, int row_count, const Rows<E, channels>& k, float scale) {
        Left a[channels / 16];
#pragma unroll
        for (int s = 0; s < channels / 16; ++s) {
            a[s] = load_left<E>(s, [&](int i, int chunk) { return q.chunk(smaller(row + i, row_count - 1), chunk); });
        }
        const float log2_scale = log2_scale_of(scale, a, channels / 16);
#pragma unroll
        for (int tile = 0; tile < key_tiles; ++tile) {
#pragma unroll
            for (int s = 0; s < channels / 16; ++s) {
                const Right b =
                    load_right_over_channels<E>(s, [&](int j, int chunk) { return k.chunk(j, chunk, tile); });
                multiply<E>(&scores[2 * tile], a[s], b);
            }
        }
        return log2_scale;
    }

    /// scores = exp of the scores, in the exponent of 2, less the row's largest; exactly 0 for keys that do not exist.
    GPSA_DEVICE static Softmax exponentiate(Sum* scores, float log2_scale, int tokens) {
        if (tokens <= keys - 16) mask<0, key_tiles - 1>(scores, tokens);  // a branch that 14 x 14 tokens skip
        mask<key_tiles - 1, key_tiles>(scores, tokens);
        float largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int n = 0; n < 2 * key_tiles; ++n) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {  // in pairs: half as long a chain of dependent instructions
                const float* pair = &scores[n].values[2 * half];
                largest[half] = maximum(largest[half], maximum(pair[0], pair[1]));
            }
        }
        Softmax result;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            result.shift[half] = row_maximum(largest[half]) * log2_scale;
            result.sum[half] = 0;
        }
#pragma unroll
        for (int n = 0; n < 2 * key_tiles; ++n) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float* pair = &scores[n].values[2 * half];
                for (int i = 0; i < 2; ++i) pair[i] = exp2_approx(pair[i] * log2_scale - result.shift[half]);
                result.sum[half] += pair[0] + pair[1];
            }
        }
        for (float& sum : result.sum) sum = row_sum(sum);
        return result;
    }

    /// scores = -inf where there is no key, in some tiles of 16.
    template <int first_tile, int last_tile>
    GPSA_DEVICE static void mask(Sum* scores, int tokens) {
#pragma unroll
        for (int n = 2 * first_tile; n < 2 * last_tile; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (8 * n + fragment_column() + i % 2 >= tokens) scores[n].values[i] = -INFINITY;
            }
        }
    }

    /// The coordinates of every key: formed in the loop over rows, the compiler would keep them in registers.
    GPSA_DEVICE static void store_places(const DensePosition<Axis>& position, Shared<float> places) {
        for (int key = thread(); key < keys; key += threads()) {
            const auto [x, y] = DenseRows<Axis>::coordinates(position.place(key));
            store(places + key, x);
            store(places + (keys + key), y);
        }
    }

    /// What turns the exponentials of 16 query rows into M * ((1 - g) P + g R), M the scaled mask.
    struct Mixture {
        const Dropout& dropout;
        const DenseRows<Axis>& dense;
        const Shared<float> places;
        const int query;
        const float share[2], open;

        GPSA_DEVICE void operator()(Sum* scores, int tile) const {
            const uint32_t keep = dropout.keep(query, 16 * tile);
            const auto place = [&](int i) {
                const Shared<float> at = places + (16 * tile + i);
                return typename DenseRows<Axis>::Coordinates{load(at), load(at + keys)};
            };
            dense.entries_at(place, [&](int n, int i, float entry, int half, float, float) {
                float& weight = scores[n].values[i];
                weight = keep >> (4 * n + i) & 1 ? share[half] * weight + open * entry : 0.0f;
            });
        }
    };

    /// content = P V, P rounded to 16 bits, after `change(weights of 16 keys, tile)`.
    template <typename Change>
    GPSA_DEVICE static void weigh(Sum* content, Sum* weights, const Rows<E, channels>& v, int tokens, Change change) {
#pragma unroll
        for (int tile = 0; tile < key_tiles; ++tile) {
            // a branch that keeps the masks of later tiles, and their registers, from being drawn ahead
            if (has_dropout && 16 * tile >= tokens) break;
            change(&weights[2 * tile], tile);
            const Left a = as_left<E>(&weights[2 * tile]);
#pragma unroll
            for (int s = 0; s < channels / 16; ++s) {
                const Right b = load_right_over_tokens<E>(s, [&](int j, int chunk) { return v.chunk(j, chunk, tile); });
                multiply<E>(&content[2 * s], a, b);
            }
        }
    }
};

namespace whole_image {

/// Calls `visit` with the WholeImageForward for a problem that `forward_fits`.
template <typename Visit>
const char* dispatch_forward(const Problem& problem, Visit visit) {
    return dispatch(problem, [&](auto config) {
        using Config = decltype(config);
        if constexpr (Config::channels <= dropout_channels) {
            if (problem.dropout_p > 0) return visit(WholeImageForward<Config, true>{});
        }
        return visit(WholeImageForward<Config, false>{});
    });
}

}  // namespace whole_image
}  // namespace gpsa
