// The positional branch, as two short products along the axes of the grid.
//
//   R = Ay (x) Ax,   A[i, j] = softmax_j(w d + w2 d^2),  d = j - i,  along an axis
//
// A table is never stored: entries are formed in the fragment that a product needs, from one number per coordinate,
// log2 of the softmax's normaliser.
#pragma once

#include "tiles.cuh"

namespace gpsa {

/// Along one axis: the gradients of the weights of d and d^2, and the sum of A times its entries' gradients.
struct WeightGradient {
    float linear = 0, square = 0, total = 0;
};

class Axis {
public:
    const int size;

    /// `linear` and `square`: the weights of d and d^2. `normaliser`: `size` numbers, filled in by prepare().
    GPSA_DEVICE Axis(int size, float linear, float square, Shared<float> normaliser)
        : size(size), linear(linear * log2_e), square(square * log2_e), normaliser(normaliser), columns(size) {}

    /// The normalisers of two axes with the same weight of d^2, one after the other in shared memory. Called by all
    /// threads; they can be used after the next barrier of the block.
    GPSA_DEVICE static void prepare(const Axis& first, const Axis& second) {
        each_coordinate(first, second, [&](const Axis& axis, int i, int) {
            float largest = -INFINITY, sum = 0;
#pragma unroll 1
            for (int j = lane() % 4; j < axis.size; j += 4) {
                largest = maximum(largest, axis.score(static_cast<float>(j - i)));
            }
            largest = row_maximum(largest);
#pragma unroll 1
            for (int j = lane() % 4; j < axis.size; j += 4) {
                sum += exp2_approx(axis.score(static_cast<float>(j - i)) - largest);
            }
            sum = row_sum(sum);
            if (lane() % 4 == 0 && i < axis.size) store(axis.normaliser + i, largest + log2_approx(sum));
        });
    }

    /// Follows prepare(), before the barrier. `means`: 2 numbers per coordinate, of d and d^2 under its row of A.
    GPSA_DEVICE static void prepare_means(const Axis& first, const Axis& second, Shared<float> means) {
        sync_warp();  // a coordinate's normaliser is of the same four lanes
        each_coordinate(first, second, [&](const Axis& axis, int i, int at) {
            const float shift = axis.log2_normaliser(i);
            float mean = 0, mean_square = 0;
#pragma unroll 1
            for (int j = lane() % 4; j < axis.size; j += 4) {
                const float d = static_cast<float>(j - i), share = axis.entry(i, j, shift) * d;
                mean += share;
                mean_square += share * d;
            }
            mean = row_sum(mean);
            mean_square = row_sum(mean_square);
            if (lane() % 4 == 0 && i < axis.size) {
                store(means + 2 * at, mean);
                store(means + (2 * at + 1), mean_square);
            }
        });
    }

    /// The (16, 16) tile of A that begins at (row, column), zeros outside of the axis.
    template <typename E>
    GPSA_DEVICE Left tile(int row, int column) const {
        Left a;
        for (int half = 0; half < 2; ++half) {
            const int i = row + fragment_row() + 8 * half;
            const float shift = log2_normaliser(i);
            for (int side = 0; side < 2; ++side) {
                const int j = column + fragment_column() + 8 * side;
                a.words[half + 2 * side] = pack<E>(entry(i, j, shift), entry(i, j + 1, shift));
            }
        }
        return a;
    }

    /// The same of A^T, times `factor`.
    template <typename E>
    GPSA_DEVICE Left transposed_tile(int row, int column, float factor = 1) const {
        Left a;
        for (int side = 0; side < 2; ++side) {
            const int i = column + fragment_column() + 8 * side;
            const float low = log2_normaliser(i), high = log2_normaliser(i + 1);
            for (int half = 0; half < 2; ++half) {
                const int j = row + fragment_row() + 8 * half;
                a.words[half + 2 * side] = pack<E>(factor * entry(i, j, low), factor * entry(i + 1, j, high));
            }
        }
        return a;
    }

    /// Of a token of a grid of at most 256, along x.
    GPSA_DEVICE int row_of(int token) const { return columns.row_of(token); }

    /// log2 of an entry of A is score(j - i) - log2_normaliser(i); the last coordinate's where there is no i.
    GPSA_DEVICE float score(float d) const { return d * (linear + square * d); }
    GPSA_DEVICE float log2_normaliser(int i) const { return load(normaliser + smaller(i, size - 1)); }

