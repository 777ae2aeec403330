// Backward, N <= 256 tokens: one block per (batch, head).
//
//   P = softmax(scale Q K^T);  dP = dO V^T;  delta = rowsum(P * dP);  dS = P * (dP - delta)
//   dQ = scale (1 - g) dS K;  dK = scale (1 - g) dS^T Q;  dV = (1 - g) P^T dO + g (Ay (x) Ax)^T dO
//
// and four numbers for the parameters' gradients (gpsa.h). P is recomputed from the forward kernel's logsumexp. With
// attention dropout, a mask over the whole map, R = Ay (x) Ax is formed entry by entry beside P^T.
//
// A warp owns 16 keys: it holds their rows of K, V, dK and dV in registers, and forms S^T and dP^T for 16 queries at a
// time, so that both are left operands in registers of the products that follow. Two things go from warp to warp
// through shared memory, behind the one barrier of a step: the warps' partial sums of delta, and dS^T, of which the
// last three steps' are kept while dQ is formed for two steps at a time.
//
// In shared memory, 16 bits: Q, K, V, dO (N, D), dS^T (3, N, 16). A row of Q gives way to dQ; afterwards, K to dK, and
// all of Q to dO mixed along the axes of the grid, then to dV.
// Global traffic: Q, K, V, dO, dQ, dK, dV, each once, 16 bytes at a time; N + 4 numbers in fp32.
#pragma once

#include "dropout.cuh"
#include "position.cuh"
#include "whole_image.h"

namespace gpsa {

template <typename E_, int channels_, bool has_dropout_>
struct WholeImageBackward {
    using E = E_;
    static constexpr int channels = channels_;
    static constexpr bool has_dropout = has_dropout_;

    static int threads_for(const Problem& problem) { return 32 * tiles(problem); }

    /// Bytes of shared memory, in the order of run()'s arrays.
    static int shared_bytes(const Problem& problem) {
        const int tokens = problem.rows * problem.columns, padded = 16 * tiles(problem);
        const int coordinates = problem.rows + problem.columns, warps = tiles(problem);
        const auto bytes = [](int elements, int size) { return (elements * size + 15) / 16 * 16; };
        return 2 * bytes(GridRows<E, channels>::elements(problem.rows, problem.columns), 2) +
               bytes(padded * channels, 2) + bytes(tokens * channels, 2) + bytes(kept_steps * padded * 16, 2) +
               bytes(padded, 4) + bytes(2 * warps * 16, 4) + bytes(coordinates, 4) + bytes(2 * coordinates, 4) +
               bytes(4 * warps, 4);
    }

