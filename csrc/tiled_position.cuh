// The positional branch for grids of any size: its statistics, and products with an axis' table along the lines.
//
// A line's tokens stream through shared memory, 64 at a time, whole rows of channels: what is read and written is
// contiguous, and a line may be of any length. (A slab of all tokens and a few channels would mix along both axes at
// once, but reads pieces of rows, and must fit.) Traffic of a block: its lines' tokens once, its own of the result
// once.
#pragma once

#include "position.cuh"
#include "tiled.cuh"

namespace gpsa {

using GridAxis = Axis<Global<const float>>;

/// `statistics`: (H, C + R, 3) float32, along x, then along y.
struct PositionCall {
    Problem problem;
    const float* pos_weight;
    float* statistics;

    /// Where an axis' statistics begin.
    GPSA_DEVICE int64_t first(int head, bool is_x) const {
        return 3 * (int64_t{head} * (problem.rows + problem.columns) + (is_x ? 0 : problem.columns));
    }
    GPSA_DEVICE GridAxis axis(int head, bool is_x) const {
        const Global<const float> weights = Global<const float>(pos_weight) + 3 * head;
        return {
            is_x ? problem.columns : problem.rows, load(weights + (is_x ? 0 : 1)), load(weights + 2),
            Global<const float>(statistics) + first(head, is_x)};
    }
    GPSA_DEVICE DensePosition<GridAxis> axes(int head) const { return {axis(head, true), axis(head, false)}; }
};

/// The statistics of both axes, a warp per head and coordinate.
struct PositionStatistics : TiledKernel {
    using Call = PositionCall;

    static constexpr int least_blocks(int architecture) { return sharing(8, architecture); }
    static int shared_bytes() { return 0; }
    static int64_t blocks(const Call& call) {
        const Problem& p = call.problem;
        return (int64_t{p.heads} * (p.rows + p.columns) + 3) / 4;
    }

    GPSA_DEVICE static void run(const Call& call) {
        const int both = call.problem.rows + call.problem.columns;
        const int64_t item = int64_t{block_x()} * (threads() / 32) + warp();
        if (item >= int64_t{call.problem.heads} * both) return;
        const int head = int(item / both), coordinate = int(item % both);
        const bool is_x = coordinate < call.problem.columns;
        const Global<float> to = Global<float>(call.statistics) + call.first(head, is_x);
        call.axis(head, is_x).prepare<32>(is_x ? coordinate : coordinate - call.problem.columns, to);
    }
};

struct MixCall {
    PositionCall position;
    Lines lines;
    Tensor from, to;
    Tensor values{};  // of the rest, what only the backward kernel has
    const float* gate = nullptr;
    float* sums = nullptr;  // of Backward
    int slots = 0, first_slot = 0;
};

/// to = A from along every line. Backward: to = A^T from, `from` being a gradient of what `values` was mixed into, and
/// in the block's slot of `sums` its share of the gradients of the weights,
///   dA[i, j] = sum over lines and channels of from[i] values[j],   dw = g sum of A (d - mean of d) dA,
/// and of g (1 - g) sum of A dA. All are sums over the entries of A^T, so its rows may be shared out over blocks. The
/// pass along y comes first: what it writes, and the one along x then reads and writes, carries early_share().
template <typename E_, int channels_, bool backward>
struct MixLines : TiledKernel {
    using E = E_;
    using Call = MixCall;
    static constexpr int channels = channels_;

    static constexpr int least_blocks(int architecture) {
        return sharing(channels > 64 ? 2 : channels > 48 && backward ? 3 : 4, architecture);
    }
    static int shared_bytes() { return (backward ? 3 : 2) * tile_tokens * channels * 2 + (backward ? 4 * 3 * 4 : 0); }
    static int64_t blocks(const Call& call) {
        return call.position.problem.batch * call.position.problem.heads * call.lines.blocks();
    }

    GPSA_DEVICE static void run(const Call& call) {
        const Lines& lines = call.lines;
        const int head_dim = call.position.problem.head_dim;
        const Place place(call);
        SharedMemory memory;
        const Shared<E> streamed = memory.array<E>(2 * tile_tokens * channels, "streamed");
        const Global<const E> from = rows_of<const E>(call.from, place.batch, place.head);
        const auto fetch = [&](int start, int stage) {
            copy_lines({streamed, stage * tile_tokens}, from, call.from.token, call, place.first_line, start);
            copy_commit();
        };
        const GridAxis axis = call.position.axis(place.head, lines.along_x);
        Factor factor(call, axis, memory, place);
        fetch(0, 0);
        copy_wait<0>();
        sync_block();
        if constexpr (backward) {
            if (!place.idle) factor.prepare();
        }

        Sum sums[channels / 8] = {};
        int stage = 0;
#pragma unroll 1
        for (int start = 0; start < lines.size; start += lines.width(), stage ^= 1) {
            if (start + lines.width() < lines.size) fetch(start + lines.width(), stage ^ 1);
            const Tokens line{streamed, stage * tile_tokens + place.own_line * lines.width()};
#pragma unroll 1
            for (int tile = 0; !place.idle && tile < lines.tiles() && start + 16 * tile < lines.size; ++tile) {
                const auto at = [&](int i, int chunk) { return line.chunk(16 * tile + i, chunk); };
                add_over_tokens<E, channels>(sums, factor.tile(axis, place.own_row, start + 16 * tile, at), at);
            }
            copy_wait<0>();
            sync_block();
        }
        if (!place.idle) {
            if constexpr (backward) factor.scale(call, sums);
            const int64_t token = lines.token(place.first_line + place.own_line, 0), stride = call.to.token;
            store_own_rows<E, channels>(
                sums, {streamed, 16 * warp()}, rows_of<E>(call.to, place.batch, place.head) + token * stride,
                lines.step * stride, place.own_row, lines.size, head_dim);
        }
        if constexpr (backward) factor.finish(call, place);
    }

private:
    using Tokens = Rows<E, channels>;

