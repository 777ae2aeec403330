// The positional branch of up to 256 tokens in shared memory: products along the axes of their grid, and, where its
// sides are of at most 16, their gradient.
//
//   O_pos = (Ay (x) Ax) V
//   dV = (Ay (x) Ax)^T dO;  dAx = sum over y of dO[y, :] (Ay V)[y, :]^T;  dAy = sum over x of (Ax^T dO)[:, x] V[:, x]^T
#pragma once

#include "position.cuh"

namespace gpsa {

constexpr int whole_image_tokens = 256;  // the most that a row of scores in registers can have

template <int numbers>
using ImageAxis = Axis<Shared<float>, numbers>;

/// The axes of a head's grid, their statistics one after the other.
template <int numbers>
GPSA_DEVICE DensePosition<ImageAxis<numbers>> image_axes(
    const Problem& problem, const float* pos_weight, int head, Shared<float> statistics) {
    const Global<const float> weights = Global<const float>(pos_weight) + 3 * head;
    const float square = load(weights + 2);
    return {
        {problem.columns, load(weights), square, statistics},
        {problem.rows, load(weights + 1), square, statistics + numbers * problem.columns}};
}

/// Fills the statistics in, four lanes a coordinate. Called by all threads; the next barrier of the block makes them
/// everybody's.
template <int numbers>
GPSA_DEVICE void prepare(const DensePosition<ImageAxis<numbers>>& position) {
    const ImageAxis<numbers>&x = position.along_x, &y = position.along_y;
    for (int start = 8 * warp(); start < x.size + y.size; start += threads() / 4) {
        const int at = start + lane() / 4;
        const ImageAxis<numbers> axis(at < x.size ? x : y);  // a copy: its members are chosen, not their addresses
        axis.template prepare<4>(at < x.size ? at : at - x.size, axis.statistics);
    }
}

/// Values mixed along one axis of at most 16: for each line of the grid along it, A times the line's tokens.
///
/// `from(coordinate, line, chunk)` and `to(coordinate, line, chunk)` are chunks of a token. They may be the same: a
/// warp has read a line when it writes it.
template <typename E, int channels, typename AnyAxis, typename From, typename To>
GPSA_DEVICE void mix_short(const AnyAxis& axis, int lines, From from, To to) {
    if (warp() >= lines) return;
    const Left a = axis.template tile<E>(0, 0);
    for (int line = warp(); line < lines; line += threads() / 32) {
        Sum sums[channels / 8] = {};
        add_over_tokens<E, channels>(
            sums, a, [&](int i, int chunk) { return from(smaller(i, axis.size - 1), line, chunk); });
        sync_warp();
        stage_rows<E, channels>(sums, 0, axis.size, [&](int i, int chunk) { return to(i, line, chunk); });
    }
}

/// The same along an axis of any size; `from` and `to` must not meet.
template <typename E, int channels, typename AnyAxis, typename From, typename To>
GPSA_DEVICE void mix_along(const AnyAxis& axis, int lines, From from, To to) {
    if (axis.size <= 16) return mix_short<E, channels>(axis, lines, from, to);
    const int tiles = (axis.size + 15) / 16;
#pragma unroll 1
    for (int item = warp(); item < tiles * lines; item += threads() / 32) {
        const int row = item / lines * 16, line = item % lines;
        float shift[2];
        axis.load_shifts(shift, row);
        Sum sums[channels / 8] = {};
#pragma unroll 1
        for (int column = 0; column < axis.size; column += 16) {
            add_over_tokens<E, channels>(sums, axis.template tile<E>(row, column, shift), [&](int i, int chunk) {
                return from(smaller(column + i, axis.size - 1), line, chunk);
            });
        }
        stage_rows<E, channels>(sums, row, axis.size, [&](int i, int chunk) { return to(i, line, chunk); });
    }
}

/// mixed = (Ay (x) Ax) V for all tokens of a (batch, head), 16-bit like V. The longer axis goes first, so that the one
/// done in place has at most 16 coordinates (N <= 256). Ends with what each thread wrote; a barrier makes it
/// everybody's.
template <typename E, int channels, typename AnyAxis>
GPSA_DEVICE void mix_position(
    const DensePosition<AnyAxis>& position, const Rows<E, channels>& v, const GridRows<E, channels>& mixed) {
    const int rows = position.along_y.size, columns = position.along_x.size;
    const auto by_x = [&](int x, int y, int chunk) { return mixed.chunk(y, x, chunk); };
    const auto by_y = [&](int y, int x, int chunk) { return mixed.chunk(y, x, chunk); };
    if (columns >= rows) {
        mix_along<E, channels>(
            position.along_x, rows, [&](int x, int y, int chunk) { return v.chunk(y * columns + x, chunk); }, by_x);
        sync_block();
        mix_short<E, channels>(position.along_y, columns, by_y, by_y);
    } else {
        mix_along<E, channels>(
            position.along_y, columns, [&](int y, int x, int chunk) { return v.chunk(y * columns + x, chunk); }, by_y);
        sync_block();
        mix_short<E, channels>(position.along_x, rows, by_x, by_x);
    }
}

/// The gradients of the weights of d and d^2 along one axis, and the sum of A times its entries' gradients.
struct WeightGradient {
    float linear = 0, square = 0, total = 0;
};

/// Along one axis: what a gradient of A's entries, two (16, 8) accumulators, adds to the weights'.
class EntryGradient {
public:
    GPSA_DEVICE explicit EntryGradient(const ImageAxis<3>& axis) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = fragment_row() + 8 * half;
            const float shift = axis.log2_normaliser(i), mean = axis.mean(i), mean_square = axis.mean_square(i);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int n = k / 2, to = 2 * half + k % 2, j = 8 * n + fragment_column() + k % 2;
                const float d = float(j - i), share = axis.entry(i, j, shift);
                total[n][to] = share;
                linear[n][to] = share * (d - mean);
                square[n][to] = share * (d * d - mean_square);
            }
        }
    }

    GPSA_DEVICE WeightGradient of(const Sum (&grad)[2]) const {
        WeightGradient result;
        each_value<2>([&](int n, int i) {
            result.linear += linear[n][i] * grad[n].values[i];
            result.square += square[n][i] * grad[n].values[i];
            result.total += total[n][i] * grad[n].values[i];
        });
        return result;
    }

