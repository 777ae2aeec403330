// Backward for any number of tokens: the positional branch goes to `grad_v` and its sums (tiled_position.cuh), then one
// block per 64 query rows of a (batch, head) makes dQ, and one per 64 keys dK and dV.
//
//   dP = dO V^T,   delta = rowsum(dO * O_content),   dS = P * (dP - delta)
//   dQ = (1 - g) scale dS K,   dK = (1 - g) scale dS^T Q,   dV = (1 - g) P^T dO + g R^T dO
//
// Both form the scores, so that every element of a result is summed by one warp. 64 keys and values (queries and
// gradients) are in shared memory while the next 64 are copied. Global traffic of a block: K and V (Q and dO) of the
// (batch, head) once, its own rows of all else once. With attention dropout both branches have one mask M, and
//   dP = M * (dO V^T) / (1 - p),   dV = (M * ((1 - g) P + g R))^T dO / (1 - p).
#include "dropout.cuh"
#include "tiled_position.cuh"

namespace gpsa {

struct TiledBackwardCall {
    Backward backward;
    PositionCall position;
    float* delta;  // (B, H, N)
    int slots;
};

/// dQ, delta, and in the block's slot of `sums` minus the sum of delta; with dropout what the position adds, too.
template <typename E_, int channels_, bool has_dropout>
struct TiledQueryGradient : TiledKernel {
    using E = E_;
    using Call = TiledBackwardCall;
    static constexpr int channels = channels_;

    static constexpr int least_blocks(int architecture) {
        return sharing(channels > 64 ? 1 : has_dropout || channels > 48 ? 2 : 3, architecture);
    }
    static int shared_bytes() { return 6 * tile_tokens * channels * 2 + 4 * 4 * 4; }
    static int64_t blocks(const Call& call) { return tiled_blocks(call.backward.problem, tile_tokens); }

    GPSA_DEVICE static void run(const Call& arguments) {
        const Backward& call = arguments.backward;
        const Problem& problem = call.problem;
        const int head_dim = problem.head_dim;
        const Block block(problem);

        SharedMemory memory;
        const Tile queries{memory.array<E>(tile_tokens * channels, "queries")};
        const Tile grads{memory.array<E>(tile_tokens * channels, "gradients")};
        const Shared<E> keys = memory.array<E>(2 * tile_tokens * channels, "keys");
        const Shared<E> values = memory.array<E>(2 * tile_tokens * channels, "values");
        const Shared<float> partial = memory.array<float>(4 * 4, "sums");
        const Tile contents{values, tile_tokens};  // in the second stage's place, before it is used
        const auto copy = [&](const Tile& to, const Tensor& from, int start) {
            copy_rows(
                to, rows_of<const E>(from, block.batch, block.head) + start * from.token, from.token,
                block.tokens - start, tile_tokens, head_dim);
        };
        const auto fetch = [&](int start, int stage) {
            copy({keys, stage * tile_tokens}, call.k, start);
            copy({values, stage * tile_tokens}, call.v, start);
            copy_commit();
        };
        copy(queries, call.q, block.first);
        copy(grads, call.grad_out, block.first);
        copy(contents, call.content, block.first);
        fetch(0, 0);
        copy_wait<0>();
        sync_block();

        Left q[channels / 16], grad[channels / 16];
        load_own_rows(q, queries.tile(warp()));
        load_own_rows(grad, grads.tile(warp()));
        const Row row(arguments, block, grad, contents.tile(warp()));
        sync_block();  // all have read the content

        const Mask mask(arguments, block);
        const float log2_scale = problem.scale * log2_e;
        Sum sums[channels / 8] = {};
        float of_parameters[4] = {};  // this lane's partial sums
        int stage = 0;
#pragma unroll 1
        for (int start = 0; start < block.tokens; start += tile_tokens, stage ^= 1) {
            if (start + tile_tokens < block.tokens) fetch(start + tile_tokens, stage ^ 1);
            const Tile k{keys, stage * tile_tokens}, v{values, stage * tile_tokens};
#pragma unroll 1  // unrolled, its addresses would be kept in registers
            for (int tile = 0; tile < tile_tokens / 16; ++tile) {
                const auto key = [&](int j, int chunk) { return k.chunk(j, chunk, tile); };
                const auto value = [&](int j, int chunk) { return v.chunk(j, chunk, tile); };
                Sum scores[2] = {}, grad_weights[2] = {};
#pragma unroll
                for (int s = 0; s < channels / 16; ++s) {
                    multiply<E>(scores, q[s], load_right_over_channels<E>(s, key));
                    multiply<E>(grad_weights, grad[s], load_right_over_channels<E>(s, value));
                }
                if constexpr (has_dropout) mask.add(of_parameters, grad_weights, block.row, start + 16 * tile);
                each_value<2>([&](int n, int i) {
                    float& s = scores[n].values[i];
                    const bool exists = start + 16 * tile + 8 * n + fragment_column() + i % 2 < block.tokens;
                    const float weight = exp2_approx(s * log2_scale - row.log2_sum[i / 2]);
                    s = exists ? weight * (grad_weights[n].values[i] - row.delta[i / 2]) : 0;
                });
                add_over_tokens<E, channels>(sums, as_left<E>(scores), key);
            }
            copy_wait<0>();
            sync_block();
        }

        const float gate = load(Global<const float>(call.gate) + block.head);
        const float open = sigmoid(gate), closed = sigmoid(-gate);
        scale<channels / 8>(sums, closed * problem.scale);
        store_own_rows(sums, queries.tile(warp()), call.grad_q, block, block.row, head_dim);
        if (fragment_column() == 0) of_parameters[3] -= row.delta[0] + row.delta[1];  // 0 where there is no row
        store_partial<4>(partial, of_parameters);
        sync_block();
        if (const int n = thread(); n < 4) {
            const int64_t slot = block.batch * arguments.slots + block.first / tile_tokens;
            const Global<float> sum = sum_of(call.sums, slot, problem.heads, block.head, n);
            store(sum, (n < 3 ? open : open * closed) * total<4>(partial, tiled_warps, n));
        }
    }

private:
    using Tile = Rows<E, channels>;

