// The warp-level instructions, with the fragment layouts of the PTX manual (sections on mma.m16n8k16 and ldmatrix).
#include "primitives.h"

#include <vector>

namespace gpsa::emulator {

float to_float(Half x) {
    static const std::vector<float> table = [] {
        std::vector<float> t(1 << 16);
        for (uint32_t bits = 0; bits < t.size(); ++bits) {
            _Float16 value;
            const auto narrow = static_cast<uint16_t>(bits);
            std::memcpy(&value, &narrow, 2);
            t[bits] = static_cast<float>(value);
        }
        return t;
    }();
    return table[x.bits];
}

float to_float(Bfloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

uint16_t round_to(float x, Half) {
    const auto value = static_cast<_Float16>(x);
    uint16_t bits;
    std::memcpy(&bits, &value, 2);
    return bits;
}

uint16_t round_to(float x, Bfloat16) {
    if (std::isnan(x)) return 0x7fff;
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
}

void ldmatrix(void* const* lanes) {
    const auto at = [&](int lane) -> LdmatrixLane& { return *static_cast<LdmatrixLane*>(lanes[lane]); };
    const int matrices = at(0).matrices;
    for (int lane = 0; lane < 32; ++lane) {
        for (int matrix = 0; matrix < matrices; ++matrix) {
            uint16_t pair[2];
            for (int i = 0; i < 2; ++i) {
                int row = lane / 4, column = 2 * (lane % 4) + i;
                if (at(lane).transposed) std::swap(row, column);
                std::memcpy(&pair[i], at(8 * matrix + row).row + 2 * column, 2);
            }
            at(lane).r[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
        }
    }
    uint64_t addresses[32];
    for (int lane = 0; lane < 32; ++lane) addresses[lane] = at(lane).offset;
    count_wavefronts(machine->counters.ldmatrix, addresses, matrices == 4 ? 0xffffffffu : 0xffffu, 16);
}

template <typename T>
void mma(void* const* lanes) {
    const auto at = [&](int lane) -> MmaLane& { return *static_cast<MmaLane*>(lanes[lane]); };
    const auto element = [](uint32_t word, int i) { return to_float(T{static_cast<uint16_t>(word >> 16 * i)}); };
    float a[16][16], b[16][8], c[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const int r = lane / 4, t = lane % 4 * 2;
        for (int i = 0; i < 2; ++i) {
            for (int n = 0; n < 4; ++n) a[r + 8 * (n % 2)][t + i + 8 * (n / 2)] = element(at(lane).a[n], i);
            for (int n = 0; n < 2; ++n) b[t + i + 8 * n][r] = element(at(lane).b[n], i);
            for (int n = 0; n < 2; ++n) c[r + 8 * n][t + i] = at(lane).c[2 * n + i];
        }
    }
    for (int row = 0; row < 16; ++row) {
        for (int k = 0; k < 16; ++k) {
            for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        const int r = lane / 4, t = lane % 4 * 2;
        for (int n = 0; n < 2; ++n) {
            for (int i = 0; i < 2; ++i) at(lane).c[2 * n + i] = c[r + 8 * n][t + i];
        }
    }
    ++machine->counters.mma;
}

template void mma<Half>(void* const*);
template void mma<Bfloat16>(void* const*);

void shuffle_xor(void* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
        auto& self = *static_cast<ShuffleLane*>(lanes[lane]);
        self.result = static_cast<const ShuffleLane*>(lanes[lane ^ self.mask])->value;
    }
}

}  // namespace gpsa::emulator