private:
    float linear[2][4], square[2][4], total[2][4];
};

/// Tables are formed when it is: while the copies of V and dO are under way.
template <typename E, int channels>
class PositionGradient {
public:
    using Tokens = Rows<E, channels>;

    /// `early`: early_share(), which dO carries once it is mixed.
    GPSA_DEVICE PositionGradient(const DensePosition<ImageAxis<3>>& position, float early)
        : rows(position.along_y.size),
          columns(position.along_x.size),
          lines(rows > columns ? rows : columns),
          early(early),
          table_y(position.along_y.template tile<E>(0, 0)),
          transposed_x(position.along_x.template transposed_tile<E>(early)),
          transposed_y(position.along_y.template transposed_tile<E>(1)),
          entries_x(position.along_x),
          entries_y(position.along_y) {}

    /// mixed_v = V mixed along y, mixed = early times dO mixed along x by the transposed table. Between this and
    /// finish() is a barrier.
    GPSA_DEVICE void start(const Tokens& v, const Tokens& grad_out, const Tokens& mixed_v, const Tokens& mixed) const {
        for (int line = warp(); line < lines; line += threads() / 32) {
            const int x = smaller(line, columns - 1), y = smaller(line, rows - 1);
            Right of_v[channels / 16], of_grad[channels / 16];  // all are loaded before the first is used
            load_over_tokens(of_v, along_y(v, x));
            load_over_tokens(of_grad, along_x(grad_out, y));
            if (x == line) mix(table_y, of_v, rows, along_y(mixed_v, x));
            if (y == line) mix(transposed_x, of_grad, columns, along_x(mixed, y));
        }
    }

    /// grad_v = early (Ay (x) Ax)^T dO, 16-bit. `sums`: this thread's, early <dO, (dR/dw) V> for w0, w1 and w2, and
    /// <dO, O_pos>.
    GPSA_DEVICE void finish(
        float (&sums)[4], const Tokens& v, const Tokens& grad_out, const Tokens& mixed_v, const Tokens& mixed,
        const Tokens& grad_v) const {
        Sum of_x[2] = {}, of_y[2] = {};
        for (int line = warp(); line < lines; line += threads() / 32) {
            const int x = smaller(line, columns - 1), y = smaller(line, rows - 1);
            Right of_mixed[channels / 16], of_v[channels / 16], of_mixed_v[channels / 16];
            Left left_mixed[channels / 16], left_grad[channels / 16];
            load_over_tokens(of_mixed, along_y(mixed, x));
#pragma unroll
            for (int s = 0; s < channels / 16; ++s) {
                left_mixed[s] = load_left<E>(s, along_y(mixed, x));
                of_v[s] = load_right_over_channels<E>(s, along_y(v, x));
                left_grad[s] = load_left<E>(s, along_x(grad_out, y));
                of_mixed_v[s] = load_right_over_channels<E>(s, along_x(mixed_v, y));
            }
            if (x == line) {
                mix(transposed_y, of_mixed, rows, along_y(grad_v, x));
                add_outer(of_y, left_mixed, of_v);
            }
            if (y == line) add_outer(of_x, left_grad, of_mixed_v);
        }
        const WeightGradient x = entries_x.of(of_x), y = entries_y.of(of_y);  // y's with what `mixed` carries
        sums[0] = early * x.linear;
        sums[1] = y.linear;
        sums[2] = early * x.square + y.square;
        sums[3] = x.total;
    }

private:
    const int rows, columns, lines;  // as many lines along both axes, if some are not there
    const float early;
    const Left table_y, transposed_x, transposed_y;
    const EntryGradient entries_x, entries_y;

    /// Chunks of a line of the grid; the coordinates that do not exist are the last.
    GPSA_DEVICE auto along_x(const Tokens& tokens, int y) const {
        return
            [&tokens, y, this](int x, int chunk) { return tokens.chunk(y * columns + smaller(x, columns - 1), chunk); };
    }
    GPSA_DEVICE auto along_y(const Tokens& tokens, int x) const {
        return [&tokens, x, this](int y, int chunk) { return tokens.chunk(smaller(y, rows - 1) * columns + x, chunk); };
    }

    template <typename From>
    GPSA_DEVICE static void load_over_tokens(Right (&line)[channels / 16], From from) {
#pragma unroll
        for (int s = 0; s < channels / 16; ++s) line[s] = load_right_over_tokens<E>(s, from);
    }

    template <typename To>
    GPSA_DEVICE static void mix(const Left& table, const Right (&line)[channels / 16], int size, To to) {
        Sum sums[channels / 8] = {};
#pragma unroll
        for (int s = 0; s < channels / 16; ++s) multiply<E>(&sums[2 * s], table, line[s]);
        stage_rows<E, channels>(sums, 0, size, to);
    }

    /// grad += a b^T, summed over channels, of the tokens of a line.
    GPSA_DEVICE static void add_outer(Sum (&grad)[2], const Left (&a)[channels / 16], const Right (&b)[channels / 16]) {
#pragma unroll
        for (int s = 0; s < channels / 16; ++s) multiply<E>(grad, a[s], b[s]);
    }
};

}  // namespace gpsa
