// Backward, N <= 256 tokens, without dropout in a grid with sides of at most 16: one block per (batch, head).
//
//   P = softmax(scale Q K^T);  dP = dO V^T;  delta = rowsum(P * dP);  dS = P * (dP - delta)
//   dQ = scale (1 - g) dS K;  dK = scale (1 - g) dS^T Q;  dV = (1 - g) P^T dO + g (Ay (x) Ax)^T dO
//
// and four numbers for the parameters' gradients (gpsa.h). P is recomputed from the forward kernel's logsumexp. With
// attention dropout R is formed entry by entry beside P^T.
//
// A warp owns 32 tokens. After the positional branch there are three passes over all tokens, 16 at a time, and a
// barrier between two of them, none within:
//   1. for its queries: P, dP, delta; P is stored.    2. for its keys: dP again, dS in the place of P, dK and dV.
//   3. for its queries: dQ.
// dP is formed twice, as delta must be known for dS, and there is room for one map; it is cheaper than a barrier a
// step. With 32 tokens a row of the others that is read from shared memory serves two tiles.
//
// In shared memory, 16 bits, (N, D) or (N, N):
//                 load       positional branch         pass 1    pass 2      pass 3 and results
//   Q             is copied                            queries   dK's sum    staged dK
//   K             is copied                            keys                  keys of dQ's sum
//   V             is copied  mixed along y, dAy        keys      keys        staged dQ
//   dO            is copied  mixed along x, dAx        queries   dP, dV      staged dV
//   map                      V mixed, dO mixed, dR^T   P         P, then dS  dS
// A warp's own tokens of R^T dO wait in registers from the positional branch on. Global traffic: each tensor once.
#include "dropout.cuh"
#include "launch.h"
#include "whole_image_position.cuh"

namespace gpsa {

template <typename E_, int channels_, bool has_dropout>
struct WholeImageBackward {
    using E = E_;
    using Call = Backward;
    static constexpr int channels = channels_;

    static constexpr int most_threads(int) { return whole_image_tokens; }  // a warp for 32; 255 registers a thread
    static constexpr int least_blocks(int) { return 0; }

    static int threads_for(const Problem& problem) { return 32 * ((tiles(problem) + 1) / 2); }

    /// In the order of run()'s arrays.
    static int shared_bytes(const Problem& problem) {
        const int tokens = problem.rows * problem.columns, padded = 16 * tiles(problem);
        const auto bytes = [](int elements, int size) { return (elements * size + 15) / 16 * 16; };
        return bytes((tokens + padded) * channels, 2) + 2 * bytes(padded * channels, 2) +
               bytes(map_elements(problem), 2) + bytes(padded, 4) + bytes(3 * (problem.rows + problem.columns), 4) +
               bytes(4 * (threads_for(problem) / 32), 4);
    }

