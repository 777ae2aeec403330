// Forward, N <= 256 tokens: one block per (batch, head), or several that share its query rows.
//
//   O = (1 - g) softmax(scale Q K^T) V + g (Ay (x) Ax) V,   g = sigmoid(gate)
//
// In shared memory, 16 bits: K, V (N, D), Q (the block's rows, D), and one buffer (N, D) that holds V mixed along one
// axis, then the positional branch, then the output. In registers: for 16 query rows of a warp, all their scores.
// With attention dropout R is formed entry by entry beside P, there is one product with V, and the rows of Q make way
// for those of the output. Global traffic of a block: K, V, its rows of Q and of O, each once.
#include "dropout.cuh"
#include "launch.h"
#include "whole_image_position.cuh"

namespace gpsa {

struct WholeImageForwardCall {
    Forward forward;
    int row_blocks;  // that share the query rows of a (batch, head)
};

/// `key_tiles`: of 16 keys in a row of scores.
template <typename E_, int channels_, int key_tiles_, bool has_dropout>
struct WholeImageForward {
    using E = E_;
    using Call = WholeImageForwardCall;
    static constexpr int channels = channels_, key_tiles = key_tiles_, keys = 16 * key_tiles;
    static constexpr int threads_beside_others = 128;  // of a block of which several share a multiprocessor
    static constexpr int threads_alone = 256;          // of one that has it alone, in as many registers as two

    /// Of a multiprocessor; there are registers for as many. Three blocks of 14 x 14 x 48 fit in 228 KiB of shared
    /// memory, if a thread has few registers: on sm_100 it spills.
    static constexpr int most_threads(int architecture) {
        const bool three = channels == 48 && key_tiles == 13 && !has_dropout && architecture == 900;
        return threads_beside_others * ((channels <= 64 && key_tiles == 4) || three ? 3 : 2);
    }
    static constexpr int least_blocks(int) { return 0; }  // any

    /// In the order of run()'s arrays.
    static int shared_bytes(const Problem& problem, int row_blocks) {
        const int tokens = problem.rows * problem.columns;
        const auto bytes = [](int elements, int size) { return (elements * size + 15) / 16 * 16; };
        return bytes(key_value_rows(tokens) * channels, 2) +
               bytes(smaller(rows_per_block(tokens, row_blocks), tokens) * channels, 2) +
               bytes(position_elements(problem), 2) + bytes(problem.rows + problem.columns + place_numbers, 4);
    }

    /// How many blocks that have all rows of an image share a multiprocessor, as far as shared memory goes.
    static int resident(const Problem& problem, const Device& device) {
        constexpr int system_bytes = 1024;  // that every block takes beside its own
        return (device.shared_bytes + system_bytes) / (shared_bytes(problem, 1) + system_bytes);
    }
    static int threads_for(const Problem& problem, const Device& device) {
        return resident(problem, device) > 1 ? threads_beside_others : threads_alone;
    }