    /// Of rows r and r + 8: log2 of the sum of exponentials, and delta.
    struct Row {
        float log2_sum[2], delta[2];

        GPSA_DEVICE Row(const Call& call, const Block& block, const Left (&grad)[channels / 16], const Tile& contents) {
            Left content[channels / 16];
            load_own_rows(content, contents);
            const int64_t first_row = block.batch_head * block.tokens;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float sum = 0;
#pragma unroll
                for (int s = 0; s < channels / 16; ++s) {
#pragma unroll
                    for (int side = 0; side < 2; ++side) {
                        const Pair a = unpack<E>(grad[s].words[half + 2 * side]);
                        const Pair b = unpack<E>(content[s].words[half + 2 * side]);
                        sum += a.low * b.low + a.high * b.high;
                    }
                }
                delta[half] = sum_of_lanes<4>(sum);
                const int token = block.row + fragment_row() + 8 * half;
                const bool exists = token < block.tokens;
                const Global<const float> logsumexp(call.backward.logsumexp);
                log2_sum[half] = exists ? load(logsumexp + (first_row + token)) * log2_e : INFINITY;
                if (exists && fragment_column() == 0) {
                    store(Global<float>(call.delta) + (first_row + token), delta[half]);
                }
            }
        }
    };

    struct DropoutMask : DenseRows<GridAxis> {
        const Dropout dropout;
        float mean_x[2], mean_y[2], mean_square[2];

        GPSA_DEVICE DropoutMask(const Call& call, const Block& block)
            : DenseRows(call.position.axes(block.head), block.row), dropout(call.position.problem, block.batch_head) {
            for (int half = 0; half < 2; ++half) {
                const GridAxis &x = this->position.along_x, &y = this->position.along_y;
                const auto place = this->row[half];
                mean_x[half] = x.mean(place.x);
                mean_y[half] = y.mean(place.y);
                mean_square[half] = x.mean_square(place.x) + y.mean_square(place.y);
                // no entry of a query that does not exist is infinite, whatever stands below the grid
                if (block.row + fragment_row() + 8 * half >= block.tokens) this->normaliser[half] = INFINITY;
            }
        }
        /// grad_weights = M * grad_weights / (1 - p); adds what 16 keys give to the gradients of the positional
        /// weights, dR/dw = R * (offset - its mean under R).
        GPSA_DEVICE void add(float (&sums)[4], Sum* grad_weights, int row, int key) const {
            const uint32_t keep = dropout.keep(row, key);
            this->entries_from(key, [&](int n, int i, float entry, int half, float dx, float dy) {
                float& grad = grad_weights[n].values[i];
                grad = keep >> (4 * n + i) & 1 ? grad * dropout.keep_scale : 0;
                const float share = entry * grad;
                sums[0] += share * (dx - mean_x[half]);
                sums[1] += share * (dy - mean_y[half]);
                sums[2] += share * (dx * dx + dy * dy - mean_square[half]);
                sums[3] += share;
            });
        }
    };
    using Mask = std::conditional_t<has_dropout, DropoutMask, Nothing>;
};

