// Attention dropout: which entries of the attention map are kept.
//
// A decision depends on the seed, on batch * heads + head, on the query and on the key, and on nothing else: every
// kernel draws the same mask, whatever its tiles. One call of Philox4x32-10 decides for the four entries (i, j),
// (i, j + 8), (i + 8, j), (i + 8, j + 8) of a (16, 16) tile: in accumulators of scores and of transposed scores alike,
// one lane holds all four.
//
// Philox: Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011.
#pragma once

#include "gpsa.h"
#include "tiles.cuh"

namespace gpsa {

struct Words {
    uint32_t w[4];
};

GPSA_DEVICE Words philox(Words counter, uint32_t key_low, uint32_t key_high) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t{0xd2511f53} * counter.w[0], b = uint64_t{0xcd9e8d57} * counter.w[2];
        counter = {
            {uint32_t(b >> 32) ^ counter.w[1] ^ key_low, uint32_t(b), uint32_t(a >> 32) ^ counter.w[3] ^ key_high,
             uint32_t(a)}};
        key_low += 0x9e3779b9;
        key_high += 0xbb67ae85;
    }
    return counter;
}

/// The mask of one (batch, head).
class Dropout {
public:
    const float keep_scale;  // 1 / (1 - p); 0 where nothing is kept

    GPSA_DEVICE Dropout(const Problem& problem, int64_t batch_head)
        : keep_scale(problem.dropout_p < 1 ? 1 / (1 - problem.dropout_p) : 0),
          // a power of two times a float is exact, and so is its whole part for p >= 2^-8; below, p is off by 2^-31
          threshold(uint32_t(problem.dropout_p * 0x1p31f)),
          seed(uint64_t(load(Global<const int64_t>(problem.seed)))),
          batch_head(uint64_t(batch_head)) {}

    /// Of the (16, 16) tile of scores that begins at (query, key), multiples of 16: whether this lane's elements are
    /// kept, bit 4 n + i for values[i] of the n-th of its two accumulators.
    GPSA_DEVICE uint32_t keep(int query, int key) const { return draw<false>(query, key); }
    /// The same of the transposed scores, keys their rows.
    GPSA_DEVICE uint32_t keep_transposed(int query, int key) const { return draw<true>(query, key); }

private:
    const uint32_t threshold;  // 2^31 p
    const uint64_t seed, batch_head;

    template <bool transposed>
    GPSA_DEVICE uint32_t draw(int query, int key) const {
        uint32_t bits = 0;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int row = fragment_row(), column = fragment_column() + c;
            const Words words = philox(
                {{uint32_t(query + (transposed ? column : row)), uint32_t(key + (transposed ? row : column)),
                  uint32_t(batch_head), uint32_t(batch_head >> 32)}},
                uint32_t(seed), uint32_t(seed >> 32));
#pragma unroll
            for (int i = 0; i < 4; ++i) {  // (query, key), (query, key + 8), (query + 8, key), (query + 8, key + 8)
                const int query_half = i / 2, key_half = i % 2;
                const int bit = transposed ? 4 * query_half + 2 * key_half : 4 * key_half + 2 * query_half;
                bits |= kept(words.w[i]) << (bit + c);
            }
        }
        return bits;
    }
    GPSA_DEVICE uint32_t kept(uint32_t word) const { return (word >> 1) >= threshold; }
};

}  // namespace gpsa