    GPSA_DEVICE static void run(const Call& call) {
        const Problem& problem = call.problem;
        const int tokens = problem.rows * problem.columns, head_dim = problem.head_dim;
        const int padded = 16 * tiles(problem), missing = padded - tokens;
        const int batch = block_x() / problem.heads, head = block_x() % problem.heads;

        // Rows that pad Q are the first of K: P is 0 there. Those that pad V and dO are zeros, and those that pad K are
        // the last key, so that P is finite there and P * dP = 0; for dQ they become zeros.
        SharedMemory memory;
        const Shared<E> queries_keys = memory.array<E>((tokens + padded) * channels, "queries and keys");
        const Tokens q{queries_keys}, k{queries_keys, tokens}, k_padding{queries_keys, 2 * tokens};
        const Tokens v{memory.array<E>(padded * channels, "values")};
        const Tokens grad_out{memory.array<E>(padded * channels, "gradient of the output")};
        const Map map{memory.array<E>(map_elements(problem), "attention map"), tiles(problem)};
        const Shared<float> delta = memory.array<float>(padded, "delta");
        const Shared<float> statistics = memory.array<float>(3 * (problem.rows + problem.columns), "statistics");
        const Shared<float> warp_sums = memory.array<float>(4 * (threads() / 32), "sums of the warps");

        copy_rows(v, rows_of<const E>(call.v, batch, head), call.v.token, tokens, padded, head_dim);
        copy_rows(
            grad_out, rows_of<const E>(call.grad_out, batch, head), call.grad_out.token, tokens, padded, head_dim);
        copy_commit();
        copy_rows(q, rows_of<const E>(call.q, batch, head), call.q.token, tokens, tokens, head_dim);
        const Global<const E> keys = rows_of<const E>(call.k, batch, head);
        copy_rows(k, keys, call.k.token, tokens, tokens, head_dim);
        copy_rows(k_padding, keys + (tokens - 1) * call.k.token, 0, missing, missing, head_dim);
        copy_commit();

        const Own own(tiles(problem));
        const auto axes = image_axes<3>(problem, call.pos_weight, head, statistics);
        const float gate = load(Global<const float>(call.gate) + head);
        float shift[2][2][2];
        load_shifts(shift, Global<const float>(call.logsumexp) + int64_t(block_x()) * tokens, own, tokens);
        prepare(axes);

        const float open = sigmoid(gate), closed = sigmoid(-gate);  // 1 - g would lose its digits as g -> 1
        const float early = has_dropout ? 1 : early_share(open, tokens), late = open / early;
        float sums[4];                          // this thread's, as of PositionGradient
        uint32_t position[2][2][channels / 8];  // of the warp's tokens, R^T dO early
        if constexpr (!has_dropout) {
            const Tokens mixed_v{map.base}, mixed{map.base, tokens}, grad_position{map.base, 2 * tokens};
            sync_block();
            const PositionGradient<E, channels> gradient(axes, early);
            copy_wait<1>();
            sync_block();
            gradient.start(v, grad_out, mixed_v, mixed);
            sync_block();
            gradient.finish(sums, v, grad_out, mixed_v, mixed, grad_position);
            sync_block();
            each_own_pair([&](int t, int half, int n) {
                const int token = smaller(own.first(t) + fragment_row() + 8 * half, tokens - 1);
                position[t][half][n] = load_pair<E>(grad_position.chunk(token, n) + fragment_column());
            });
        }
        copy_wait<0>();
        sync_block();

        const Mask mask(problem, block_x());
        const float delta_sum = store_map(map, delta, mask, own, q, k, v, grad_out, problem.scale * log2_e, shift);
        sync_block();

        for (int i = thread(); i < missing * channels / 8; i += threads()) {
            store_chunk<E>(queries_keys + 2 * tokens * channels + 8 * i, Chunk{});
        }
        OfTiles grad_k = {}, grad_v = {};
        DroppedPosition dropped(axes, own, mask.keep_scale, closed, open);
        add_key_gradients(grad_k, grad_v, dropped, map, delta, own, q, v, grad_out);
        if constexpr (has_dropout) std::memcpy(sums, dropped.sums, sizeof sums);
        store_partial<4>(
            warp_sums, {late * sums[0], late * sums[1], late * sums[2], open * closed * (sums[3] - delta_sum)});
        sync_block();

        const auto scale_own = [&](OfTiles& sums) {
            for (auto& tile : sums) scale<channels / 8>(tile, problem.scale * closed);
        };
        // the warp's rows of a gradient, by way of its rows of an array that nobody reads any more
        const auto write = [&](const Tensor& to, const Tokens& rows, const OfTiles& sums) {
            const auto at = [&](int i, int chunk) { return rows.chunk(i, chunk); };
#pragma unroll
            for (int t = 0; t < 2; ++t) stage_rows<E, channels>(sums[t], own.first(t), tokens, at);
            sync_warp();
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                const int end = own.counts(t) ? tokens : 0;
                store_rows<channels>(rows_of<E>(to, batch, head), to.token, own.first(t), end, head_dim, at);
            }
        };
        scale_own(grad_k);
        write(call.grad_k, q, grad_k);
        if constexpr (!has_dropout) {
            each_own_pair([&](int t, int half, int n) {
                const Pair pair = unpack<E>(position[t][half][n]);
                float* sum = &grad_v[t][n].values[2 * half];
                sum[0] = closed * sum[0] + late * pair.low;
                sum[1] = closed * sum[1] + late * pair.high;
            });
        }
        write(call.grad_v, grad_out, grad_v);
        OfTiles grad_q = {};
        add_query_gradients(grad_q, map, own, k);
        scale_own(grad_q);
        write(call.grad_q, v, grad_q);
        if (thread() < 4) {
            store(
                sum_of(call.sums, batch, problem.heads, head, thread()), total<4>(warp_sums, threads() / 32, thread()));
        }
    }

private:
    using Tokens = Rows<E, channels>;
    /// Accumulated rows of the warp's two tiles.
    using OfTiles = Sum[2][channels / 8];
    static constexpr bool keep_keys = channels <= 48 || !has_dropout;  // in registers; else read again in every step

    GPSA_HOST_DEVICE static int tiles(const Problem& problem) { return (problem.rows * problem.columns + 15) / 16; }