    GPSA_DEVICE static void run(const Call& arguments) {
        const Forward& call = arguments.forward;
        const Problem& problem = call.problem;
        const int tokens = problem.rows * problem.columns, head_dim = problem.head_dim;
        const int batch = block_x() / problem.heads, head = block_x() % problem.heads;
        const int most_rows = rows_per_block(tokens, arguments.row_blocks);
        const int first_row = block_y() * most_rows;
        const int row_count = smaller(most_rows, tokens - first_row);
        if (row_count <= 0) return;

        SharedMemory memory;
        const Shared<E> keys_values = memory.array<E>(key_value_rows(tokens) * channels, "keys and values");
        const Tokens k{keys_values}, v{keys_values, tokens};
        const Tokens q{memory.array<E>(smaller(most_rows, tokens) * channels, "queries")};
        const GridRows<E, channels> mixed(  // not used with dropout
            has_dropout ? q.base : memory.array<E>(position_elements(problem), "position"), problem.columns);
        const int coordinates = problem.rows + problem.columns;
        const Shared<float> normalisers = memory.array<float>(coordinates + place_numbers, "normalisers and places");
        const Shared<float> places = normalisers + coordinates;
        const auto position = image_axes<1>(problem, call.pos_weight, head, normalisers);
        const float gate = load(Global<const float>(call.gate) + head);
        const float open = sigmoid(gate), closed = sigmoid(-gate);  // 1 - g would lose its digits as g -> 1

        copy_rows(v, rows_of<const E>(call.v, batch, head), call.v.token, tokens, keys, head_dim);
        copy_commit();
        copy_rows(k, rows_of<const E>(call.k, batch, head), call.k.token, tokens, tokens, head_dim);
        const Global<const E> queries = rows_of<const E>(call.q, batch, head) + first_row * call.q.token;
        copy_rows(q, queries, call.q.token, row_count, row_count, head_dim);
        copy_commit();

        prepare(position);
        if constexpr (has_dropout) {
            store_places(position, places);
        } else {
            copy_wait<1>();
            sync_block();
            mix_position<E>(position, v, mixed);
        }
        copy_wait<0>();
        sync_block();

        const Global<E> out = rows_of<E>(call.out, batch, head);
#pragma unroll 1
        for (int row = 16 * rotated_warp(); row < row_count; row += 16 * (threads() / 32)) {
            Sum scores[2 * key_tiles] = {};
            const float log2_scale = score(scores, q, row, row_count, k, problem.scale);
            const Softmax softmax(scores, log2_scale, tokens);
            const int token = first_row + row;
            if (call.logsumexp) {
                const Global<float> to = Global<float>(call.logsumexp) + int64_t(block_x()) * tokens;
                store_logsumexp(to, token, tokens, softmax.shift, softmax.sum);
            }
            const auto share = [&](int half) { return closed * reciprocal_approx(softmax.sum[half]); };
            const auto store_out = [&](auto at) {
                sync_warp();
                store_rows<channels>(out, call.out.token, token, tokens, head_dim, at);
            };
            Sum content[channels / 8] = {};
            if constexpr (has_dropout) {
                const Dropout dropout(problem, block_x());
                const Dense dense(position, token);
                const float up = dropout.keep_scale, shares[] = {share(0) * up, share(1) * up};
                // the exponentials of 16 keys become M * ((1 - g) P + g R), M the scaled mask
                const auto mixture = [&](Sum* weights, int tile) {
                    const uint32_t keep = dropout.keep(token, 16 * tile);
                    const auto place = [&](int i) {
                        const Shared<float> at = places + (16 * tile + i);
                        return typename Dense::Coordinates{load(at), load(at + keys)};
                    };
                    dense.entries(place, [&](int n, int i, float entry, int half, float, float) {
                        float& weight = weights[n].values[i];
                        weight = keep >> (4 * n + i) & 1 ? shares[half] * weight + open * up * entry : 0.0f;
                    });
                };
                weigh(content, scores, v, tokens, mixture);
                sync_warp();
                stage_rows<E, channels>(content, row, row_count, [&](int i, int chunk) { return q.chunk(i, chunk); });
                store_out([&](int i, int chunk) { return q.chunk(i - first_row, chunk); });
            } else {
                weigh(content, scores, v, tokens, [](Sum*, int) {});
                blend(mixed, token, tokens, open, content, {share(0), share(1)});
                store_out([&](int i, int chunk) { return mixed.chunk(i, chunk); });
            }
        }
    }

    /// Query rows of a block, but for the last one's.
    GPSA_HOST_DEVICE static int rows_per_block(int tokens, int row_blocks) {
        return ((tokens + 15) / 16 + row_blocks - 1) / row_blocks * 16;
    }

private:
    using Tokens = Rows<E, channels>;
    using Dense = DenseRows<ImageAxis<1>>;
    static constexpr int place_numbers = has_dropout ? 2 * keys : 0;

    /// Rows of the array that K and V share. A tile of keys that ends after the last one reads into V, and is masked;
    /// a tile of values that does reads zeros, which its weights of zero need (0 * NaN is NaN).
    GPSA_HOST_DEVICE static int key_value_rows(int tokens) { return tokens + keys; }

    GPSA_HOST_DEVICE static int position_elements(const Problem& problem) {
        return has_dropout ? 0 : GridRows<E, channels>::elements(problem.rows, problem.columns);
    }

    /// Of 4 warps with 13 tiles of rows, one has a tile more: by a hash, in every block another one, as each scheduler
    /// of a multiprocessor has the same warp of all its blocks. The number of warps is a power of two.
    GPSA_DEVICE static int rotated_warp() {
        return (warp() + int(block_x() * 0x9e3779b9u >> 28)) & (threads() / 32 - 1);
    }

    /// scores = sign(scale) Q K^T for 16 rows of Q and all keys. K's fragments serve one tile of rows, Q's all tiles of
    /// keys. Returns |scale| in the exponent of 2.
    GPSA_DEVICE static float score(Sum* scores, const Tokens& q, int row, int row_count, const Tokens& k, float scale) {
        Left a[channels / 16];
        load_left<E>(a, [&](int i, int chunk) { return q.chunk(smaller(row + i, row_count - 1), chunk); });
        const float log2_scale = log2_scale_of(scale, a, channels / 16);
#pragma unroll
        for (int tile = 0; tile < key_tiles; ++tile) {
            add_over_channels<E>(&scores[2 * tile], a, [&](int j, int chunk) { return k.chunk(j, chunk, tile); });
        }
        return log2_scale;
    }

    /// scores = their exponentials, exactly 0 for keys that do not exist. Of rows r and r + 8: log2 of the largest
    /// exponential, and the sum of exponentials relative to it.
    struct Softmax {
        float shift[2], sum[2];