    GPSA_DEVICE static void run(const Backward& call) {
        const Problem& problem = call.problem;
        const int tokens = problem.rows * problem.columns, head_dim = problem.head_dim;
        const int padded = 16 * tiles(problem), coordinates = problem.rows + problem.columns;
        const int batch = block_x() / problem.heads, head = block_x() % problem.heads;

        SharedMemory memory;
        const int grid_elements = GridRows<E, channels>::elements(problem.rows, problem.columns);
        const Shared<E> queries = memory.array<E>(grid_elements, "queries");
        const Rows<E, channels> q{queries};
        const GridRows<E, channels> mixed(queries, problem.columns);
        const Rows<E, channels> k{memory.array<E>(padded * channels, "keys")};
        const GridRows<E, channels> v(memory.array<E>(grid_elements, "values"), problem.columns);
        const Rows<E, channels> grad_out{memory.array<E>(tokens * channels, "gradient of the output")};
        const Rows<E, 16> grad_scores{memory.array<E>(kept_steps * padded * 16, "gradient of the scores")};
        const Shared<float> logsumexp = memory.array<float>(padded, "logsumexp");
        const Shared<float> delta_partials = memory.array<float>(2 * (threads() / 32) * 16, "partial sums of delta");
        const Shared<float> normalisers = memory.array<float>(coordinates, "normalisers");
        const Shared<float> means = memory.array<float>(2 * coordinates, "means");
        const Shared<float> warp_sums = memory.array<float>(4 * (threads() / 32), "sums of the warps");

        copy_rows(q, rows_of<const E>(call.q, batch, head), call.q.token, tokens, tokens, head_dim);
        copy_rows(k, rows_of<const E>(call.k, batch, head), call.k.token, tokens, padded, head_dim);
        copy_rows(v, rows_of<const E>(call.v, batch, head), call.v.token, tokens, tokens, head_dim);
        copy_rows(
            grad_out, rows_of<const E>(call.grad_out, batch, head), call.grad_out.token, tokens, tokens, head_dim);
        copy_commit();

        const Global<const float> row_logsumexp =
            Global<const float>(call.logsumexp) + static_cast<int64_t>(block_x()) * tokens;
        for (int i = thread(); i < padded; i += threads()) {  // queries that do not exist: exp(-inf) = 0
            store(logsumexp + i, i < tokens ? load(row_logsumexp + i) * log2_e : INFINITY);
        }
        const Global<const float> weights = Global<const float>(call.pos_weight) + 3 * head;
        const float square = load(weights + 2);
        const bool wide = has_dropout || problem.columns >= problem.rows;
        const Axis longer(wide ? problem.columns : problem.rows, load(weights + (wide ? 0 : 1)), square, normalisers);
        const Axis shorter(
            wide ? problem.rows : problem.columns, load(weights + (wide ? 1 : 0)), square, normalisers + longer.size);
        const Shared<float> shorter_means = means + 2 * longer.size;
        Axis::prepare(longer, shorter);
        Axis::prepare_means(longer, shorter, means);
        copy_wait<0>();
        sync_block();

        const float gate = load(Global<const float>(call.gate) + head);
        const float closed = sigmoid(-gate);  // 1 - g would lose its digits as g -> 1
        const float score_share = problem.scale * closed;
        const int first_key = 16 * warp();
        Left k_tile[channels / 16], v_tile[channels / 16];
        if constexpr (keep_keys) {
            load_keys(k_tile, k, first_key, tokens);
            load_keys(v_tile, v, first_key, tokens);
        }
        Sum grad_k[channels / 8] = {}, grad_v[channels / 8] = {};
        float delta_sum = 0;
        WeightGradient grad_longer, grad_shorter;
        const int steps = padded / 16;
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            const auto query = [&](int i) { return smaller(16 * step + i, tokens - 1); };
            const auto in_q = [&](int i, int chunk) { return q.chunk(query(i), chunk); };
            const auto in_grad_out = [&](int i, int chunk) { return grad_out.chunk(query(i), chunk); };
            Sum p[2] = {}, grad_p[2] = {};
            if constexpr (!keep_keys) load_keys(k_tile, k, first_key, tokens);
            multiply_keys(p, k_tile, in_q);
            exponentiate(p, problem.scale * log2_e, logsumexp + 16 * step, tokens - first_key);
            if constexpr (!keep_keys) load_keys(v_tile, v, first_key, tokens);
            multiply_keys(grad_p, v_tile, in_grad_out);
            const Shared<float> partials = delta_partials + step % 2 * (threads() / 32) * 16;
            if constexpr (has_dropout) {
                const Dropout dropout(problem, block_x());
                const DensePosition<Axis> position{longer, shorter};
                Sum weights[2];
                drop(
                    weights, grad_p, grad_longer, grad_shorter, p, dropout, position, means, shorter_means, 16 * step,
                    first_key, tokens, closed, sigmoid(gate));
                store_partial_delta(partials + 16 * warp(), p, grad_p);
                add_products(grad_v, weights, in_grad_out);
            } else {
                store_partial_delta(partials + 16 * warp(), p, grad_p);
                add_products(grad_v, p, in_grad_out);
            }
            sync_block();
            delta_sum += subtract_delta(partials, p, grad_p);
            add_products(grad_k, grad_p, in_q);
            const int row = step % kept_steps * padded + first_key;
            store_line<E, 16>(grad_p, row, row + 16, [&](int i, int chunk) { return grad_scores.chunk(i, chunk); });
            if (step > 0 && step % 2 == 0) write_grad_q(call, grad_scores, k, q, step - 2, step, score_share);
        }
        sync_block();
        write_grad_q(call, grad_scores, k, q, (steps - 1) / 2 * 2, steps, score_share);
        sync_block();