    /// A[i, j], 0 outside of the axis. `shift`: log2_normaliser(i).
    GPSA_DEVICE float entry(int i, int j, float shift) const {
        return i < size && j < size ? exp2_approx(score(static_cast<float>(j - i)) - shift) : 0.0f;
    }

private:
    const float linear, square;
    const Shared<float> normaliser;
    const Columns columns;

    /// visit(axis, coordinate, its place among both axes') by four lanes each; the last warp goes beyond the last one.
    template <typename Visit>
    GPSA_DEVICE static void each_coordinate(const Axis& first, const Axis& second, Visit visit) {
        for (int start = 8 * warp(); start < first.size + second.size; start += threads() / 4) {
            const int at = start + lane() / 4;
            const bool in_first = at < first.size;
            const Axis axis(in_first ? first : second);  // a copy: its members are chosen, not their addresses
            visit(axis, in_first ? at : at - first.size, at);
        }
    }
};

/// R entry by entry, one exponential each: with attention dropout the product of tables is of no use. `AnyAxis` knows
/// the axis' `size`, `score(distance)` and `log2_normaliser(coordinate)`.
template <typename AnyAxis>
class DensePosition {
public:
    struct Place {
        int x, y;
    };
    const AnyAxis along_x, along_y;

    GPSA_DEVICE Place place(int token) const {
        const int y = along_x.row_of(token);
        return {token - y * along_x.size, y};
    }
    GPSA_DEVICE float log2_normaliser(Place query) const {
        return along_x.log2_normaliser(query.x) + along_y.log2_normaliser(query.y);
    }
    GPSA_DEVICE float weight(Place query, float log2_normaliser, Place key) const {
        const auto dx = static_cast<float>(key.x - query.x), dy = static_cast<float>(key.y - query.y);
        return exp2_approx(along_x.score(dx) + along_y.score(dy) - log2_normaliser);
    }
};

/// The entries of R that belong to accumulators of scores of 16 query rows.
template <typename AnyAxis>
class DenseRows {
public:
    /// Of a token, whole numbers.
    struct Coordinates {
        float x, y;
    };

    GPSA_DEVICE DenseRows(const DensePosition<AnyAxis>& position, int first_row) : position(position) {
        for (int half = 0; half < 2; ++half) {
            row[half] = position.place(first_row + fragment_row() + 8 * half);
            normaliser[half] = position.log2_normaliser(row[half]);
        }
    }

    GPSA_DEVICE static Coordinates coordinates(typename DensePosition<AnyAxis>::Place place) {
        return {static_cast<float>(place.x), static_cast<float>(place.y)};
    }

    /// Of two accumulators of the keys from `key` on: visit(n, i, entry, half, dx, dy) for values[i] of the n-th, an
    /// element of row r + 8 half; the entry is 0 where there is no key.
    template <typename Visit>
    GPSA_DEVICE void entries(int key, Visit visit) const {
        entries_at([&](int i) { return coordinates(position.place(key + i)); }, visit);
    }

    /// The same of keys whose coordinates are at(0) to at(15).
    template <typename At, typename Visit>
    GPSA_DEVICE void entries_at(At at, Visit visit) const {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const Coordinates to = at(8 * n + fragment_column() + c);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const Coordinates from = coordinates(row[half]);
                    const float dx = to.x - from.x, dy = to.y - from.y;
                    const float score = position.along_x.score(dx) + position.along_y.score(dy) - normaliser[half];
                    const bool exists = to.y < static_cast<float>(position.along_y.size);
                    visit(n, 2 * half + c, exists ? exp2_approx(score) : 0.0f, half, dx, dy);
                }
            }
        }
    }

protected:
    const DensePosition<AnyAxis> position;
    typename DensePosition<AnyAxis>::Place row[2];
    float normaliser[2];
};

/// Rows row to row + 15 of a line, those below `size`, rounded, where `at(coordinate, chunk)` says.
template <typename E, int channels, typename At>
GPSA_DEVICE void store_line(const Sum* sums, int row, int size, At at) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int i = row + fragment_row() + 8 * half;
        if (i >= size) continue;
#pragma unroll
        for (int n = 0; n < channels / 8; ++n) {
            const float* pair = &sums[n].values[2 * half];
            store_pair<E>(at(i, n) + fragment_column(), pack<E>(pair[0], pair[1]));
        }
    }
}

/// The share of g that dO carries when, mixed by a transposed table, it is rounded to 16 bits. All of it, so that what
/// can overflow in float16 is of the size of dV, not of dV / g; but at least 1 / N, with which nothing overflows, so
/// that small gradients do not underflow. What is left of g, open / early_share, follows in float32.
GPSA_DEVICE float early_share(float open, int tokens) { return maximum(open, 1.0f / static_cast<float>(tokens)); }