    /// The map has room for three arrays of (N, D) before it is one.
    GPSA_HOST_DEVICE static int map_elements(const Problem& problem) {
        const int map = 256 * tiles(problem) * tiles(problem);
        const int mixed = 3 * problem.rows * problem.columns * channels;
        return map > mixed ? map : mixed;
    }

    /// (16, 16) tiles of the attention map, one after the other. P^T is kept as the left operand that it is next, 16
    /// bytes a lane, and dS^T in rows of keys, to be read along both axes.
    struct Map {
        const Shared<E> base;
        const int tiles;

        GPSA_DEVICE Shared<E> tile(int queries, int keys) const { return base + (queries * tiles + keys) * 256; }
    };

    /// The warp's two tiles of 16 tokens. If there is only one left, it is the second, too: what is done twice is
    /// stored twice, but not in global memory.
    struct Own {
        const int tiles, tile[2];

        GPSA_DEVICE explicit Own(int tiles) : tiles(tiles), tile{2 * warp(), smaller(2 * warp() + 1, tiles - 1)} {}
        GPSA_DEVICE int first(int t) const { return 16 * tile[t]; }
        GPSA_DEVICE bool counts(int t) const { return t == 0 || tile[1] > tile[0]; }
    };

    /// What stands for Dropout where there is none.
    struct NoDropout {
        static constexpr float keep_scale = 1;
        GPSA_DEVICE NoDropout(const Problem&, int64_t) {}
        GPSA_DEVICE uint32_t keep_transposed(int, int) const { return ~0u; }
    };
    using Mask = std::conditional_t<has_dropout, Dropout, NoDropout>;

    /// The positional branch with attention dropout, a mask M that keeps and scales up: R is formed entry by entry.
    class DroppedPosition {
    public:
        float sums[4] = {};

