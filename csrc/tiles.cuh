// The verbs that the kernels are written in: rows of channels in shared memory, operands and accumulators of matrix
// products in a warp's registers.
#pragma once

#include <cfloat>
#include <cstring>
#include <type_traits>

#include "gpsa.h"
#include "primitives.h"

namespace gpsa {

constexpr float log2_e = 1.4426950408889634f;
constexpr float ln_2 = 0.6931471805599453f;

GPSA_HOST_DEVICE int smaller(int a, int b) { return a < b ? a : b; }

GPSA_DEVICE float sigmoid(float x) { return reciprocal_approx(1.0f + exp2_approx(-x * log2_e)); }

/// visit(element, channels, has_dropout): what the kernels of a problem of head_dim `most` at most are compiled for.
/// Rows of head_dim channels are padded to `channels` in shared memory.
template <int most = 128, typename Visit>
auto dispatch(const Problem& problem, Visit visit) {
    const auto with_channels = [&](auto element, auto channels) {
        if (problem.dropout_p > 0) return visit(element, channels, std::true_type{});
        return visit(element, channels, std::false_type{});
    };
    const auto with_element = [&](auto element) {
        if (problem.head_dim <= 32) return with_channels(element, std::integral_constant<int, 32>{});
        if (problem.head_dim <= 48) return with_channels(element, std::integral_constant<int, 48>{});
        if constexpr (most > 64) {
            if (problem.head_dim > 64) return with_channels(element, std::integral_constant<int, 128>{});
        }
        return with_channels(element, std::integral_constant<int, 64>{});
    };
    return problem.dtype == Dtype::float16 ? with_element(Half{}) : with_element(Bfloat16{});
}

/// What stands for what only dropout needs where there is none.
struct Nothing {
    template <typename... Arguments>
    GPSA_DEVICE Nothing(const Arguments&...) {}
};

// Rows in shared memory.

/// Into groups of how many chunks a row is divided, within which they are swizzled.
template <int chunks>
constexpr int chunk_group = chunks % 8 == 0 ? 8 : (chunks % 4 == 0 ? 4 : 2);

/// What to add to a row's chunks, by exclusive or, so that 8 consecutive rows' chunks of one column, which ldmatrix and
/// cp.async move at a time, lie in different groups of 4 banks: 48 channels' chunk c of row r is at c ^ (r / 4 % 2).
template <int chunks>
GPSA_DEVICE int swizzle(unsigned row) {
    static_assert(chunks % 2 == 0 && (chunks % 8 == 0 || chunks < 8), "the swizzled chunk must be in the row");
    constexpr unsigned shared_factor = chunk_group<chunks>, period = 8 / shared_factor;
    return int(row / period % shared_factor);
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
    Shared<E> base;
    int first = 0;  // row of the array that is row 0 here

    /// Those from row 16 n on.
    GPSA_DEVICE Rows tile(int n) const { return {base, first + 16 * n}; }

    GPSA_DEVICE Shared<E> chunk(int row, int chunk) const {
        return chunk_of_row<channels / 8>(base, (first + row) * channels, first + row, chunk);
    }
    /// The same of row 16 tile + row: with `tile` known to the compiler one address serves all tiles.
    GPSA_DEVICE Shared<E> chunk(int row, int chunk_, int tile) const {
        return chunk(row, chunk_) + 16 * channels * tile;
    }
};

/// Divides tokens by the columns of their grid.
struct Columns {
    const int count;

    GPSA_DEVICE explicit Columns(int count) : count(count) {}
    GPSA_DEVICE int row_of(int token) const { return unsigned(token) / unsigned(count); }
};
/// The same of at most 256 tokens: by a multiplication.
struct FewColumns {
    const int count, reciprocal;  // in units of 2^-16

    GPSA_DEVICE explicit FewColumns(int count) : count(count), reciprocal(0x10000u / count + 1) {}
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
    const FewColumns columns;

