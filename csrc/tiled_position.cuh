// The positional branch for grids of any size: its statistics, and products with an axis' table along the lines.
//
//   R = Ay (x) Ax,   A[i, j] = softmax_j(w d + w2 d^2),  d = j - i,  along an axis
//
// R V is V mixed along x, then along y. A line's tokens stream through shared memory, 64 at a time, whole rows of
// channels: what is read and written is contiguous, and a line may be of any length. (A slab of all tokens and a few
// channels would mix along both axes at once, but reads pieces of rows, and must fit in shared memory.) Entries of A
// are formed in registers. Traffic of a block: its lines' tokens once, its own tokens of the result once.
#pragma once

#include <type_traits>

#include "position.cuh"
#include "tiled_rows.cuh"

namespace gpsa {

/// One axis of one head, with its statistics in global memory: of a coordinate, log2 of the softmax's normaliser, and
/// the means of d and d^2 under its row of A.
class GridAxis {
public:
    const int size;

    GPSA_DEVICE GridAxis(const Problem& problem, const float* pos_weight, const float* statistics, int head, bool is_x)
        : size(is_x ? problem.columns : problem.rows),
          stride(problem.rows + problem.columns),
          linear(load(Global<const float>(pos_weight) + (3 * head + (is_x ? 0 : 1))) * log2_e),
          square(load(Global<const float>(pos_weight) + (3 * head + 2)) * log2_e),
          statistics(Global<const float>(statistics) + (int64_t{3} * head * stride + (is_x ? 0 : problem.columns))) {}

    /// Of a token, along x.
    GPSA_DEVICE int row_of(int token) const { return static_cast<unsigned>(token) / static_cast<unsigned>(size); }
    GPSA_DEVICE float log2_normaliser(int i) const { return load(statistics + smaller(i, size - 1)); }
    GPSA_DEVICE float mean(int i) const { return load(statistics + (stride + smaller(i, size - 1))); }
    GPSA_DEVICE float mean_square(int i) const { return load(statistics + (2 * stride + smaller(i, size - 1))); }

    GPSA_DEVICE float score(float d) const { return d * (linear + square * d); }
    /// A[i, j], 0 outside of the axis.
    GPSA_DEVICE float entry(int i, int j, float normaliser) const {
        return i < size && j < size ? exp2_approx(score(static_cast<float>(j - i)) - normaliser) : 0.0f;
    }

private:
    const int stride;
    const float linear, square;
    const Global<const float> statistics;
};

/// R entry by entry, from those statistics.
GPSA_DEVICE DensePosition<GridAxis> dense_position(
    const Problem& problem, const float* pos_weight, const float* statistics, int head) {
    return {{problem, pos_weight, statistics, head, true}, {problem, pos_weight, statistics, head, false}};
}

struct StatisticsCall {
    Problem problem;
    const float* pos_weight;
    float* statistics;
};

/// The statistics of both axes, a warp per head and coordinate.
struct PositionStatistics {
    using Call = StatisticsCall;
    static constexpr int blocks_per_multiprocessor = 8;

    static int shared_bytes() { return 0; }
    static int64_t blocks(const Call& call) {
        const Problem& p = call.problem;
        return (int64_t{p.heads} * (p.rows + p.columns) + 3) / 4;
    }