        GPSA_DEVICE DroppedPosition(
            const DensePosition<ImageAxis<3>>& position, const Own& own, float keep_scale, float closed, float open)
            : position(position),
              last(position.along_x.size * position.along_y.size - 1),
              keep_scale(keep_scale),
              closed(closed),
              open(open),
              counts(own.counts(1) ? 1.0f : 0.0f) {
#pragma unroll
            for (int t = 0; t < 2; ++t) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const auto key = position.place(smaller(own.first(t) + fragment_row() + 8 * half, last));
                    key_x[t][half] = float(key.x);
                    key_y[t][half] = float(key.y);
                }
            }
        }

        /// grad_p = M * dP, mixture = M * ((1 - g) P + g R), p = P without the signs that tell M; adds what 16 queries
        /// and the warp's keys add to the gradients of the positional weights, R * M * dP (d - mean of d) each. Tokens
        /// that do not exist are the last one here: their rows of V and dO are zeros.
        GPSA_DEVICE void drop(Left (&mixture)[2], Left (&p)[2], Sum (&grad_p)[2][2], int first_query) {
            Sum mixed[2][2];
            each_column([&](int n, int c, int column) {
                const auto from = position.place(smaller(first_query + column, last));
                const float x = float(from.x), y = float(from.y);
                const float log2_normaliser = position.log2_normaliser(from);
                const float mean_x = position.along_x.mean(from.x), mean_y = position.along_y.mean(from.y);
                const float mean_square = position.along_x.mean_square(from.x) + position.along_y.mean_square(from.y);
#pragma unroll
                for (int t = 0; t < 2; ++t) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const uint32_t word = p[t].words[2 * n + half];
                        const Pair pair = unpack<E>(word);
                        const float factor = word & (c == 0 ? 0x8000u : 0x80000000u) ? 0.0f : keep_scale;
                        float& grad = grad_p[t][n].values[2 * half + c];
                        grad = factor * grad;
                        const float dx = key_x[t][half] - x, dy = key_y[t][half] - y;
                        const float r = exp2_approx(position.score(dx, dy) - log2_normaliser);
                        const float share = (t == 0 ? r : counts * r) * grad;
                        mixed[t][n].values[2 * half + c] =
                            factor * (closed * (c == 0 ? pair.low : pair.high) + open * r);
                        sums[0] += share * (dx - mean_x);
                        sums[1] += share * (dy - mean_y);
                        sums[2] += share * (dx * dx + dy * dy - mean_square);
                        sums[3] += share;
                    }
                }
            });
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                mixture[t] = as_left<E>(mixed[t]);
                for (uint32_t& word : p[t].words) word &= 0x7fff7fffu;
            }
        }

    private:
        const DensePosition<ImageAxis<3>> position;
        const int last;
        const float keep_scale, closed, open;
        float key_x[2][2], key_y[2][2];
        const float counts;  // whether the second tile does, 1 or 0
    };

    /// each_pair of both tiles.
    template <typename Visit>
    GPSA_DEVICE static void each_own_pair(Visit visit) {
#pragma unroll
        for (int t = 0; t < 2; ++t) each_pair<channels / 8>([&](int half, int n) { visit(t, half, n); });
    }

    /// sums += a times 16 other tokens, summed over these.
    template <typename At>
    GPSA_DEVICE static void add_products(OfTiles& sums, const Left (&a)[2], At at) {
#pragma unroll
        for (int s = 0; s < channels / 16; ++s) {
            const Right b = load_right_over_tokens<E>(s, at);
#pragma unroll
            for (int t = 0; t < 2; ++t) multiply<E>(&sums[t][2 * s], a[t], b);
        }
    }

    /// logsumexp in base 2 of the columns of the warp's queries; of those that do not exist it makes exp(-inf) = 0.
    GPSA_DEVICE static void load_shifts(
        float (&shift)[2][2][2], Global<const float> logsumexp, const Own& own, int tokens) {
        each_value<2>([&](int t, int i) {
            const int query = own.first(t) + 8 * (i / 2) + fragment_column() + i % 2;
            shift[t][i / 2][i % 2] = query < tokens ? load(logsumexp + query) * log2_e : INFINITY;
        });
    }

    /// P^T and delta of the warp's queries; with dropout, P is negative where it is dropped. Returns this lane's part
    /// of the sum of delta.
    GPSA_DEVICE static float store_map(
        const Map& map, Shared<float> delta, const Mask& mask, const Own& own, const Tokens& q, const Tokens& k,
        const Tokens& v, const Tokens& grad_out, float log2_scale, const float (&shift)[2][2][2]) {
        Right q_tile[2][channels / 16], grad_tile[2][channels / 16];
#pragma unroll
        for (int t = 0; t < 2; ++t) {
#pragma unroll
            for (int s = 0; s < channels / 16; ++s) {
                q_tile[t][s] =
                    load_right_over_channels<E>(s, [&](int i, int chunk) { return q.chunk(own.first(t) + i, chunk); });
                grad_tile[t][s] = load_right_over_channels<E>(
                    s, [&](int i, int chunk) { return grad_out.chunk(own.first(t) + i, chunk); });
            }
        }
        const auto score = [&](Sum(&scores)[2][2], int tile) {
            Left a[channels / 16];
            load_left<E>(a, [&](int i, int chunk) { return k.chunk(i, chunk, tile); });
#pragma unroll
            for (int s = 0; s < channels / 16; ++s) {
                for (int t = 0; t < 2; ++t) multiply<E>(scores[t], a[s], q_tile[t][s]);
            }
        };
        float sums[2][2][2] = {};
        Sum p[2][2] = {};
        score(p, 0);
#pragma unroll 2
        for (int tile = 0; tile < own.tiles; ++tile) {
            Sum grad_p[2][2] = {}, next[2][2] = {};
#pragma unroll
            for (int s = 0; s < channels / 16; ++s) {
                const Left a = load_left<E>(s, [&](int i, int chunk) { return v.chunk(i, chunk, tile); });
                for (int t = 0; t < 2; ++t) multiply<E>(grad_p[t], a, grad_tile[t][s]);
            }
            score(next, smaller(tile + 1, own.tiles - 1));  // the products of the next tile, during the exponentials
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                const uint32_t keep = mask.keep_transposed(own.first(t), 16 * tile);
                each_value<2>([&](int n, int i) {
                    float& s = p[t][n].values[i];
                    s = exp2_approx(s * log2_scale - shift[t][n][i % 2]);
                    const bool kept = keep >> (4 * n + i) & 1;
                    sums[t][n][i % 2] += kept ? s * grad_p[t][n].values[i] : 0.0f;
                    s = kept ? s : -s;
                });
                const Left a = as_left<E>(p[t]);
                store_chunk<E>(
                    map.tile(own.tile[t], tile) + 8 * lane(), {{a.words[0], a.words[1], a.words[2], a.words[3]}});
                for (int n = 0; n < 2; ++n) p[t][n] = next[t][n];
            }
        }
        float delta_sum = 0;
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            const float sum = column_sum(sums[t]) * mask.keep_scale;
            if (lane() / 4 % 2 == 0) {
                store(delta + (own.first(t) + place_of_delta(column_of_lane())), sum);
                if (own.counts(t)) delta_sum += sum;
            }
        }
        return delta_sum;
    }

    /// Of 16 queries, those that a lane needs lie side by side: columns t, t + 1, t + 8, t + 9.
    GPSA_DEVICE static int place_of_delta(int column) { return column % 8 / 2 * 4 + column / 8 * 2 + column % 2; }

    /// dK and dV of the warp's keys, but for their factors, and dS^T in the place of P^T.
    GPSA_DEVICE static void add_key_gradients(
        OfTiles& grad_k, OfTiles& grad_v, DroppedPosition& dropped, const Map& map, Shared<float> delta, const Own& own,
        const Tokens& q, const Tokens& v, const Tokens& grad_out) {
        Left v_tile[2][channels / 16];
        const auto load_keys = [&] {
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                load_left<E>(v_tile[t], [&](int i, int chunk) { return v.chunk(own.first(t) + i, chunk); });
            }
        };
        if constexpr (keep_keys) load_keys();