    /// Which lines and coordinates of which (batch, head) a block has, and which of them this warp.
    struct Place {
        int batch, head, block, first_line, first, own_line, own_row;
        bool idle;

        GPSA_DEVICE explicit Place(const Call& call) {
            const Lines& lines = call.lines;
            const int batch_head = block_x() / lines.blocks();
            block = block_x() % lines.blocks();
            batch = batch_head / call.position.problem.heads;
            head = batch_head % call.position.problem.heads;
            first_line = block / lines.blocks_per_line() * lines.together();
            first = block % lines.blocks_per_line() * lines.width();  // coordinate of the result
            own_line = warp() >> lines.log2_room();
            const int own_tile = warp() - (own_line << lines.log2_room());
            own_row = first + 16 * own_tile;
            idle = own_tile >= lines.tiles() || first_line + own_line >= lines.count;
        }
    };

    /// Starts copying a block's lines, from coordinate `start` on, one after the other; zeros where there is no token.
    GPSA_DEVICE static void copy_lines(
        const Tokens& rows, Global<const E> from, int64_t stride, const Call& call, int first_line, int start) {
        constexpr int chunks = channels / 8, beside = ChunkShare<chunks>::beside;
        const Lines& lines = call.lines;
        for (int row = thread() / beside; row < lines.together() * lines.width(); row += threads() / beside) {
            const int own_line = row >> (4 + lines.log2_room()), line = first_line + own_line;
            const int i = start + row - own_line * lines.width();
            copy_chunks<chunks>(
                rows.chunk(row, thread() % beside), from + lines.token(line, i) * stride,
                line < lines.count && i < lines.size, call.position.problem.head_dim);
        }
    }

    /// Tiles of A. An entry's row is the own coordinate.
    struct Table {
        float shift[2];

        GPSA_DEVICE Table(const Call&, const GridAxis& axis, SharedMemory&, const Place& place) {
            axis.load_shifts(shift, place.own_row);
        }
        template <typename At>
        GPSA_DEVICE Left tile(const GridAxis& axis, int own_row, int start, At) {
            return axis.template tile<E>(own_row, start, shift);
        }
    };

    /// Tiles of A^T. An entry's column of A is the own coordinate.
    struct Transposed {
        const Tokens values;
        const Shared<float> partial;
        const float gate;
        Left own[channels / 16];
        float sums[3] = {};

        GPSA_DEVICE Transposed(const Call& call, const GridAxis&, SharedMemory& memory, const Place& place)
            : values{memory.array<E>(tile_tokens * channels, "values")},
              partial(memory.array<float>(12, "sums")),
              gate(load(Global<const float>(call.gate) + place.head)) {
            copy_lines(
                values, rows_of<const E>(call.values, place.batch, place.head), call.values.token, call,
                place.first_line, place.first);
        }
        GPSA_DEVICE void prepare() { load_own_rows(own, values.tile(warp())); }

        template <typename At>
        GPSA_DEVICE Left tile(const GridAxis& axis, int own_row, int start, At at) {
            Sum grads[2] = {}, entries[2];
            add_over_channels<E>(grads, own, at);
            each_column([&](int n, int c, int column) {
                const int i = start + column;
                const float shift = axis.log2_normaliser(i), mean = axis.mean(i), mean_square = axis.mean_square(i);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int j = own_row + fragment_row() + 8 * half;
                    const float d = float(j - i), entry = axis.entry(i, j, shift);
                    const float share = entry * grads[n].values[2 * half + c];
                    sums[0] += share * (d - mean);
                    sums[1] += share * (d * d - mean_square);
                    sums[2] += share;
                    entries[n].values[2 * half + c] = entry;
                }
            });
            return as_left<E>(entries);
        }

        GPSA_DEVICE float early(const Call& call) const {
            return early_share(sigmoid(gate), call.position.problem.rows * call.position.problem.columns);
        }
        GPSA_DEVICE void scale(const Call& call, Sum* sums) const {
            if (!call.lines.along_x) gpsa::scale<channels / 8>(sums, early(call));
        }

        GPSA_DEVICE void finish(const Call& call, const Place& place) {
            store_partial<3>(partial, sums);
            sync_block();
            if (thread() > 0) return;
            const bool along_x = call.lines.along_x;
            const float open = sigmoid(gate), late = along_x ? open / early(call) : open;
            const int64_t slot = int64_t{place.batch} * call.slots + call.first_slot + place.block;
            const auto sum = [&](int n) { return sum_of(call.sums, slot, call.position.problem.heads, place.head, n); };
            // sum dO * O_pos is sum A dA of either axis: the one along y tells it
            const float linear = late * total<3>(partial, tiled_warps, 0);
            store(sum(0), along_x ? linear : 0);
            store(sum(1), along_x ? 0 : linear);
            store(sum(2), late * total<3>(partial, tiled_warps, 1));
            store(sum(3), along_x ? 0 : open * sigmoid(-gate) * total<3>(partial, tiled_warps, 2));
        }
    };

    using Factor = std::conditional_t<backward, Transposed, Table>;
};

}  // namespace gpsa