/// dK and dV. What `grad_v` holds, the positional branch with early_share() of its gate, is read and written over.
template <typename E_, int channels_, bool has_dropout>
struct TiledKeyGradient : TiledKernel {
    using E = E_;
    using Call = TiledBackwardCall;
    static constexpr int channels = channels_;
    // Of a warp, 16 keys each: two share what is read of Q and dO, if there are registers for both.
    static constexpr int row_tiles = has_dropout || channels > 48 ? 1 : 2;
    static constexpr int block_rows = row_tiles * tile_tokens;
    static constexpr int row_numbers = has_dropout ? 5 : 2;  // per query: log2 of its sum, delta; its place in the grid

    static constexpr int least_blocks(int architecture) { return sharing(channels > 64 ? 1 : 2, architecture); }
    static int shared_bytes() {
        return (2 * block_rows + 4 * tile_tokens) * channels * 2 + 2 * row_numbers * tile_tokens * 4;
    }
    static int64_t blocks(const Call& call) { return tiled_blocks(call.backward.problem, block_rows); }

    GPSA_DEVICE static void run(const Call& arguments) {
        const Backward& call = arguments.backward;
        const Problem& problem = call.problem;
        const int head_dim = problem.head_dim;
        const Block block(problem, block_rows);

        SharedMemory memory;
        const Tile keys{memory.array<E>(block_rows * channels, "keys")};
        const Tile values{memory.array<E>(block_rows * channels, "values")};
        const Shared<E> queries = memory.array<E>(2 * tile_tokens * channels, "queries");
        const Shared<E> grads = memory.array<E>(2 * tile_tokens * channels, "gradients");
        const Shared<float> numbers = memory.array<float>(2 * row_numbers * tile_tokens, "numbers of queries");
        const Tile own_keys{keys.base, 16 * row_tiles * warp()}, own_values{values.base, 16 * row_tiles * warp()};
        RowStream<E, channels, tile_tokens> next_queries(call.q, block, 0, queries, head_dim);
        RowStream<E, channels, tile_tokens> next_grads(call.grad_out, block, 0, grads, head_dim);
        const auto fetch = [&](int stage) {
            next_queries.fetch(stage);
            next_grads.fetch(stage);
            copy_commit();
        };
        // A number for each thread: queries that do not exist get weight exp2(-inf) = 0, and delta 0.
        const auto load_number = [&](int start) {
            const int query = start + thread() % tile_tokens;
            const bool is_delta = thread() >= tile_tokens;
            if (query >= block.tokens) return is_delta ? 0 : INFINITY;
            const Global<const float> from(is_delta ? arguments.delta : call.logsumexp);
            return load(from + (block.batch_head * block.tokens + query)) * (is_delta ? 1 : log2_e);
        };
        const auto store_number = [&](float number, int stage) {
            store(numbers + (stage * row_numbers * tile_tokens + thread()), number);
        };
        const Mask mask(arguments, block);
        const auto store_places = [&](int start, int stage) {
            if constexpr (has_dropout) mask.store_places(numbers + (stage * row_numbers + 2) * tile_tokens, start);
        };

        RowStream<E, channels, block_rows>(call.k, block, block.first, keys.base, head_dim).fetch(0);
        RowStream<E, channels, block_rows>(call.v, block, block.first, values.base, head_dim).fetch(0);
        fetch(0);
        store_number(load_number(0), 0);
        store_places(0, 0);
        copy_wait<0>();
        sync_block();

        Left k[row_tiles][channels / 16], v[row_tiles][channels / 16];
        if constexpr (resident) {
#pragma unroll
            for (int t = 0; t < row_tiles; ++t) {
                load_own_rows(k[t], own_keys.tile(t));
                load_own_rows(v[t], own_values.tile(t));
            }
        }
        const float log2_scale = problem.scale * log2_e;
        const RightLoader<channels, false> over_channels;
        const RightLoader<channels, true> over_tokens;
        Sum grad_k[row_tiles][channels / 8] = {}, grad_v[row_tiles][channels / 8] = {};
        int stage = 0;
#pragma unroll 1
        for (int start = 0; start < block.tokens; start += tile_tokens, stage ^= 1) {
            const bool more = start + tile_tokens < block.tokens;
            float number = 0;
            if (more) {
                fetch(stage ^ 1);
                number = load_number(start + tile_tokens);
            }
#pragma unroll 1  // unrolled, its addresses would be kept in registers
            for (int tile = 0; tile < tile_tokens; tile += 16) {
                const Shared<E> q = queries + (stage * tile_tokens + tile) * channels;
                const Shared<E> grad = grads + (stage * tile_tokens + tile) * channels;
                const auto number_of = [&](int which, int n, int i) {
                    const int column = tile + 8 * n + fragment_column() + i % 2;
                    return load(numbers + ((stage * row_numbers + which) * tile_tokens + column));
                };
                float log2_sum[2][2], delta[2][2];
                each_column([&](int n, int c, int) {
                    log2_sum[n][c] = number_of(0, n, c);
                    delta[n][c] = number_of(1, n, c);
                });
                // keys are the rows, queries the columns
                Sum weights[row_tiles][2] = {}, grad_weights[row_tiles][2] = {};
#pragma unroll
                for (int s = 0; s < channels / 16; ++s) {
                    const Right b = over_channels(q, s), c = over_channels(grad, s);
#pragma unroll
                    for (int t = 0; t < row_tiles; ++t) {
                        if constexpr (!resident) {
                            k[t][s] = load_left<E>(s, [&](int i, int chunk) { return own_keys.chunk(i, chunk, t); });
                            v[t][s] = load_left<E>(s, [&](int i, int chunk) { return own_values.chunk(i, chunk, t); });
                        }
                        multiply<E>(weights[t], k[t][s], b);
                        multiply<E>(grad_weights[t], v[t][s], c);
                    }
                }
                Left of_values[row_tiles], of_keys[row_tiles];
#pragma unroll
                for (int t = 0; t < row_tiles; ++t) {
                    each_value<2>([&](int n, int i) {
                        float& weight = weights[t][n].values[i];
                        weight = exp2_approx(weight * log2_scale - log2_sum[n][i % 2]);
                    });
                    of_values[t] = as_left<E>(weights[t]);
                    if constexpr (has_dropout) {
                        of_values[t] = mask.mix(grad_weights[t], weights[t], start + tile, block.row, number_of);
                    }
                    each_value<2>([&](int n, int i) {
                        weights[t][n].values[i] *= grad_weights[t][n].values[i] - delta[n][i % 2];
                    });
                    of_keys[t] = as_left<E>(weights[t]);
                }
#pragma unroll
                for (int s = 0; s < channels / 16; ++s) {
                    const Right b = over_tokens(grad, s);
                    const Right c = over_tokens(q, s);
#pragma unroll
                    for (int t = 0; t < row_tiles; ++t) {
                        multiply<E>(&grad_v[t][2 * s], of_values[t], b);
                        multiply<E>(&grad_k[t][2 * s], of_keys[t], c);
                    }
                }
            }
            if (more) {
                store_number(number, stage ^ 1);
                store_places(start + tile_tokens, stage ^ 1);
            }
            copy_wait<0>();
            sync_block();
        }

        const float gate = load(Global<const float>(call.gate) + block.head);
        const float open = sigmoid(gate), closed = sigmoid(-gate);
#pragma unroll
        for (int t = 0; t < row_tiles; ++t) {
            const int row = block.row + 16 * t;
            if constexpr (has_dropout) {
                scale<channels / 8>(grad_v[t], mask.dropout.keep_scale);
            } else {
                const float late = open / early_share(open, block.tokens);
                fetch_own_rows(own_values.tile(t), call.grad_v, block, row, head_dim);
                copy_wait<0>();
                sync_warp();
                Sum positional[channels / 8];
                unstage_own_rows(positional, own_values.tile(t));
                each_value<channels / 8>([&](int n, int i) {
                    float& grad = grad_v[t][n].values[i];
                    grad = closed * grad + late * positional[n].values[i];
                });
            }
            scale<channels / 8>(grad_k[t], closed * problem.scale);
            store_own_rows(grad_v[t], own_values.tile(t), call.grad_v, block, row, head_dim);
            store_own_rows(grad_k[t], own_keys.tile(t), call.grad_k, block, row, head_dim);
        }
    }

private:
    using Tile = Rows<E, channels>;
    static constexpr bool resident = channels <= 64;  // whether a warp keeps its keys and values in registers

