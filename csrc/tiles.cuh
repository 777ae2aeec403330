// Typed tiles and the small verbs the kernels are written in: rows of channels in shared memory, operands and
// accumulators of a matrix product in the registers of a warp.
#pragma once

#include "primitives.h"

namespace gpsa {

constexpr float log2_e = 1.4426950408889634f;
constexpr float ln_2 = 0.6931471805599453f;

/// What to add to a row's chunks, by exclusive or, so that 8 consecutive rows' chunks of one column lie in 8 different
/// groups of 4 banks. Without it a row advances by chunks % 8 groups, and comes round after `period` rows.
template <int chunks>
GPSA_DEVICE int swizzle(unsigned row) {
    static_assert(chunks % 2 == 0 && (chunks % 8 == 0 || chunks < 8), "the swizzled chunk must be in the row");
    constexpr unsigned shared_factor = chunks % 8 == 0 ? 8 : chunks % 4 == 0 ? 4 : 2;
    constexpr unsigned period = 8 / shared_factor;
    return static_cast<int>(row / period % shared_factor);
}

/// Rows of `channels` elements, one per token.
template <typename E, int channels>
struct Rows {
    static constexpr int chunks = channels / 8;
    Shared<E> base;
    int first = 0;  // row of the array that is row 0 here

    GPSA_DEVICE Shared<E> chunk(int row, int chunk) const {
        return base + ((first + row) * channels + (chunk ^ swizzle<chunks>(first + row)) * 8);
    }
    /// The same of row 16 tile + row: with `tile` known to the compiler one address serves all tiles.
    GPSA_DEVICE Shared<E> chunk(int row, int chunk_, int tile) const {
        return chunk(row, chunk_) + 16 * channels * tile;
    }
};

/// Rows of `channels` elements, one per token of a grid, free of bank conflicts along both of the grid's axes: a row of
/// the grid begins 16 bytes late, so that the step from one to the next is an odd number of chunks.
template <typename E, int channels>
struct GridRows {
    static constexpr int chunks = channels / 8;
    Shared<E> base;
    unsigned columns;

    GPSA_HOST_DEVICE static int elements(int rows, int columns) { return rows * columns * channels + (rows - 1) * 8; }

    GPSA_DEVICE Shared<E> chunk(int y, int x, int chunk) const {
        return base + ((y * static_cast<int>(columns) + x) * channels + y * 8 + (chunk ^ swizzle<chunks>(x)) * 8);
    }
    GPSA_DEVICE Shared<E> chunk(unsigned token, int c) const {
        return chunk(static_cast<int>(token / columns), static_cast<int>(token % columns), c);
    }
};

/// A (16, 16) left operand.
struct Left {
    uint32_t words[4];
};
/// Two (16, 8) right operands, side by side.
struct Right {
    uint32_t words[4];
};
/// A (16, 8) accumulator. This lane holds columns 2t and 2t+1 of rows g and g+8, g = lane / 4, t = lane % 4.
struct Sum {
    float values[4];
};

GPSA_DEVICE int fragment_row() { return lane() / 4; }
GPSA_DEVICE int fragment_column() { return lane() % 4 * 2; }

/// sums[0], sums[1] += a b.
template <typename E>
GPSA_DEVICE void multiply(Sum* sums, const Left& a, const Right& b) {
    mma<E>(sums[0].values, a.words, b.words[0], b.words[1]);
    mma<E>(sums[1].values, a.words, b.words[2], b.words[3]);
}

/// Two neighbouring (16, 8) accumulators, rounded, as a (16, 16) left operand.
template <typename E>
GPSA_DEVICE Left as_left(const Sum* sums) {
    return {{pack<E>(sums[0].values[0], sums[0].values[1]), pack<E>(sums[0].values[2], sums[0].values[3]),
             pack<E>(sums[1].values[0], sums[1].values[1]), pack<E>(sums[1].values[2], sums[1].values[3])}};
}

// An operand is 16 tokens x 16 channels, channels 16 s to 16 s + 15. `at(token, chunk)` says where a token's chunk is,
// token from 0 to 15.

/// Tokens are the rows of a left operand, channels are summed over.
template <typename E, typename At>
GPSA_DEVICE Left load_left(int s, At at) {
    Left a;
    ldmatrix_x4<E>(a.words, at(lane() % 16, 2 * s + lane() / 16));
    return a;
}

/// Tokens are the columns of a right operand, channels are summed over.
template <typename E, typename At>
GPSA_DEVICE Right load_right_over_channels(int s, At at) {
    Right b;
    ldmatrix_x4<E>(b.words, at(lane() / 16 * 8 + lane() % 8, 2 * s + lane() / 8 % 2));
    return b;
}

/// Tokens are summed over, channels are the columns of a right operand.
template <typename E, typename At>
GPSA_DEVICE Right load_right_over_tokens(int s, At at) {
    Right b;
    ldmatrix_x4_trans<E>(b.words, at(lane() % 16, 2 * s + lane() / 16));
    return b;
}

/// The largest value, or the sum, of the four lanes that hold a row of an accumulator.
GPSA_DEVICE float row_maximum(float x) {
    x = maximum(x, shuffle_xor(x, 1));
    return maximum(x, shuffle_xor(x, 2));
}
GPSA_DEVICE float row_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

GPSA_DEVICE int smaller(int a, int b) { return a < b ? a : b; }

GPSA_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + exp2_approx(-x * log2_e)); }

/// Starts copying `count` tokens of a (batch, head) into rows, the channels from head_dim on and rows from `count` to
/// `padded` filled with zeros.
template <typename E, int channels>
GPSA_DEVICE void copy_rows(
    const Rows<E, channels>& rows, Global<const E> from, int64_t stride, int count, int padded, int head_dim) {
    constexpr int chunks = channels / 8;
    for (int i = thread(); i < padded * chunks; i += threads()) {
        const int row = i / chunks, chunk = i % chunks;
        const bool valid = row < count && chunk * 8 < head_dim;
        copy_async<E>(rows.chunk(row, chunk), valid ? from + (row * stride + chunk * 8) : from, valid);
    }
}

}  // namespace gpsa
