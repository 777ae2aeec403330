// Typed tiles and the small verbs the kernels are written in: rows of channels in shared memory, operands and
// accumulators of a matrix product in the registers of a warp.
#pragma once

#include <cfloat>
#include <cstring>

#include "gpsa.h"
#include "primitives.h"

namespace gpsa {

constexpr float log2_e = 1.4426950408889634f;
constexpr float ln_2 = 0.6931471805599453f;

/// Into groups of how many chunks a row is divided, within which they are swizzled.
template <int chunks>
constexpr int chunk_group = chunks % 8 == 0 ? 8 : (chunks % 4 == 0 ? 4 : 2);

/// What to add to a row's chunks, by exclusive or, so that 8 consecutive rows' chunks of one column lie in 8 different
/// groups of 4 banks. Without it a row advances by chunks % 8 groups, and comes round after `period` rows.
template <int chunks>
GPSA_DEVICE int swizzle(unsigned row) {
    static_assert(chunks % 2 == 0 && (chunks % 8 == 0 || chunks < 8), "the swizzled chunk must be in the row");
    constexpr unsigned shared_factor = chunk_group<chunks>, period = 8 / shared_factor;
    return static_cast<int>(row / period % shared_factor);
}

/// A chunk of the row that begins `row_start` elements after `base`. The group is added last: all groups are then
/// reached from one address, by offsets that the compiler knows.
template <int chunks, typename E>
GPSA_DEVICE Shared<E> chunk_of_row(Shared<E> base, int row_start, int row, int chunk) {
    const int group = chunk / chunk_group<chunks>, in_group = chunk % chunk_group<chunks>;
    return base + (row_start + (in_group ^ swizzle<chunks>(row)) * 8) + group * chunk_group<chunks> * 8;
}

/// Rows of `channels` elements, one per token.
template <typename E, int channels>
struct Rows {
    static constexpr int chunks = channels / 8;
    Shared<E> base;
    int first = 0;  // row of the array that is row 0 here

    /// Those from row 16 n on.
    GPSA_DEVICE Rows tile(int n) const { return {base, first + 16 * n}; }

    GPSA_DEVICE Shared<E> chunk(int row, int chunk) const {
        return chunk_of_row<chunks>(base, (first + row) * channels, first + row, chunk);
    }
    /// The same of row 16 tile + row: with `tile` known to the compiler one address serves all tiles.
    GPSA_DEVICE Shared<E> chunk(int row, int chunk_, int tile) const {
        return chunk(row, chunk_) + 16 * channels * tile;
    }
};

/// Divides tokens by the columns of their grid, of at most 256 tokens: a multiplication instead of a division.
struct Columns {
    const int count, reciprocal;  // in units of 2^-16

    GPSA_DEVICE explicit Columns(int count) : count(count), reciprocal(0x10000u / count + 1) {}
    GPSA_DEVICE int row_of(int token) const { return token * reciprocal >> 16; }
};

/// Rows of `channels` elements, one per token of a grid of at most 256, free of bank conflicts along both of the grid's
/// axes and over 8 tokens from a multiple of 8 on. Along y tokens are `columns` apart, and after 8 / f rows, f being
/// the largest power of two in `columns`, the swizzled chunks would come round to the same banks: each time, the grid's
/// rows begin `step` chunks later. Where (y, 0)'s first chunk lies with 14 columns (f = 2) of 48 channels (6 chunks,
/// step 2), in groups of 4 banks:
///
///     y                           0  1  2  3  4  5  6  7
///     14 y tokens of 6 chunks     0  4  0  4  0  4  0  4   modulo 8
///     late                        0  0  0  0  2  2  2  2
///     swizzle                     0  1  1  0  0  1  1  0
///     group                       0  5  1  4  2  7  3  6
///
/// (With 4 chunks and f = 4 two collide.)
template <typename E, int channels>
class GridRows {
public:
    static constexpr int chunks = channels / 8;
    const Shared<E> base;

    GPSA_DEVICE GridRows(Shared<E> base, int columns) : base(base), columns(columns) {}

    GPSA_HOST_DEVICE static int elements(int rows, int columns) {
        return rows * columns * channels + late(rows - 1, columns) * 8;
    }
    GPSA_DEVICE Shared<E> chunk(int y, int x, int chunk) const {
        const int token = y * columns.count + x;
        return chunk_of_row<chunks>(base, token * channels + late(y, columns.count) * 8, token, chunk);
    }
    GPSA_DEVICE Shared<E> chunk(int token, int c) const {
        const int y = columns.row_of(token);
        return chunk(y, token - y * columns.count, c);
    }

private:
    const Columns columns;