        const Global<E> to_k = rows_of<E>(call.grad_k, batch, head), to_v = rows_of<E>(call.grad_v, batch, head);
        const auto row_of_k = [&](int i, int chunk) { return k.chunk(i, chunk); };
        for (Sum& sum : grad_k) {
            for (float& x : sum.values) x *= score_share;
        }
        store_line<E, channels>(grad_k, first_key, tokens, row_of_k);
        sync_warp();
        store_rows<channels / 8>(to_k, call.grad_k.token, first_key, tokens, 0, head_dim, row_of_k);

        const float open = sigmoid(gate), early = has_dropout ? 1 : early_share(open, tokens), late = open / early;
        if constexpr (!has_dropout) {
            differentiate_position(
                grad_longer, grad_shorter, wide, longer, shorter, means, shorter_means, grad_out, v, mixed, early);
        }
        const float of_longer = open * grad_longer.linear, of_shorter = late * grad_shorter.linear;
        store_sums(
            warp_sums, wide ? of_longer : of_shorter, wide ? of_shorter : of_longer,
            open * grad_longer.square + late * grad_shorter.square, open * closed * (grad_longer.total - delta_sum));
        sync_block();
        const auto in_mixed = [&](int i, int chunk) { return mixed.chunk(i, chunk); };
        if constexpr (has_dropout) {
            store_line<E, channels>(grad_v, first_key, tokens, in_mixed);
        } else {
            blend(mixed, first_key, tokens, late, grad_v, closed, closed);
        }
        sync_warp();
        store_rows<channels / 8>(to_v, call.grad_v.token, first_key, tokens, 0, head_dim, in_mixed);
        if (thread() < 4) {
            float sum = 0;
            for (int w = 0; w < threads() / 32; ++w) sum += load(warp_sums + (4 * w + thread()));
            store(Global<float>(call.sums) + (static_cast<int64_t>(block_x()) * 4 + thread()), sum);
        }
    }

private:
    static constexpr int kept_steps = 3;
    static constexpr int unrolled_tiles = has_dropout ? 1 : 2;  // of dQ; with dropout there are no registers for 2
    static constexpr bool keep_keys = channels <= 48 && !has_dropout;  // in registers; else read again in every step

    GPSA_HOST_DEVICE static int tiles(const Problem& problem) { return (problem.rows * problem.columns + 15) / 16; }

    /// Rows first to first + 15, those that do not exist replaced by the last.
    template <typename Layout>
    GPSA_DEVICE static void load_keys(Left* tile, const Layout& rows, int first, int tokens) {
#pragma unroll
        for (int s = 0; s < channels / 16; ++s) {
            tile[s] =
                load_left<E>(s, [&](int i, int chunk) { return rows.chunk(smaller(first + i, tokens - 1), chunk); });
        }
    }

    /// sums += the warp's keys times 16 other tokens, summed over channels.
    template <typename At>
    GPSA_DEVICE static void multiply_keys(Sum* sums, const Left* keys, At at) {
#pragma unroll
        for (int s = 0; s < channels / 16; ++s) multiply<E>(sums, keys[s], load_right_over_channels<E>(s, at));
    }

    /// sums += weights, rounded, times 16 other tokens, summed over these.
    template <typename At>
    GPSA_DEVICE static void add_products(Sum* sums, const Sum* weights, At at) {
        const Left a = as_left<E>(weights);
#pragma unroll
        for (int s = 0; s < channels / 16; ++s) multiply<E>(&sums[2 * s], a, load_right_over_tokens<E>(s, at));
    }

