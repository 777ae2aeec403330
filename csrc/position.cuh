// The positional softmax as a product of two tables, along the axes of the grid.
//
//   R = Ay (x) Ax,   A[i, j] = softmax_j(w d + w2 d^2),  d = j - i,  along an axis
//
// A table is never stored: entries are formed in the fragment that a product needs, from the statistics of a
// coordinate.
#pragma once

#include <type_traits>

#include "tiles.cuh"

namespace gpsa {

/// One axis of one head. `Memory` (Shared or Global) has, of every coordinate, log2 of its softmax's normaliser and, if
/// `numbers` is 3, the means of d and d^2 under its row of A; where there is no such coordinate, the last one's is
/// read.
template <typename Memory, int numbers = 3>
class Axis {
public:
    const int size;
    const Memory statistics;

    /// `linear` and `square`: the weights of d and d^2.
    GPSA_DEVICE Axis(int size, float linear, float square, Memory statistics)
        : size(size), statistics(statistics), columns(size), linear(linear * log2_e), square(square * log2_e) {}

    /// Of a token, along x.
    GPSA_DEVICE int row_of(int token) const { return columns.row_of(token); }

    /// log2 of an entry of A is score(j - i) - log2_normaliser(i).
    GPSA_DEVICE float score(float d) const { return d * (linear + square * d); }
    GPSA_DEVICE float log2_normaliser(int i) const { return load(at(i)); }
    GPSA_DEVICE float mean(int i) const { return load(at(i) + 1); }
    GPSA_DEVICE float mean_square(int i) const { return load(at(i) + 2); }

    /// A[i, j], 0 outside of the axis. `shift`: log2_normaliser(i).
    GPSA_DEVICE float entry(int i, int j, float shift) const {
        return i < size && j < size ? exp2_approx(score(float(j - i)) - shift) : 0.0f;
    }

    /// The (16, 16) tile of A that begins at (row, column), zeros outside of the axis. `shift`: load_shifts(row)'s.
    template <typename E>
    GPSA_DEVICE Left tile(int row, int column, const float (&shift)[2]) const {
        Sum entries[2];
        each_value<2>([&](int n, int i) {
            const int half = i / 2, to = column + 8 * n + fragment_column() + i % 2;
            entries[n].values[i] = entry(row + fragment_row() + 8 * half, to, shift[half]);
        });
        return as_left<E>(entries);
    }
    GPSA_DEVICE void load_shifts(float (&shift)[2], int row) const {
        for (int half = 0; half < 2; ++half) shift[half] = log2_normaliser(row + fragment_row() + 8 * half);
    }
    template <typename E>
    GPSA_DEVICE Left tile(int row, int column) const {
        float shift[2];
        load_shifts(shift, row);
        return tile<E>(row, column, shift);
    }

    /// The first tile of A^T, times `factor`.
    template <typename E>
    GPSA_DEVICE Left transposed_tile(float factor) const {
        Sum entries[2];
        each_column([&](int n, int c, int i) {
            const float shift = log2_normaliser(i);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                entries[n].values[2 * half + c] = factor * entry(i, fragment_row() + 8 * half, shift);
            }
        });
        return as_left<E>(entries);
    }

    /// Stores what `statistics` holds of a coordinate, if there is one, by `lanes` lanes together.
    template <int lanes, typename To>
    GPSA_DEVICE void prepare(int i, To to) const {
        float largest = -INFINITY, sum = 0, mean = 0, mean_square = 0;
#pragma unroll 1
        for (int j = lane() % lanes; j < size; j += lanes) largest = maximum(largest, score(float(j - i)));
        largest = maximum_of_lanes<lanes>(largest);
#pragma unroll 1
        for (int j = lane() % lanes; j < size; j += lanes) {
            const float d = float(j - i), weight = exp2_approx(score(d) - largest);
            sum += weight;
            mean += weight * d;
            mean_square += weight * d * d;
        }
        sum = sum_of_lanes<lanes>(sum);
        const bool stores = lane() % lanes == 0 && i < size;
        if (stores) store(to + numbers * i, largest + log2_approx(sum));
        if constexpr (numbers == 3) {
            mean = sum_of_lanes<lanes>(mean) * reciprocal_approx(sum);
            mean_square = sum_of_lanes<lanes>(mean_square) * reciprocal_approx(sum);
            if (stores) store(to + (numbers * i + 1), mean);
            if (stores) store(to + (numbers * i + 2), mean_square);
        }
    }

private:
    const std::conditional_t<std::is_same_v<Memory, Shared<float>>, FewColumns, Columns> columns;
    const float linear, square;

    GPSA_DEVICE Memory at(int i) const { return statistics + numbers * smaller(i, size - 1); }
};

/// R entry by entry, one exponential each: with attention dropout the product of tables is of no use.
template <typename AnyAxis>
struct DensePosition {
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
    GPSA_DEVICE float score(float dx, float dy) const { return along_x.score(dx) + along_y.score(dy); }
};

/// The entries of R that belong to accumulators of scores of 16 query rows.
template <typename AnyAxis>
class DenseRows {
public:
    using Position = DensePosition<AnyAxis>;
    /// Of a token, whole numbers.
    struct Coordinates {
        float x, y;
    };

    GPSA_DEVICE DenseRows(const Position& position, int first_row) : position(position) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            row[half] = position.place(first_row + fragment_row() + 8 * half);
            normaliser[half] = position.log2_normaliser(row[half]);
        }
    }

    GPSA_DEVICE static Coordinates coordinates(typename Position::Place place) {
        return {float(place.x), float(place.y)};
    }

    /// Of two accumulators of 16 keys, whose coordinates are at(0) to at(15): visit(n, i, entry, half, dx, dy) for
    /// values[i] of the n-th, an element of row r + 8 half; the entry is 0 where there is no key.
    template <typename At, typename Visit>
    GPSA_DEVICE void entries(At at, Visit visit) const {
        each_column([&](int n, int c, int column) {
            const Coordinates to = at(column);
            const bool exists = to.y < float(position.along_y.size);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const Coordinates from = coordinates(row[half]);
                const float dx = to.x - from.x, dy = to.y - from.y;
                const float score = position.score(dx, dy) - normaliser[half];
                visit(n, 2 * half + c, exists ? exp2_approx(score) : 0.0f, half, dx, dy);
            }
        });
    }
    /// The same of the keys from `key` on.
    template <typename Visit>
    GPSA_DEVICE void entries_from(int key, Visit visit) const {
        entries([&](int i) { return coordinates(position.place(key + i)); }, visit);
    }

protected:
    const Position position;
    typename Position::Place row[2];
    float normaliser[2];
};

/// The share of g that dO carries when, mixed by a transposed table, it is rounded to 16 bits. All of it, so that what
/// can overflow in float16 is of the size of dV, not of dV / g; but at least 1 / N, with which nothing overflows, so
/// that small gradients do not underflow. What is left of g, open / early_share, follows in float32.
GPSA_DEVICE float early_share(float open, int tokens) { return maximum(open, 1.0f / float(tokens)); }

}  // namespace gpsa
