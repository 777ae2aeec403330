// The host's side of csrc/primitives.h: the same names, carried out and checked by the emulator. Fragments are laid out
// as the PTX manual says (sections on mma.m16n8k16 and ldmatrix).
#pragma once

#include <cmath>

#include "emulator.h"

#define GPSA_DEVICE inline
#define GPSA_HOST_DEVICE inline

namespace gpsa {

inline int thread() { return emulator::here.thread; }
inline int threads() { return emulator::here.threads; }
inline int lane() { return thread() % 32; }
inline int block_x() { return emulator::here.block_x; }
inline int block_y() { return emulator::here.block_y; }

// Memory. The pointers can be read and written by as many bytes as a V has, and in no other way.

template <typename T>
class Shared;

template <typename T>
class Global {
public:
    explicit Global(T* p) : region(emulator::region(p)), pointer(p) {}
    Global operator+(int64_t elements) const { return Global(region, pointer + elements); }

    template <typename V>
    V read() const {
        emulator::global_read(*region, pointer, sizeof(V));
        V value;
        std::memcpy(&value, pointer, sizeof(V));
        return value;
    }
    template <typename V>
    void write(const V& value) const {
        emulator::global_write(*region, pointer, sizeof(V));
        std::memcpy(pointer, &value, sizeof(V));
    }
    void copy_to(Shared<std::remove_const_t<T>> to, bool valid) const {
        emulator::copy_async(to.address, *region, pointer, valid);
    }

private:
    Global(emulator::Region* r, T* p) : region(r), pointer(p) {}
    emulator::Region* region;
    T* pointer;
};

template <typename T>
class Shared {
public:
    Shared operator+(int elements) const {
        Shared moved = *this;
        moved.address.offset += elements * int64_t(sizeof(T));
        return moved;
    }

