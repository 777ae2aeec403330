// The positional branch, as two short products along the axes of the grid.
//
//   R = Ay (x) Ax,   A[i, j] = softmax_j(w d + w2 d^2),  d = j - i,  along an axis
//
// A table is never stored: entries are formed in the fragment that a product needs, from one number per coordinate,
// log2 of the softmax's normaliser.
#pragma once

#include "tiles.cuh"

namespace gpsa {

class Axis {
public:
    const int size;

    /// `linear` and `square`: the weights of d and d^2. `normaliser`: `size` numbers, filled in by prepare().
    GPSA_DEVICE Axis(int size, float linear, float square, Shared<float> normaliser)
        : size(size), linear(linear * log2_e), square(square * log2_e), normaliser(normaliser) {}

    /// Called by all threads; the normalisers can be used after the next barrier of the block.
    GPSA_DEVICE void prepare() const {
        for (int i = thread(); i < size; i += threads()) {
            float largest = score(-i);
#pragma unroll 1
            for (int j = 1; j < size; ++j) largest = maximum(largest, score(j - i));
            float sum = 0;
#pragma unroll 1
            for (int j = 0; j < size; ++j) sum += exp2_approx(score(j - i) - largest);
            store(normaliser + i, largest + log2_approx(sum));
        }
    }

    /// The (16, 16) tile of A that begins at (row, column), zeros outside of the axis.
    template <typename E>
    GPSA_DEVICE Left tile(int row, int column) const {
        Left a;
        for (int part = 0; part < 2; ++part) {
            const int i = row + fragment_row() + 8 * part;
            const float shift = load(normaliser + smaller(i, size - 1));
            for (int half = 0; half < 2; ++half) {
                const int j = column + fragment_column() + 8 * half;
                a.words[part + 2 * half] = pack<E>(entry(i, j, shift), entry(i, j + 1, shift));
            }
        }
        return a;
    }

private:
    const float linear, square;
    const Shared<float> normaliser;

    GPSA_DEVICE float score(int distance) const {
        const float d = static_cast<float>(distance);
        return d * (linear + square * d);
    }
    GPSA_DEVICE float entry(int i, int j, float shift) const {
        return i < size && j < size ? exp2_approx(score(j - i) - shift) : 0.0f;
    }
};

/// Rows row to row + 15 of a line, those below `size`, rounded, where `at(coordinate, chunk)` says.
template <typename E, int channels, typename At>
GPSA_DEVICE void store_line(const Sum* sums, int row, int size, At at) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
        const int i = row + fragment_row() + 8 * part;
        if (i >= size) continue;
#pragma unroll
        for (int n = 0; n < channels / 8; ++n) {
            const float* pair = &sums[n].values[2 * part];
            store_pair<E>(at(i, n) + fragment_column(), pack<E>(pair[0], pair[1]));
        }
    }
}

/// mixed = V mixed along one axis: for each line of the grid along it, A times the line's tokens.
///
/// `v(coordinate, line)` is the token's row in `values`, `to(coordinate, line, chunk)` a chunk of the result.
template <typename E, int channels, typename Token, typename To>
GPSA_DEVICE void mix_along(const Axis& axis, int lines, const Rows<E, channels>& values, Token token, To to) {
    const int tiles = (axis.size + 15) / 16;
    Left a;
    bool have_a = false;
    for (int item = warp(); item < tiles * lines; item += threads() / 32) {
        const int row = item / lines * 16, line = item % lines;
        Sum sums[channels / 8] = {};
        for (int column = 0; column < axis.size; column += 16) {
            if (!have_a) a = axis.tile<E>(row, column);
            have_a = tiles == 1;  // the same tile for every line
#pragma unroll
            for (int s = 0; s < channels / 16; ++s) {
                const Right b = load_right_over_tokens<E>(s, [&](int i, int chunk) {
                    return values.chunk(token(smaller(column + i, axis.size - 1), line), chunk);
                });
                multiply<E>(&sums[2 * s], a, b);
            }
        }
        store_line<E, channels>(sums, row, axis.size, [&](int i, int chunk) { return to(i, line, chunk); });
    }
}

/// The same in place, along an axis of at most 16: a warp has read a line when it writes it.
template <typename E, int channels, typename At>
GPSA_DEVICE void mix_in_place(const Axis& axis, int lines, At at) {
    if (warp() >= lines) return;
    const Left a = axis.tile<E>(0, 0);
    for (int line = warp(); line < lines; line += threads() / 32) {
        Sum sums[channels / 8] = {};
#pragma unroll
        for (int s = 0; s < channels / 16; ++s) {
            const Right b = load_right_over_tokens<E>(
                s, [&](int i, int chunk) { return at(smaller(i, axis.size - 1), line, chunk); });
            multiply<E>(&sums[2 * s], a, b);
        }
        sync_warp();
        store_line<E, channels>(sums, 0, axis.size, [&](int i, int chunk) { return at(i, line, chunk); });
    }
}

/// position = (Ay (x) Ax) V for all tokens of an image, 16-bit like V. The longer axis goes first, so that the one done
/// in place has at most 16 coordinates (N <= 256). Ends with what each thread wrote; a barrier makes it everybody's.
template <typename E, int channels>
GPSA_DEVICE void mix_position(
    const Axis& along_x, const Axis& along_y, const Rows<E, channels>& v, const GridRows<E, channels>& position) {
    const int rows = along_y.size, columns = along_x.size;
    const auto by_x = [&](int x, int y, int chunk) { return position.chunk(y, x, chunk); };
    const auto by_y = [&](int y, int x, int chunk) { return position.chunk(y, x, chunk); };
    if (columns >= rows) {
        mix_along<E>(along_x, rows, v, [&](int x, int y) { return y * columns + x; }, by_x);
        sync_block();
        mix_in_place<E, channels>(along_y, columns, by_y);
    } else {
        mix_along<E>(along_y, columns, v, [&](int y, int x) { return y * columns + x; }, by_y);
        sync_block();
        mix_in_place<E, channels>(along_x, rows, by_x);
    }
}

}  // namespace gpsa