    GPSA_DEVICE static void run(const Call& call) {
        const int both = call.problem.rows + call.problem.columns;
        const int64_t item = int64_t{block_x()} * (threads() / 32) + warp();
        if (item >= int64_t{call.problem.heads} * both) return;
        const int head = static_cast<int>(item / both), coordinate = static_cast<int>(item % both);
        const bool is_x = coordinate < call.problem.columns;
        const GridAxis axis(call.problem, call.pos_weight, call.statistics, head, is_x);
        const int i = is_x ? coordinate : coordinate - call.problem.columns;
        float largest = -INFINITY;
        for (int j = lane(); j < axis.size; j += 32) largest = maximum(largest, axis.score(static_cast<float>(j - i)));
#pragma unroll
        for (int mask = 1; mask < 32; mask *= 2) largest = maximum(largest, shuffle_xor(largest, mask));
        float sum = 0, mean = 0, mean_square = 0;
        for (int j = lane(); j < axis.size; j += 32) {
            const float d = static_cast<float>(j - i), weight = exp2_approx(axis.score(d) - largest);
            sum += weight;
            mean += weight * d;
            mean_square += weight * d * d;
        }
        sum = warp_sum(sum);
        mean = warp_sum(mean);
        mean_square = warp_sum(mean_square);
        if (lane() == 0) {
            const Global<float> to = Global<float>(call.statistics) + (int64_t{3} * head * both + coordinate);
            store(to, largest + log2_approx(sum));
            store(to + both, mean / sum);
            store(to + 2 * both, mean_square / sum);
        }
    }
};

/// Starts copying a block's lines, coordinates start to start + width - 1 of each, one line after the other; zeros
/// where there is no token or channel.
template <typename E, int channels>
GPSA_DEVICE void copy_lines(
    const Rows<E, channels>& rows, Global<const E> from, int64_t stride, const Lines& lines, int first_line, int start,
    int head_dim) {
    constexpr int chunks = channels / 8, beside = ChunkShare<chunks>::beside;
    for (int row = thread() / beside; row < lines.together() * lines.width(); row += threads() / beside) {
        const int own_line = row >> (4 + lines.log2_room()), line = first_line + own_line;
        const int i = start + row - own_line * lines.width();
        copy_chunks<chunks>(
            rows.chunk(row, thread() % beside), from + lines.token(line, i) * stride,
            line < lines.count && i < lines.size, head_dim);
    }
}

/// 16 accumulated rows of this warp, coordinates first to first + 15 of a line, rounded, by way of `staged` to global
/// memory, 16 bytes a lane.
template <typename E, int channels>
GPSA_DEVICE void store_line_rows(
    const Sum* sums, const Rows<E, channels>& staged, Global<E> to, int64_t stride, const Lines& lines, int line,
    int first, int head_dim) {
    stage_rows<E, channels>(sums, staged);
    sync_warp();
    store_rows<channels / 8>(
        to + lines.token(line, 0) * stride, lines.step * stride, first, lines.size, 0, head_dim,
        [&](int i, int chunk) { return staged.chunk(i - first, chunk); });
}

struct MixCall {
    Problem problem;
    Lines lines;
    const float* pos_weight;
    const float* statistics;
    Tensor from, to;
    Tensor values;  // of the rest, what only the backward kernel has
    const float* gate;
    float* sums;  // of Backward
    int slots, first_slot;
};

/// to = A from along every line. Backward: to = A^T from, `from` being a gradient of what `values` was mixed into, and
/// in the block's slot of `sums` its share of the gradients of the weights,
///   dA[i, j] = sum over lines and channels of from[i] values[j],   dw = g sum of A (d - mean of d) dA,
/// and of g (1 - g) sum of A dA. All are sums over the entries of A^T, so its rows may be shared out over blocks. The
/// pass along y comes first: what it writes, and the one along x then reads and writes, carries early_share().
template <typename Config, bool backward>
struct MixLines {
    using E = typename Config::E;
    using Call = MixCall;
    static constexpr int channels = Config::channels;
    static constexpr int blocks_per_multiprocessor = channels > 64 ? 2 : channels > 48 && backward ? 3 : 4;

    static int shared_bytes() { return (backward ? 3 : 2) * tile_tokens * channels * 2 + (backward ? 4 * 3 * 4 : 0); }
    static int64_t blocks(const Call& call) { return call.problem.batch * call.problem.heads * call.lines.blocks(); }

    GPSA_DEVICE static void run(const Call& call) {
        const Problem& problem = call.problem;
        const Lines& lines = call.lines;
        const int batch_head = block_x() / lines.blocks(), block = block_x() % lines.blocks();
        const int batch = batch_head / problem.heads, head = batch_head % problem.heads;
        const int first_line = block / lines.blocks_per_line() * lines.together();
        const int first = block % lines.blocks_per_line() * lines.width();  // coordinate of the result
        const int own_line = warp() >> lines.log2_room(), own_tile = warp() - (own_line << lines.log2_room());
        const int own_row = first + 16 * own_tile;
        const bool idle = own_tile >= lines.tiles() || first_line + own_line >= lines.count;

        SharedMemory memory;
        const Shared<E> streamed = memory.array<E>(2 * tile_tokens * channels, "streamed");
        const Global<const E> from = rows_of<const E>(call.from, batch, head);
        const auto fetch = [&](int start, int stage) {
            copy_lines<E, channels>(
                {streamed, stage * tile_tokens}, from, call.from.token, lines, first_line, start, problem.head_dim);
            copy_commit();
        };
        const GridAxis axis(problem, call.pos_weight, call.statistics, head, lines.along_x);
        Factor factor(call, axis, memory, batch, head, first_line, first, own_row);
        fetch(0, 0);
        copy_wait<0>();
        sync_block();
        if (!idle) factor.prepare();

        Sum sums[channels / 8] = {};
        int stage = 0;
#pragma unroll 1
        for (int start = 0; start < lines.size; start += lines.width(), stage ^= 1) {
            if (start + lines.width() < lines.size) fetch(start + lines.width(), stage ^ 1);
            const Rows<E, channels> line{streamed, stage * tile_tokens + own_line * lines.width()};
#pragma unroll 1
            for (int tile = 0; !idle && tile < lines.tiles() && start + 16 * tile < lines.size; ++tile) {
                const auto at = [&](int i, int chunk) { return line.chunk(16 * tile + i, chunk); };
                const Left a = factor.tile(axis, own_row, start + 16 * tile, at);
#pragma unroll
                for (int s = 0; s < channels / 16; ++s) {
                    const Right b = load_right_over_tokens<E>(s, at);
                    multiply<E>(&sums[2 * s], a, b);
                }
            }
            copy_wait<0>();
            sync_block();
        }
        if (!idle) {
            factor.scale(call, sums);
            store_line_rows<E, channels>(
                sums, {streamed, 16 * warp()}, rows_of<E>(call.to, batch, head), call.to.token, lines,
                first_line + own_line, own_row, problem.head_dim);
        }
        factor.finish(call, batch_head, block);
    }

private:
    /// Tiles of A. An entry's row is the own coordinate.
    struct Table {
        float normaliser[2];