    /// scores = exp(scale scores - logsumexp), exactly 0 for the rows from `keys` on. Columns are queries.
    GPSA_DEVICE static void exponentiate(Sum* scores, float log2_scale, Shared<float> logsumexp, int keys) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            for (int column = 0; column < 2; ++column) {
                const float shift = load(logsumexp + (8 * n + fragment_column() + column));
                for (int half = 0; half < 2; ++half) {
                    float& s = scores[n].values[2 * half + column];
                    s = fragment_row() + 8 * half < keys ? exp2_approx(s * log2_scale - shift) : 0.0f;
                }
            }
        }
    }

    /// With a mask M that keeps and scales up: grad_p = M * dP, weights = M * ((1 - g) P + g R), and what 16 queries
    /// and the warp's keys add to the gradients of the positional weights, R * M * dP (d - mean of d) each.
    GPSA_DEVICE static void drop(
        Sum* weights, Sum* grad_p, WeightGradient& grad_x, WeightGradient& grad_y, const Sum* p, const Dropout& dropout,
        const DensePosition<Axis>& position, Shared<float> means_x, Shared<float> means_y, int first_query,
        int first_key, int tokens, float closed, float open) {
        const uint32_t keep = dropout.keep_transposed(first_query, first_key);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int column = 0; column < 2; ++column) {
                const int query = first_query + 8 * n + fragment_column() + column;
                const auto from = position.place(smaller(query, tokens - 1));
                const float log2_normaliser = position.log2_normaliser(from);
                const float mean_x = load(means_x + 2 * from.x), mean_y = load(means_y + 2 * from.y);
                const float mean_square = load(means_x + (2 * from.x + 1)) + load(means_y + (2 * from.y + 1));
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int key = first_key + fragment_row() + 8 * half, i = 2 * half + column;
                    const auto to = position.place(key);
                    const float factor = keep >> (4 * n + i) & 1 ? dropout.keep_scale : 0.0f;
                    float& grad = grad_p[n].values[i];
                    grad = factor * grad;
                    const bool exists = query < tokens && key < tokens;
                    const float r = exists ? position.weight(from, log2_normaliser, to) : 0.0f;
                    weights[n].values[i] = factor * (closed * p[n].values[i] + open * r);
                    const float dx = static_cast<float>(to.x - from.x), dy = static_cast<float>(to.y - from.y);
                    grad_x.linear += r * grad * (dx - mean_x);
                    grad_y.linear += r * grad * (dy - mean_y);
                    grad_x.square += r * grad * (dx * dx + dy * dy - mean_square);
                    grad_x.total += r * grad;
                }
            }
        }
    }

    /// Of 16 queries the warp's partial sum of delta: P * dP over its keys.
    GPSA_DEVICE static void store_partial_delta(Shared<float> to, const Sum* p, const Sum* grad_p) {
        float sums[2][2] = {};
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[n][i % 2] += p[n].values[i] * grad_p[n].values[i];
        }
        const float sum = column_sum(sums);
        if (lane() / 4 % 2 == 0) store(to + column_of_lane(), sum);
    }

    /// grad_p = P * (dP - delta). Returns what this lane of the first warp adds to the sum of delta over the queries.
    GPSA_DEVICE static float subtract_delta(Shared<float> partials, const Sum* p, Sum* grad_p) {
        float own = 0, delta[2][2];
        const int half = lane() / 4 % 2;  // two lanes have the same column
#pragma unroll 4
        for (int w = half; w < threads() / 32; w += 2) own += load(partials + (16 * w + column_of_lane()));
        own += shuffle_xor(own, 4);
        spread_columns(delta, own);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& grad = grad_p[n].values[i];
                grad = p[n].values[i] * (grad - delta[n][i % 2]);
            }
        }
        return warp() == 0 && half == 0 ? own : 0.0f;
    }

    /// dQ of the queries of some steps, 16 queries x 16 channels at a time, by way of the rows of Q.
    GPSA_DEVICE static void write_grad_q(
        const Backward& call, const Rows<E, 16>& grad_scores, const Rows<E, channels>& k, const Rows<E, channels>& q,
        int first_step, int last_step, float share) {
        const int batch = block_x() / call.problem.heads, head = block_x() % call.problem.heads;
        const Global<E> to = rows_of<E>(call.grad_q, batch, head);
        const int tokens = call.problem.rows * call.problem.columns, padded = 16 * tiles(call.problem);
        const auto row_of_q = [&](int i, int chunk) { return q.chunk(i, chunk); };
#pragma unroll 1
        for (int unit = warp(); unit < (last_step - first_step) * (channels / 16); unit += threads() / 32) {
            const int step = first_step + unit / (channels / 16), s = unit % (channels / 16);
            const int key_tiles = padded / 16, first_tile = step % kept_steps * key_tiles;
            Sum sums[2] = {};
#pragma unroll unrolled_tiles
            for (int tile = 0; tile < key_tiles; ++tile) {
                const Left a = load_left_over_tokens<E>(
                    0, [&](int j, int chunk) { return grad_scores.chunk(j, chunk, first_tile + tile); });
                const Right b = load_right_over_tokens<E>(s, [&](int j, int chunk) { return k.chunk(j, chunk, tile); });
                multiply<E>(sums, a, b);
            }
            for (Sum& sum : sums) {
                for (float& x : sum.values) x *= share;
            }
            store_line<E, 16>(sums, 16 * step, tokens, [&](int i, int chunk) { return row_of_q(i, 2 * s + chunk); });
            sync_warp();
#pragma unroll 1  // once; not a loop, its addresses would be kept in registers
            for (int i = lane(); i < 32; i += 32) {
                const int token = 16 * step + i / 2, chunk = 2 * s + i % 2;
                if (token < tokens && chunk * 8 < call.problem.head_dim) {
                    store_chunk<E>(to + (token * call.grad_q.token + chunk * 8), load_chunk<E>(row_of_q(token, chunk)));
                }
            }
        }
    }

    /// The sums over this warp's lanes.
    GPSA_DEVICE static void store_sums(Shared<float> to, float x, float y, float square, float gate) {
        const float sums[4] = {warp_sum(x), warp_sum(y), warp_sum(square), warp_sum(gate)};
        const Shared<float> own = to + 4 * warp();  // by all lanes: warp() is a shuffle
        if (lane() > 0) return;
        for (int i = 0; i < 4; ++i) store(own + i, sums[i]);
    }
};