        GPSA_DEVICE Softmax(Sum* scores, float log2_scale, int tokens) {
            constexpr int last = 2 * key_tiles - 2;
            if (tokens <= keys - 16) mask_keys<last>(scores, tokens);  // a branch that 14 x 14 tokens skip
            mask_keys<2>(scores + last, tokens - 8 * last);
            largest_scores<2 * key_tiles>(shift, scores);
            for (float& s : shift) s = maximum_of_lanes<4>(s) * log2_scale;
            exponentiate<2 * key_tiles>(sum, scores, log2_scale, shift);
            for (float& s : sum) s = sum_of_lanes<4>(s);
        }
    };

    /// The coordinates of every key: formed in the loop over rows, the compiler would keep them in registers.
    GPSA_DEVICE static void store_places(const typename Dense::Position& position, Shared<float> places) {
        for (int key = thread(); key < keys; key += threads()) {
            const auto [x, y] = Dense::coordinates(position.place(key));
            store(places + key, x);
            store(places + (keys + key), y);
        }
    }

    /// content = P V, P rounded to 16 bits, after `change(weights of 16 keys, tile)`.
    template <typename Change>
    GPSA_DEVICE static void weigh(Sum* content, Sum* weights, const Tokens& v, int tokens, Change change) {
#pragma unroll
        for (int tile = 0; tile < key_tiles; ++tile) {
            // a branch that keeps the masks of later tiles, and their registers, from being drawn ahead
            if (has_dropout && 16 * tile >= tokens) break;
            change(&weights[2 * tile], tile);
            add_over_tokens<E, channels>(
                content, as_left<E>(&weights[2 * tile]), [&](int j, int chunk) { return v.chunk(j, chunk, tile); });
        }
    }

    /// position = share content + open position for 16 tokens from `first` on, every element by the lane that holds it.
    GPSA_DEVICE static void blend(
        const GridRows<E, channels>& position, int first, int tokens, float open, const Sum* content,
        const float (&share)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int token = first + fragment_row() + 8 * half;
            if (token >= tokens) continue;
            const auto at = [&](int n) { return position.chunk(token, n) + fragment_column(); };
            uint32_t words[channels / 8];  // all are loaded before the first is stored: the waits overlap
#pragma unroll
            for (int n = 0; n < channels / 8; ++n) words[n] = load_pair<E>(at(n));
#pragma unroll
            for (int n = 0; n < channels / 8; ++n) {
                const Pair p = unpack<E>(words[n]);
                const float* c = &content[n].values[2 * half];
                store_pair<E>(at(n), pack<E>(share[half] * c[0] + open * p.low, share[half] * c[1] + open * p.high));
            }
        }
    }
};

namespace {

/// Calls `visit` with the kernel for a problem. With dropout and more than 64 channels there are no registers for
/// scores, R and the output: none is compiled.
template <typename Visit>
auto dispatch_forward(const Problem& problem, Visit visit) {
    return dispatch(problem, [&](auto element, auto channels, auto has_dropout) {
        using E = decltype(element);
        constexpr bool dropped = has_dropout.value && channels.value <= 64;
        const int tokens = problem.rows * problem.columns;
        if (tokens <= 64) return visit(WholeImageForward<E, channels.value, 4, dropped>{});
        if (tokens <= 208) return visit(WholeImageForward<E, channels.value, 13, dropped>{});  // 14 x 14 tokens
        return visit(WholeImageForward<E, channels.value, 16, dropped>{});
    });
}

}  // namespace

int whole_image_forward_row_blocks(const Problem& problem, const Device& device) {
    if (int64_t(problem.rows) * problem.columns > whole_image_tokens) return 0;
    if (problem.dropout_p > 0 && problem.head_dim > 64) return 0;
    return dispatch_forward(problem, [&](auto kernel) {
        // As many as have a multiprocessor each, or, where there are more (batch, head)s than these, as many as run at
        // once, `resident` on each; and no more than there are tiles of 16 rows for all warps of a block.
        const int tiles = (problem.rows * problem.columns + 15) / 16, warps = kernel.threads_for(problem, device) / 32;
        const int most = (tiles + warps - 1) / warps, resident = kernel.resident(problem, device);
        const int64_t batch_heads = problem.batch * problem.heads, multiprocessors = device.multiprocessors;
        const int64_t at_once = batch_heads > multiprocessors ? multiprocessors * resident : multiprocessors;
        const int64_t wanted = batch_heads > 0 ? at_once / batch_heads : 1;
        const int row_blocks = wanted < 1 ? 1 : wanted < most ? int(wanted) : most;
        return kernel.shared_bytes(problem, row_blocks) > device.shared_bytes ? 0 : row_blocks;
    });
}

const char* launch_whole_image_forward(const Forward& call, int row_blocks, const Launcher& launch) {
    const Problem& problem = call.problem;
    return dispatch_forward(problem, [&](auto kernel) {
        const Shape shape{
            problem.batch * problem.heads, kernel.threads_for(problem, launch.device),
            kernel.shared_bytes(problem, row_blocks), row_blocks};
        return launch(kernel, shape, {call, row_blocks});
    });
}

}  // namespace gpsa