    /// Three numbers per query: x, y, and log2 of R's normaliser.
    struct DropoutMask {
        const DensePosition<GridAxis> axes;
        const Dropout dropout;
        float open, closed, key_x[2], key_y[2];

        GPSA_DEVICE DropoutMask(const Call& call, const Block& block)
            : axes(call.position.axes(block.head)), dropout(call.position.problem, block.batch_head) {
            const float gate = load(Global<const float>(call.backward.gate) + block.head);
            open = sigmoid(gate);
            closed = sigmoid(-gate);
            for (int half = 0; half < 2; ++half) {
                const auto key = axes.place(block.row + fragment_row() + 8 * half);
                key_x[half] = float(key.x);
                key_y[half] = float(key.y);
            }
        }
        GPSA_DEVICE void store_places(Shared<float> to, int start) const {
            if (thread() >= tile_tokens) return;
            const auto query = axes.place(start + thread());
            const bool exists = query.y < axes.along_y.size;
            store(to + thread(), float(query.x));
            store(to + (tile_tokens + thread()), float(query.y));
            store(to + (2 * tile_tokens + thread()), exists ? axes.log2_normaliser(query) : INFINITY);
        }

        /// M * ((1 - g) P + g R), and grad_weights = M * grad_weights / (1 - p).
        template <typename Number>
        GPSA_DEVICE Left mix(Sum* grad_weights, const Sum* weights, int query, int key, Number number) const {
            Sum mixed[2];
            const uint32_t keep = dropout.keep_transposed(query, key);
            each_value<2>([&](int n, int i) {
                const float dx = key_x[i / 2] - number(2, n, i), dy = key_y[i / 2] - number(3, n, i);
                const float entry = exp2_approx(axes.score(dx, dy) - number(4, n, i));
                const bool kept = keep >> (4 * n + i) & 1;
                mixed[n].values[i] = kept ? closed * weights[n].values[i] + open * entry : 0;
                grad_weights[n].values[i] = kept ? grad_weights[n].values[i] * dropout.keep_scale : 0;
            });
            return as_left<E>(mixed);
        }
    };
    using Mask = std::conditional_t<has_dropout, DropoutMask, Nothing>;
};