        GPSA_DEVICE Table(const Call&, const GridAxis& axis, SharedMemory&, int64_t, int, int, int, int own_row) {
            for (int half = 0; half < 2; ++half) {
                normaliser[half] = axis.log2_normaliser(own_row + fragment_row() + 8 * half);
            }
        }
        GPSA_DEVICE void prepare() {}

        template <typename At>
        GPSA_DEVICE Left tile(const GridAxis& axis, int own_row, int start, At) {
            Sum entries[2];
            for (int n = 0; n < 2; ++n) {
                for (int i = 0; i < 4; ++i) {
                    entries[n].values[i] = axis.entry(
                        own_row + fragment_row() + i / 2 * 8, start + 8 * n + fragment_column() + i % 2,
                        normaliser[i / 2]);
                }
            }
            return as_left<E>(entries);
        }
        GPSA_DEVICE void scale(const Call&, Sum*) {}
        GPSA_DEVICE void finish(const Call&, int64_t, int) {}
    };

    /// Tiles of A^T. An entry's column of A is the own coordinate.
    struct Transposed {
        const Rows<E, channels> values;
        const Shared<float> partial;
        const float gate;
        Left own[channels / 16];
        float linear = 0, square = 0, total = 0;

        GPSA_DEVICE Transposed(
            const Call& call, const GridAxis&, SharedMemory& memory, int64_t batch, int head, int first_line, int first,
            int)
            : values{memory.array<E>(tile_tokens * channels, "values")},
              partial(memory.array<float>(12, "sums")),
              gate(load(Global<const float>(call.gate) + head)) {
            copy_lines<E, channels>(
                values, rows_of<const E>(call.values, batch, head), call.values.token, call.lines, first_line, first,
                call.problem.head_dim);
        }
        GPSA_DEVICE void prepare() {
#pragma unroll
            for (int s = 0; s < channels / 16; ++s) {
                own[s] = load_left<E>(s, [&](int i, int chunk) { return values.chunk(16 * warp() + i, chunk); });
            }
        }

        template <typename At>
        GPSA_DEVICE Left tile(const GridAxis& axis, int own_row, int start, At at) {
            Sum grads[2] = {}, entries[2];
#pragma unroll
            for (int s = 0; s < channels / 16; ++s) multiply<E>(grads, own[s], load_right_over_channels<E>(s, at));
#pragma unroll
            for (int n = 0; n < 2; ++n) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const int i = start + 8 * n + fragment_column() + c;
                    const float normaliser = axis.log2_normaliser(i);
                    const float mean = axis.mean(i), mean_square = axis.mean_square(i);
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int j = own_row + fragment_row() + 8 * half;
                        const float d = static_cast<float>(j - i), entry = axis.entry(i, j, normaliser);
                        const float share = entry * grads[n].values[2 * half + c];
                        linear += share * (d - mean);
                        square += share * (d * d - mean_square);
                        total += share;
                        entries[n].values[2 * half + c] = entry;
                    }
                }
            }
            return as_left<E>(entries);
        }

        GPSA_DEVICE float early(const Call& call) const {
            return early_share(sigmoid(gate), call.problem.rows * call.problem.columns);
        }
        GPSA_DEVICE void scale(const Call& call, Sum* sums) const {
            if (!call.lines.along_x) scale_rows<channels>(sums, early(call));
        }

        GPSA_DEVICE void finish(const Call& call, int64_t batch_head, int block) {
            const float sums[3] = {linear, square, total};
            float of_block[3];
            add_up(of_block, sums, partial);
            if (thread() == 0) {
                const bool along_x = call.lines.along_x;
                const float open = sigmoid(gate), late = along_x ? open / early(call) : open;
                const int heads = call.problem.heads, head = static_cast<int>(batch_head % heads);
                const int64_t slot = batch_head / heads * call.slots + call.first_slot + block;
                const auto sum = [&](int n) { return sum_of(call.sums, slot, heads, head, n); };
                // sum dO * O_pos is sum A dA of either axis: the one along y tells it
                store(sum(0), along_x ? late * of_block[0] : 0);
                store(sum(1), along_x ? 0 : late * of_block[0]);
                store(sum(2), late * of_block[1]);
                store(sum(3), along_x ? 0 : open * sigmoid(-gate) * of_block[2]);
            }
        }
    };

    using Factor = std::conditional_t<backward, Transposed, Table>;
};

}  // namespace gpsa