/// Values mixed along one axis of at most 16: for each line of the grid along it, A times the line's tokens.
///
/// `from(coordinate, line, chunk)` and `to(coordinate, line, chunk)` are chunks of a token. They may be the same: a
/// warp has read a line when it writes it.
template <typename E, int channels, typename From, typename To>
GPSA_DEVICE void mix_short(const Axis& axis, int lines, From from, To to) {
    if (warp() >= lines) return;
    const Left a = axis.tile<E>(0, 0);
    for (int line = warp(); line < lines; line += threads() / 32) {
        Sum sums[channels / 8] = {};
#pragma unroll
        for (int s = 0; s < channels / 16; ++s) {
            const Right b = load_right_over_tokens<E>(
                s, [&](int i, int chunk) { return from(smaller(i, axis.size - 1), line, chunk); });
            multiply<E>(&sums[2 * s], a, b);
        }
        sync_warp();
        store_line<E, channels>(sums, 0, axis.size, [&](int i, int chunk) { return to(i, line, chunk); });
    }
}

/// The same along an axis of any size; `from` and `to` must not meet.
template <typename E, int channels, typename From, typename To>
GPSA_DEVICE void mix_along(const Axis& axis, int lines, From from, To to) {
    if (axis.size <= 16) return mix_short<E, channels>(axis, lines, from, to);
    const int tiles = (axis.size + 15) / 16;
#pragma unroll 1
    for (int item = warp(); item < tiles * lines; item += threads() / 32) {
        const int row = item / lines * 16, line = item % lines;
        Sum sums[channels / 8] = {};
#pragma unroll 1
        for (int column = 0; column < axis.size; column += 16) {
            const Left a = axis.tile<E>(row, column);
#pragma unroll
            for (int s = 0; s < channels / 16; ++s) {
                const Right b = load_right_over_tokens<E>(
                    s, [&](int i, int chunk) { return from(smaller(column + i, axis.size - 1), line, chunk); });
                multiply<E>(&sums[2 * s], a, b);
            }
        }
        store_line<E, channels>(sums, row, axis.size, [&](int i, int chunk) { return to(i, line, chunk); });
    }
}

/// position = (Ay (x) Ax) V for all tokens of a (batch, head), 16-bit like V. The longer axis goes first, so that the
/// one done in place has at most 16 coordinates (N <= 256). Ends with what each thread wrote; a barrier makes it
/// everybody's.
template <typename E, int channels>
GPSA_DEVICE void mix_position(
    const Axis& along_x, const Axis& along_y, const Rows<E, channels>& v, const GridRows<E, channels>& position) {
    const int rows = along_y.size, columns = along_x.size;
    const auto by_x = [&](int x, int y, int chunk) { return position.chunk(y, x, chunk); };
    const auto by_y = [&](int y, int x, int chunk) { return position.chunk(y, x, chunk); };
    if (columns >= rows) {
        mix_along<E, channels>(
            along_x, rows, [&](int x, int y, int chunk) { return v.chunk(y * columns + x, chunk); }, by_x);
        sync_block();
        mix_short<E, channels>(along_y, columns, by_y, by_y);
    } else {
        mix_along<E, channels>(
            along_y, columns, [&](int y, int x, int chunk) { return v.chunk(y * columns + x, chunk); }, by_y);
        sync_block();
        mix_short<E, channels>(along_x, rows, by_x, by_x);
    }
}

/// position = share content + open position for 16 tokens from `first` on, every element by the lane that holds it;
/// `share0` for the accumulator's rows 0 to 7, `share1` for rows 8 to 15.
template <typename E, int channels>
GPSA_DEVICE void blend(
    const GridRows<E, channels>& position, int first, int tokens, float open, const Sum* content, float share0,
    float share1) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int token = first + fragment_row() + 8 * half;
        if (token >= tokens) continue;
        const float share = half == 0 ? share0 : share1;
        const auto at = [&](int n) { return position.chunk(token, n) + fragment_column(); };
        uint32_t words[channels / 8];  // all are loaded before the first is stored: the waits overlap
#pragma unroll
        for (int n = 0; n < channels / 8; ++n) words[n] = load_pair<E>(at(n));
#pragma unroll
        for (int n = 0; n < channels / 8; ++n) {
            const Pair p = unpack<E>(words[n]);
            const float* c = &content[n].values[2 * half];
            store_pair<E>(at(n), pack<E>(share * c[0] + open * p.low, share * c[1] + open * p.high));
        }
    }
}

}  // namespace gpsa