const char* launch_tiled_backward(const Backward& call, const Launcher& launcher) {
    const Problem& problem = call.problem;
    const TiledWorkspace workspace(problem, true);
    const auto floats = [&](int index) { return workspace.floats(call.workspace, index); };
    const PositionCall position{problem, call.pos_weight, floats(TiledWorkspace::statistics)};
    const int slots = tiled_slots(problem);
    return dispatch(problem, [&](auto element, auto channels, auto has_dropout) {
        using E = decltype(element);
        TiledLauncher launch{launcher};
        launch(PositionStatistics{}, position);
        if constexpr (!has_dropout.value) {
            const Tensor mixed = workspace.tensor(problem, call.workspace, TiledWorkspace::mixed);
            const Tensor mixed_grad = workspace.tensor(problem, call.workspace, TiledWorkspace::mixed_grad);
            const Lines along_x = lines_along_x(problem), along_y = lines_along_y(problem);
            const int slot_y = token_tiles(problem), slot_x = slot_y + along_y.blocks();
            const MixCall grad_y{position,  along_y,   call.grad_out, mixed_grad, mixed,
                                 call.gate, call.sums, slots,         slot_y};
            const MixCall grad_x{position,  along_x,   mixed_grad, call.grad_v, call.v,
                                 call.gate, call.sums, slots,      slot_x};
            launch(MixLines<E, channels.value, false>{}, {position, along_x, call.v, mixed});
            launch(MixLines<E, channels.value, true>{}, grad_y);
            launch(MixLines<E, channels.value, true>{}, grad_x);
        }
        const TiledBackwardCall attention{call, position, floats(TiledWorkspace::delta), slots};
        launch(TiledQueryGradient<E, channels.value, has_dropout.value>{}, attention);
        launch(TiledKeyGradient<E, channels.value, has_dropout.value>{}, attention);
        return launch.error;
    });
}

}  // namespace gpsa