namespace whole_image {

template <typename E, bool has_dropout, typename Visit>
const char* with_native_channels(const Problem& problem, Visit visit) {
    if (problem.head_dim <= 32) return visit(WholeImageBackward<E, 32, has_dropout>{});
    if (problem.head_dim <= 48) return visit(WholeImageBackward<E, 48, has_dropout>{});
    return visit(WholeImageBackward<E, 64, has_dropout>{});
}

template <typename E, typename Visit>
const char* with_dropout(const Problem& problem, Visit visit) {
    return problem.dropout_p > 0 ? with_native_channels<E, true>(problem, visit)
                                 : with_native_channels<E, false>(problem, visit);
}

/// Calls `visit` with the WholeImageBackward for a problem of head_dim 64 at most.
template <typename Visit>
const char* dispatch_backward(const Problem& problem, Visit visit) {
    return problem.dtype == Dtype::float16 ? with_dropout<Half>(problem, visit)
                                           : with_dropout<Bfloat16>(problem, visit);
}

/// Whether the kernels serve a problem where a block can have so many bytes of shared memory.
inline bool backward_fits(const Problem& problem, int shared_bytes) {
    const int64_t tokens = static_cast<int64_t>(problem.rows) * problem.columns;
    if (problem.head_dim > 64 || tokens > whole_image_tokens) return false;
    int bytes = 0;
    dispatch_backward(problem, [&](auto kernel) {
        bytes = decltype(kernel)::shared_bytes(problem);
        return static_cast<const char*>(nullptr);
    });
    return bytes <= shared_bytes;
}

}  // namespace whole_image
}  // namespace gpsa