#pragma unroll 1
        for (int step = 0; step < own.tiles; ++step) {
            const auto in_q = [&](int i, int chunk) { return q.chunk(i, chunk, step); };
            const auto in_grad_out = [&](int i, int chunk) { return grad_out.chunk(i, chunk, step); };
            if constexpr (!keep_keys) load_keys();
            Left p[2], grad_s[2];
            Sum grad_p[2][2] = {};
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                const Chunk own_p = load_chunk<E>(map.tile(step, own.tile[t]) + 8 * lane());
                p[t] = {{own_p.words[0], own_p.words[1], own_p.words[2], own_p.words[3]}};
            }
#pragma unroll
            for (int s = 0; s < channels / 16; ++s) {
                const Right b = load_right_over_channels<E>(s, in_grad_out);
                for (int t = 0; t < 2; ++t) multiply<E>(grad_p[t], v_tile[t][s], b);
            }
            if constexpr (has_dropout) {
                Left mixture[2];
                dropped.drop(mixture, p, grad_p, 16 * step);
                add_products(grad_v, mixture, in_grad_out);
            } else {
                add_products(grad_v, p, in_grad_out);
            }
            const Chunk deltas = load_chunk<float>(delta + (16 * step + place_of_delta(fragment_column())));
            float own_delta[2][2];
            std::memcpy(own_delta, deltas.words, sizeof own_delta);
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                each_pair<2>([&](int half, int n) {
                    const Pair pair = unpack<E>(p[t].words[2 * n + half]);
                    float* grad = &grad_p[t][n].values[2 * half];
                    grad[0] = pair.low * (grad[0] - own_delta[n][0]);
                    grad[1] = pair.high * (grad[1] - own_delta[n][1]);
                });
                grad_s[t] = as_left<E>(grad_p[t]);
            }
            sync_warp();  // all lanes have their P
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                const Rows<E, 16> rows{map.tile(step, own.tile[t])};
                stage_rows<E, 16>(grad_p[t], 0, 16, [&](int i, int chunk) { return rows.chunk(i, chunk); });
            }
            add_products(grad_k, grad_s, in_q);
        }
    }

    /// dQ of the warp's queries, but for its factor.
    GPSA_DEVICE static void add_query_gradients(OfTiles& grad_q, const Map& map, const Own& own, const Tokens& k) {
#pragma unroll 1
        for (int tile = 0; tile < own.tiles; ++tile) {
            Left grad_s[2];
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                const Rows<E, 16> rows{map.tile(own.tile[t], tile)};
                grad_s[t] = load_left_over_tokens<E>(0, [&](int j, int chunk) { return rows.chunk(j, chunk); });
            }
            add_products(grad_q, grad_s, [&](int j, int chunk) { return k.chunk(j, chunk, tile); });
        }
    }
};

namespace {

template <typename Visit>
auto dispatch_backward(const Problem& problem, Visit visit) {
    return dispatch<64>(problem, [&](auto element, auto channels, auto has_dropout) {
        return visit(WholeImageBackward<decltype(element), channels.value, has_dropout.value>{});
    });
}

}  // namespace

bool whole_image_backward_fits(const Problem& problem, const Device& device) {
    const int64_t tokens = int64_t(problem.rows) * problem.columns;
    if (problem.head_dim > 64 || tokens > whole_image_tokens) return false;
    if (problem.dropout_p == 0 && (problem.rows > 16 || problem.columns > 16)) return false;  // PositionGradient
    return dispatch_backward(problem, [&](auto kernel) { return kernel.shared_bytes(problem) <= device.shared_bytes; });
}

const char* launch_whole_image_backward(const Backward& call, const Launcher& launch) {
    const Problem& problem = call.problem;
    return dispatch_backward(problem, [&](auto kernel) {
        const Shape shape{problem.batch * problem.heads, kernel.threads_for(problem), kernel.shared_bytes(problem)};
        return launch(kernel, shape, call);
    });
}

}  // namespace gpsa
