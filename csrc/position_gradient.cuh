// The gradient of the positional branch, of a grid with sides of at most 16.
//
//   dV = (Ay (x) Ax)^T dO;  dAx = sum over y of dO[y, :] (Ay V)[y, :]^T;  dAy = sum over x of (Ax^T dO)[:, x] V[:, x]^T
#pragma once

#include "position.cuh"

namespace gpsa {

/// Along one axis: what a gradient of A's entries, two (16, 8) accumulators, adds to the weights'.
class EntryGradient {
public:
    GPSA_DEVICE EntryGradient(const Axis& axis, Shared<float> means) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = fragment_row() + 8 * half, place = smaller(i, axis.size - 1);
            const float shift = axis.log2_normaliser(i);
            const float mean = load(means + 2 * place), mean_square = load(means + (2 * place + 1));
#pragma unroll
            for (int n = 0; n < 2; ++n) {
#pragma unroll
                for (int column = 0; column < 2; ++column) {
                    const int j = 8 * n + fragment_column() + column;
                    const float d = static_cast<float>(j - i), share = axis.entry(i, j, shift);
                    total[n][2 * half + column] = share;
                    linear[n][2 * half + column] = share * (d - mean);
                    square[n][2 * half + column] = share * (d * d - mean_square);
                }
            }
        }
    }

    GPSA_DEVICE WeightGradient of(const Sum (&grad)[2]) const {
        WeightGradient result;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                result.linear += linear[n][i] * grad[n].values[i];
                result.square += square[n][i] * grad[n].values[i];
                result.total += total[n][i] * grad[n].values[i];
            }
        }
        return result;
    }

private:
    float linear[2][4], square[2][4], total[2][4];
};

/// Tables are formed when it is: while the copies of V and dO are under way.
template <typename E, int channels>
class PositionGradient {
public:
    /// `early`: early_share(), which dO carries once it is mixed.
    GPSA_DEVICE PositionGradient(
        const Axis& along_x, const Axis& along_y, Shared<float> means_x, Shared<float> means_y, float early)
        : rows(along_y.size),
          columns(along_x.size),
          lines(rows > columns ? rows : columns),
          table_y(along_y.tile<E>(0, 0)),
          transposed_x(along_x.transposed_tile<E>(0, 0, early)),
          transposed_y(along_y.transposed_tile<E>(0, 0)),
          entries_x(along_x, means_x),
          entries_y(along_y, means_y) {}

    /// mixed_v = V mixed along y, mixed = early times dO mixed along x by the transposed table. Between this and
    /// finish() is a barrier.
    GPSA_DEVICE void start(
        const Rows<E, channels>& v, const Rows<E, channels>& grad_out, const Rows<E, channels>& mixed_v,
        const Rows<E, channels>& mixed) const {
        for (int line = warp(); line < lines; line += threads() / 32) {
            const int x = smaller(line, columns - 1), y = smaller(line, rows - 1);
            Right of_v[channels / 16], of_grad[channels / 16];  // all are loaded before the first is used
            load_over_tokens(of_v, along_y(v, x));
            load_over_tokens(of_grad, along_x(grad_out, y));
            if (x == line) mix(table_y, of_v, rows, along_y(mixed_v, x));
            if (y == line) mix(transposed_x, of_grad, columns, along_x(mixed, y));
        }
    }

    /// grad_v = early (Ay (x) Ax)^T dO, 16-bit, and this thread's partial sums for the weights' gradients; grad_y is to
    /// be multiplied by g / early, grad_x by g.
    GPSA_DEVICE void finish(
        WeightGradient& grad_x, WeightGradient& grad_y, const Rows<E, channels>& v, const Rows<E, channels>& grad_out,
        const Rows<E, channels>& mixed_v, const Rows<E, channels>& mixed, const Rows<E, channels>& grad_v) const {
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
        grad_x = entries_x.of(of_x);
        grad_y = entries_y.of(of_y);
    }

private:
    const int rows, columns, lines;  // as many lines along both axes, if some are not there
    const Left table_y, transposed_x, transposed_y;
    const EntryGradient entries_x, entries_y;

    /// Chunks of a line of the grid; the coordinates that do not exist are the last.
    GPSA_DEVICE auto along_x(const Rows<E, channels>& tokens, int y) const {
        return
            [&tokens, y, this](int x, int chunk) { return tokens.chunk(y * columns + smaller(x, columns - 1), chunk); };
    }
    GPSA_DEVICE auto along_y(const Rows<E, channels>& tokens, int x) const {
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
        store_line<E, channels>(sums, 0, size, to);
    }

    /// grad += a b^T, summed over channels, of the tokens of a line.
    GPSA_DEVICE static void add_outer(Sum (&grad)[2], const Left (&a)[channels / 16], const Right (&b)[channels / 16]) {
#pragma unroll
        for (int s = 0; s < channels / 16; ++s) multiply<E>(grad, a[s], b[s]);
    }
};

}  // namespace gpsa