    template <typename V>
    V read() const {
        V value;
        std::memcpy(&value, emulator::shared_read(address, sizeof(V)), sizeof(V));
        return value;
    }
    template <typename V>
    void write(const V& value) const {
        std::memcpy(emulator::shared_write(address, sizeof(V)), &value, sizeof(V));
    }
    void read_matrices(uint32_t (&r)[4], bool transposed) const;

private:
    friend class Global<T>;
    friend class Global<const T>;
    friend class SharedMemory;
    explicit Shared(emulator::SharedAddress a) : address(a) {}
    emulator::SharedAddress address;
};

class SharedMemory {
public:
    template <typename T>
    Shared<T> array(int count, const char* name) {
        const int begin = next, bytes = count * int(sizeof(T));
        next = emulator::allocate_shared(begin, bytes, name);
        return Shared<T>({begin, begin + bytes, begin});
    }

private:
    int next = 0;
};

inline float load(Global<const float> from) { return from.read<float>(); }
inline int64_t load(Global<const int64_t> from) { return from.read<int64_t>(); }
inline float load(Shared<float> from) { return from.read<float>(); }
inline void store(Global<float> to, float value) { to.write(value); }
inline void store(Shared<float> to, float value) { to.write(value); }

template <typename T>
Chunk load_chunk(Global<const T> from) {
    return from.template read<Chunk>();
}
template <typename T>
Chunk load_chunk(Shared<T> from) {
    return from.template read<Chunk>();
}
template <typename T>
void store_chunk(Global<T> to, const Chunk& value) {
    to.write(value);
}
template <typename T>
void store_chunk(Shared<T> to, const Chunk& value) {
    to.write(value);
}
template <typename T>
uint32_t load_pair(Shared<T> from) {
    return from.template read<uint32_t>();
}
template <typename T>
void store_pair(Shared<T> to, uint32_t value) {
    to.write(value);
}

template <typename T>
void copy_async(Shared<T> to, Global<const T> from, bool valid) {
    from.copy_to(to, valid);
}
inline void copy_commit() { emulator::copy_commit(); }
template <int pending>
void copy_wait() {
    emulator::copy_wait(pending);
}

// Barriers, and warp-level instructions: the last lane to arrive acts for all.

inline void sync_block() { emulator::sync_block(); }
inline void sync_warp() { emulator::sync_warp(); }

inline int warp() {
    emulator::rendezvous("warp()");
    return thread() / 32;
}

inline float shuffle_xor(float value, int mask) {
    struct Lane {
        float value, result;
        int mask;
    } own{value, 0, mask};
    emulator::collective("shuffle_xor", own, [](const auto& lanes) {
        for (int i = 0; i < 32; ++i) lanes[i]->result = lanes[i ^ lanes[i]->mask]->value;
    });
    return own.result;
}

inline bool any_lane(bool condition) {
    struct Lane {
        bool condition, result;
    } own{condition, false};
    emulator::collective("any_lane", own, [](const auto& lanes) {
        const bool any = std::any_of(lanes.begin(), lanes.end(), [](const Lane* lane) { return lane->condition; });
        for (Lane* lane : lanes) lane->result = any;
    });
    return own.result;
}

template <typename T>
void Shared<T>::read_matrices(uint32_t (&r)[4], bool transposed) const {
    struct Lane {
        const char* row;
        uint64_t offset;
        uint32_t* r;
    } own{emulator::shared_read(address, 16, false), static_cast<uint64_t>(address.offset), r};
    emulator::collective(transposed ? "ldmatrix.trans" : "ldmatrix", own, [transposed](const auto& lanes) {
        uint64_t addresses[32];
        for (int i = 0; i < 32; ++i) {
            addresses[i] = lanes[i]->offset;
            for (int matrix = 0; matrix < 4; ++matrix) {
                uint16_t pair[2];
                for (int part = 0; part < 2; ++part) {
                    int row = i / 4, column = 2 * (i % 4) + part;
                    if (transposed) std::swap(row, column);
                    std::memcpy(&pair[part], lanes[8 * matrix + row]->row + 2 * column, 2);
                }
                lanes[i]->r[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
            }
        }
        emulator::count_access(emulator::counters.ldmatrix, addresses, 0xffffffffu, 16);
    });
}

template <typename T>
void ldmatrix_x4(uint32_t (&r)[4], Shared<T> row) {
    row.read_matrices(r, false);
}
template <typename T>
void ldmatrix_x4_trans(uint32_t (&r)[4], Shared<T> row) {
    row.read_matrices(r, true);
}

// Arithmetic.

inline float to_float(Bfloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float to_float(Half x) {
    static const std::vector<float> table = [] {  // to convert them takes long without F16C
        std::vector<float> t(1 << 16);
        for (uint32_t bits = 0; bits < t.size(); ++bits) {
            _Float16 value;
            std::memcpy(&value, &bits, 2);
            t[bits] = static_cast<float>(value);
        }
        return t;
    }();
    return table[x.bits];
}

inline uint16_t round_to(float x, Half) {
    const auto value = static_cast<_Float16>(x);
    uint16_t bits;
    std::memcpy(&bits, &value, 2);
    return bits;
}

inline uint16_t round_to(float x, Bfloat16) {
    if (std::isnan(x)) return 0x7fff;
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
}

template <typename T>
uint32_t pack(float low, float high) {
    return round_to(low, T{}) | static_cast<uint32_t>(round_to(high, T{})) << 16;
}
template <typename T>
Pair unpack(uint32_t word) {
    return {to_float(T{static_cast<uint16_t>(word)}), to_float(T{static_cast<uint16_t>(word >> 16)})};
}

template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Lane {
        float* c;
        const uint32_t* a;
        uint32_t b[2];
    } own{c, a, {b0, b1}};
    emulator::collective("mma", own, [](const auto& lanes) {
        float a[16][16], b[16][8], c[16][8];
        const auto unpacked = [](uint32_t word, float* low, float* high) {
            const Pair pair = unpack<T>(word);
            *low = pair.low;
            *high = pair.high;
        };
        for (int i = 0; i < 32; ++i) {
            const int r = i / 4, t = i % 4 * 2;
            for (int n = 0; n < 4; ++n) {
                float* const at = &a[r + 8 * (n % 2)][t + 8 * (n / 2)];
                unpacked(lanes[i]->a[n], at, at + 1);
                c[r + 8 * (n / 2)][t + n % 2] = lanes[i]->c[n];
            }
            for (int n = 0; n < 2; ++n) unpacked(lanes[i]->b[n], &b[t + 8 * n][r], &b[t + 1 + 8 * n][r]);
        }
        for (int row = 0; row < 16; ++row) {
            for (int k = 0; k < 16; ++k) {
                for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
            }
        }
        for (int i = 0; i < 32; ++i) {
            for (int n = 0; n < 4; ++n) lanes[i]->c[n] = c[i / 4 + 8 * (n / 2)][i % 4 * 2 + n % 2];
        }
        ++emulator::counters.mma;
    });
}

inline float flush_to_zero(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }

inline float exp2_approx(float x) {
    ++emulator::counters.exp2;
    return flush_to_zero(std::exp2(flush_to_zero(x)));
}
inline float log2_approx(float x) { return std::log2(flush_to_zero(x)); }
inline float reciprocal_approx(float x) { return flush_to_zero(1 / flush_to_zero(x)); }
inline float maximum(float a, float b) { return std::fmax(a, b); }
inline int kept(int number) { return number; }

}  // namespace gpsa