    /// By how many chunks.
    GPSA_HOST_DEVICE static int late(unsigned y, int columns) {
        const int f = columns % 8 == 0 ? 8 : columns & -columns;
        const int step = chunks % 8 == 0 || f == 8 ? 1 : chunks % 4 != 0 ? 2 : f == 2 ? 4 : 1;
        return y * f / 8 * step;
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
/// A (16, 8) accumulator. This lane holds columns t, t + 1 of rows r, r + 8; r = fragment_row(), t = fragment_column().
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
    return {
        {pack<E>(sums[0].values[0], sums[0].values[1]), pack<E>(sums[0].values[2], sums[0].values[3]),
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

/// Tokens are summed over, channels are the rows of a left operand.
template <typename E, typename At>
GPSA_DEVICE Left load_left_over_tokens(int s, At at) {
    Left a;
    ldmatrix_x4_trans<E>(a.words, at(lane() / 16 * 8 + lane() % 8, 2 * s + lane() / 8 % 2));
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

/// The same where this lane's part is, its channels summed over, or its tokens.
template <typename E>
GPSA_DEVICE Right load_right(Shared<E> at) {
    Right b;
    ldmatrix_x4<E>(b.words, at);
    return b;
}
template <typename E>
GPSA_DEVICE Right load_right_transposed(Shared<E> at) {
    Right b;
    ldmatrix_x4_trans<E>(b.words, at);
    return b;
}

/// Where a lane's part of a right operand is, in elements after its first row: formed once for all operands in rows
/// whose number is a multiple of 16.
template <int channels>
class RightOffsets {
public:
    GPSA_DEVICE static RightOffsets over_channels() { return {lane() / 16 * 8 + lane() % 8, lane() / 8 % 2}; }
    GPSA_DEVICE static RightOffsets over_tokens() { return {lane() % 16, lane() / 16}; }

    GPSA_DEVICE int operator()(int s) const { return offsets[s % steps] + s / steps * (16 * steps); }

private:
    static constexpr int chunks = channels / 8, steps = chunk_group<chunks> / 2;
    int offsets[steps];

    GPSA_DEVICE RightOffsets(int row, int chunk) {
#pragma unroll
        for (int s = 0; s < steps; ++s)
            offsets[s] = kept(row * channels + ((2 * s + chunk) ^ swizzle<chunks>(row)) * 8);
    }
};

/// The largest value, or the sum, of the four lanes that hold a row of an accumulator.
GPSA_DEVICE float row_maximum(float x) {
    x = maximum(x, shuffle_xor(x, 1));
    return maximum(x, shuffle_xor(x, 2));
}
GPSA_DEVICE float row_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

GPSA_DEVICE float warp_sum(float x) {
    x = row_sum(x);
    x += shuffle_xor(x, 4);
    x += shuffle_xor(x, 8);
    return x + shuffle_xor(x, 16);
}

// Two accumulators side by side have 16 columns, of which a lane holds four: 8 n + t + i in sums[n][i]. Where there
// is one number for each column, a lane has column_of_lane()'s.

GPSA_DEVICE int column_of_lane() { return lane() / 16 * 8 + lane() % 4 * 2 + lane() / 8 % 2; }

/// What the warp's lanes hold of a column, added up: the sum of column_of_lane().
GPSA_DEVICE float column_sum(const float (&sums)[2][2]) {
    const bool right = lane() & 16, odd = lane() & 8;
    float half[2];  // columns t and t + 1 of one accumulator
    for (int i = 0; i < 2; ++i) {
        half[i] = (right ? sums[1][i] : sums[0][i]) + shuffle_xor(right ? sums[0][i] : sums[1][i], 16);
    }
    const float sum = (odd ? half[1] : half[0]) + shuffle_xor(odd ? half[0] : half[1], 8);
    return sum + shuffle_xor(sum, 4);
}

/// Four floats, at a multiple of 16 bytes.
GPSA_DEVICE void load_four(float (&to)[2][2], Shared<float> from) {
    const Chunk chunk = load_chunk<float>(from);
    std::memcpy(to, chunk.words, sizeof to);
}

GPSA_DEVICE int smaller(int a, int b) { return a < b ? a : b; }

/// Where sum `n` of a head goes in a slot of `sums`: the weights' of all heads, then the gates'.
GPSA_DEVICE Global<float> sum_of(float* sums, int64_t slot, int heads, int head, int n) {
    return Global<float>(sums) + (4 * slot * heads + (n < 3 ? 3 * head + n : 3 * heads + head));
}

GPSA_DEVICE float sigmoid(float x) { return reciprocal_approx(1.0f + exp2_approx(-x * log2_e)); }

/// How threads share out rows of chunks: `beside` lanes take a group of a row's chunks, and the same of its other
/// groups, which are `step` elements apart in shared and in global memory alike.
template <int chunks>
struct ChunkShare {
    static constexpr int beside = chunk_group<chunks>, groups = chunks / beside, step = beside * 8;
    static constexpr int turns = beside / 2;  // of a warp, for 16 rows
};

/// Starts copying this lane's chunks of a row, zeros where the row is not `valid` and from head_dim on. `to`: the chunk
/// of the first group; `row`: the row's first element.
template <int chunks, typename E>
GPSA_DEVICE void copy_chunks(Shared<E> to, Global<const E> row, bool valid, int head_dim) {
    using Share = ChunkShare<chunks>;
    const int chunk = thread() % Share::beside;
    const Global<const E> from = row + chunk * 8;
#pragma unroll
    for (int n = 0; n < Share::groups; ++n) {
        copy_async<E>(to + n * Share::step, from + n * Share::step, valid && chunk * 8 + n * Share::step < head_dim);
    }
}

/// The first element of a (batch, head).
template <typename T>
GPSA_DEVICE Global<T> rows_of(const Tensor& t, int64_t batch, int head) {
    return Global<T>(static_cast<T*>(t.data)) + (batch * t.batch + head * t.head);
}

/// Starts copying `count` tokens of a (batch, head) into rows, the channels from head_dim on and rows from `count` to
/// `padded` filled with zeros.
template <typename E, int channels>
GPSA_DEVICE void copy_rows(
    const Rows<E, channels>& rows, Global<const E> from, int64_t stride, int count, int padded, int head_dim) {
    constexpr int chunks = channels / 8, beside = ChunkShare<chunks>::beside;
    const int step = threads() / beside;
    Global<const E> source = from + thread() / beside * stride;
    for (int row = thread() / beside; row < padded; row += step, source = source + step * stride) {
        copy_chunks<chunks>(rows.chunk(row, thread() % beside), source, row < count, head_dim);
    }
}

/// `chunks` chunks, from first_chunk on, of 16 tokens from `first` on to global memory, as far as tokens and channels
/// exist, 16 bytes a lane of this warp. `at(token, chunk)` says where they are.
template <int chunks, typename E, typename At>
GPSA_DEVICE void store_rows(Global<E> to, int64_t stride, int first, int tokens, int first_chunk, int head_dim, At at) {
    using Share = ChunkShare<chunks>;
    const int chunk = first_chunk + lane() % Share::beside;
    Chunk own[Share::turns][Share::groups];  // all are loaded before the first is stored: the waits overlap
    const auto each = [&](auto visit) {
#pragma unroll
        for (int turn = 0; turn < Share::turns; ++turn) {
            const int token = first + (32 * turn + lane()) / Share::beside;
#pragma unroll
            for (int n = 0; n < Share::groups; ++n) {
                const int offset = n * Share::step;
                if (token < tokens && chunk * 8 + offset < head_dim) visit(own[turn][n], token, offset);
            }
        }
    };
    each([&](Chunk& value, int token, int offset) { value = load_chunk<E>(at(token, chunk) + offset); });
    each([&](const Chunk& value, int token, int offset) {
        store_chunk<E>(to + (token * stride + chunk * 8) + offset, value);
    });
}

/// |scale| in the exponent of 2, whose sign the queries get. A scale of 0 becomes one whose products vanish beside 1
/// but still keep -inf.
GPSA_DEVICE float log2_scale_of(float scale, Left* q, int count) {
#pragma unroll
    for (int n = 0; n < count; ++n) {
        for (uint32_t& word : q[n].words) word ^= scale < 0 ? 0x80008000u : 0;
    }
    return scale == 0 ? FLT_MIN : (scale < 0 ? -scale : scale) * log2_e;
}

/// The logarithms of the sums of the 16 rows from `first` on. Of rows r and r + 8: log2 of the largest exponential, and
/// the sum of exponentials relative to it.
GPSA_DEVICE void store_logsumexp(
    Global<float> to, int first, int tokens, const float (&shift)[2], const float (&sum)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int token = first + fragment_row() + 8 * half;
        if (fragment_column() == 0 && token < tokens) {
            store(to + token, (shift[half] + log2_approx(sum[half])) * ln_2);
        }
    }
}

}  // namespace gpsa