    /// By how many chunks.
    GPSA_HOST_DEVICE static int late(unsigned y, int columns) {
        const int f = columns % 8 == 0 ? 8 : columns & -columns;
        const int step = chunks % 8 == 0 || f == 8 ? 1 : chunks % 4 != 0 ? 2 : f == 2 ? 4 : 1;
        return y * f / 8 * step;
    }
};

// Operands and accumulators. Where an accumulator's columns are, r = fragment_row() and t = fragment_column().

/// A (16, 16) left operand.
struct Left {
    uint32_t words[4];
};
/// Two (16, 8) right operands, side by side.
struct Right {
    uint32_t words[4];
};
/// A (16, 8) accumulator. This lane holds columns t, t + 1 of row r, then of row r + 8.
struct Sum {
    float values[4];
};

GPSA_DEVICE int fragment_row() { return lane() / 4; }
GPSA_DEVICE int fragment_column() { return lane() % 4 * 2; }

/// visit(n, i) for values[i] of the n-th of `count` accumulators.
template <int count, typename Visit>
GPSA_DEVICE void each_value(Visit visit) {
#pragma unroll
    for (int n = 0; n < count; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) visit(n, i);
    }
}

/// visit(half, n) for values[2 half] and values[2 half + 1] of the n-th: columns t, t + 1 of row r + 8 half.
template <int count, typename Visit>
GPSA_DEVICE void each_pair(Visit visit) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < count; ++n) visit(half, n);
    }
}

/// visit(n, c, column) for the columns that this lane has of two accumulators side by side: values[c] and values[2 + c]
/// of the n-th.
template <typename Visit>
GPSA_DEVICE void each_column(Visit visit) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) visit(n, c, 8 * n + fragment_column() + c);
    }
}

template <int count>
GPSA_DEVICE void scale(Sum* sums, float factor) {
    each_value<count>([&](int n, int i) { sums[n].values[i] *= factor; });
}

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

/// load_left of all channels.
template <typename E, int steps, typename At>
GPSA_DEVICE void load_left(Left (&a)[steps], At at) {
#pragma unroll
    for (int s = 0; s < steps; ++s) a[s] = load_left<E>(s, at);
}

/// (16, 16) sums += a times 16 tokens, over all channels.
template <typename E, int steps, typename At>
GPSA_DEVICE void add_over_channels(Sum* sums, const Left (&a)[steps], At at) {
#pragma unroll
    for (int s = 0; s < steps; ++s) multiply<E>(sums, a[s], load_right_over_channels<E>(s, at));
}

/// (16, channels) sums += a times 16 tokens, over these.
template <typename E, int channels, typename At>
GPSA_DEVICE void add_over_tokens(Sum* sums, const Left& a, At at) {
#pragma unroll
    for (int s = 0; s < channels / 16; ++s) multiply<E>(&sums[2 * s], a, load_right_over_tokens<E>(s, at));
}

/// Loads right operands of rows whose number is a multiple of 16: where a lane's part is after the first row is formed
/// once for all of them. Summed over are tokens or channels.
template <int channels, bool over_tokens>
class RightLoader {
public:
    GPSA_DEVICE RightLoader() {
        const int row = over_tokens ? lane() % 16 : lane() / 16 * 8 + lane() % 8;
        const int chunk = over_tokens ? lane() / 16 : lane() / 8 % 2;
#pragma unroll
        for (int s = 0; s < steps; ++s)
            offsets[s] = kept(row * channels + ((2 * s + chunk) ^ swizzle<chunks>(row)) * 8);
    }

    template <typename E>
    GPSA_DEVICE Right operator()(Shared<E> first_row, int s) const {
        const Shared<E> at = first_row + (offsets[s % steps] + s / steps * (16 * steps));
        Right b;
        over_tokens ? ldmatrix_x4_trans<E>(b.words, at) : ldmatrix_x4<E>(b.words, at);
        return b;
    }

private:
    static constexpr int chunks = channels / 8, steps = chunk_group<chunks> / 2;
    int offsets[steps];
};

// Sums and softmaxes over lanes.

/// The sum, or the largest value, of a group of lanes: 4 hold a row of an accumulator, 32 are a warp.
template <int lanes>
GPSA_DEVICE float sum_of_lanes(float x) {
#pragma unroll
    for (int mask = 1; mask < lanes; mask *= 2) x += shuffle_xor(x, mask);
    return x;
}
template <int lanes>
GPSA_DEVICE float maximum_of_lanes(float x) {
#pragma unroll
    for (int mask = 1; mask < lanes; mask *= 2) x = maximum(x, shuffle_xor(x, mask));
    return x;
}

/// What each lane of a block holds of `count` numbers, added up for each warp; after a barrier total() adds these up.
template <int count>
GPSA_DEVICE void store_partial(Shared<float> partial, const float (&values)[count]) {
    float sums[count];
    for (int n = 0; n < count; ++n) sums[n] = sum_of_lanes<32>(values[n]);
    const Shared<float> own = partial + count * warp();  // by all lanes: warp() is a shuffle
    if (lane() > 0) return;
    for (int n = 0; n < count; ++n) store(own + n, sums[n]);
}
template <int count>
GPSA_DEVICE float total(Shared<float> partial, int warps, int n) {
    float sum = 0;
    for (int w = 0; w < warps; ++w) sum += load(partial + (count * w + n));
    return sum;
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

/// |scale| in the exponent of 2, whose sign the queries get. A scale of 0 becomes one whose products vanish beside 1
/// but still keep -inf.
GPSA_DEVICE float log2_scale_of(float scale, Left* q, int count) {
#pragma unroll
    for (int n = 0; n < count; ++n) {
        for (uint32_t& word : q[n].words) word ^= scale < 0 ? 0x80008000u : 0;
    }
    return scale == 0 ? FLT_MIN : (scale < 0 ? -scale : scale) * log2_e;
}

/// scores = -inf where there is no key, of 8 count keys of which `keys` exist.
template <int count>
GPSA_DEVICE void mask_keys(Sum* scores, int keys) {
    each_value<count>([&](int n, int i) {
        if (8 * n + fragment_column() + i % 2 >= keys) scores[n].values[i] = -INFINITY;
    });
}

/// Of rows r and r + 8: the largest of this lane's scores. In pairs: half as long a chain of dependent instructions.
template <int count>
GPSA_DEVICE void largest_scores(float (&largest)[2], const Sum* scores) {
    largest[0] = largest[1] = -INFINITY;
    each_pair<count>([&](int half, int n) {
        const float* pair = &scores[n].values[2 * half];
        largest[half] = maximum(largest[half], maximum(pair[0], pair[1]));
    });
}

/// scores = exp(scale scores) relative to 2^shift. Of rows r and r + 8: the sum of this lane's.
template <int count>
GPSA_DEVICE void exponentiate(float (&sum)[2], Sum* scores, float log2_scale, const float (&shift)[2]) {
    sum[0] = sum[1] = 0;
    each_pair<count>([&](int half, int n) {
        float* pair = &scores[n].values[2 * half];
        for (int i = 0; i < 2; ++i) pair[i] = exp2_approx(pair[i] * log2_scale - shift[half]);
        sum[half] += pair[0] + pair[1];
    });
}

/// The logarithms of the sums of the 16 rows from `first` on. Of rows r and r + 8: log2 of what exponentials are
/// relative to, and their sum.
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

// Between global memory, shared memory and registers.

/// The first element of a (batch, head).
template <typename T>
GPSA_DEVICE Global<T> rows_of(const Tensor& t, int64_t batch, int head) {
    return Global<T>(static_cast<T*>(t.data)) + (batch * t.batch + head * t.head);
}

/// Where sum `n` of a head goes in a slot of `sums`: the weights' of all heads, then the gates'.
GPSA_DEVICE Global<float> sum_of(float* sums, int64_t slot, int heads, int head, int n) {
    return Global<float>(sums) + (4 * slot * heads + (n < 3 ? 3 * head + n : 3 * heads + head));
}

/// How threads share out rows of chunks: `beside` lanes take a group of a row's chunks, and the same of its other
/// groups, which are `step` elements apart in shared and in global memory alike: one address serves them all.
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

/// Starts copying `count` tokens of a (batch, head) into rows; zeros from head_dim on and in rows `count` to `padded`.
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

/// Accumulated rows row to row + 15, those below `size`, rounded, where `at(row, chunk)` says in shared memory.
template <typename E, int channels, typename At>
GPSA_DEVICE void stage_rows(const Sum* sums, int row, int size, At at) {
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

/// 16 tokens from `first` on, as far as tokens and channels exist, from where `at(token, chunk)` says to global memory,
/// 16 bytes a lane of this warp.
template <int channels, typename E, typename At>
GPSA_DEVICE void store_rows(Global<E> to, int64_t stride, int first, int tokens, int head_dim, At at) {
    using Share = ChunkShare<channels / 8>;
    const int chunk = lane() % Share::beside;
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

}  // namespace gpsa
