// The host's side of csrc/primitives.h: the same names, carried out and checked by the emulator.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"

#define GPSA_DEVICE inline
#define GPSA_HOST_DEVICE inline

namespace gpsa {

inline int thread() { return emulator::machine->thread_index(); }
inline int threads() { return emulator::machine->thread_count(); }
inline int lane() { return thread() % 32; }
inline int block_x() { return emulator::machine->block_x(); }
inline int block_y() { return emulator::machine->block_y(); }

struct Access;  // the functions of this file, behind the pointers' backs

template <typename T>
class Global {
public:
    explicit Global(T* p) : region(emulator::machine->region(p).get()), pointer(p) {}
    Global operator+(int64_t elements) const { return Global(region, pointer + elements); }

private:
    friend Access;
    Global(emulator::Region* r, T* p) : region(r), pointer(p) {}
    emulator::Region* region;
    T* pointer;
};

template <typename T>
class Shared {
public:
    Shared operator+(int elements) const { return Shared(begin, end, offset + elements * int64_t(sizeof(T))); }

private:
    friend Access;
    friend class SharedMemory;
    Shared(int b, int e, int64_t o) : begin(b), end(e), offset(o) {}
    int begin, end;  // the array it may point into
    int64_t offset;
};

class SharedMemory {
public:
    template <typename T>
    Shared<T> array(int count, const char* name) {
        const int begin = next, bytes = count * int(sizeof(T));
        next = emulator::machine->allocate_shared(begin, bytes, name);
        return Shared<T>(begin, begin + bytes, begin);
    }

private:
    int next = 0;
};

struct Access {
    template <typename V, typename T>
    static V load(Global<T> from) {
        emulator::machine->global_read(*from.region, from.pointer, sizeof(V));
        V value;
        std::memcpy(&value, from.pointer, sizeof(V));
        return value;
    }
    template <typename V, typename T>
    static void store(Global<T> to, const V& value) {
        emulator::machine->global_write(*to.region, to.pointer, sizeof(V));
        std::memcpy(to.pointer, &value, sizeof(V));
    }
    template <typename V, typename T>
    static V load(Shared<T> from) {
        V value;
        std::memcpy(&value, emulator::machine->shared_read(from.offset, from.begin, from.end, sizeof(V)), sizeof(V));
        emulator::machine->log_shared(false, from.offset, sizeof(V));
        return value;
    }
    template <typename V, typename T>
    static void store(Shared<T> to, const V& value) {
        std::memcpy(emulator::machine->shared_write(to.offset, to.begin, to.end, sizeof(V)), &value, sizeof(V));
        emulator::machine->log_shared(true, to.offset, sizeof(V));
    }
    template <typename T>
    static void copy_async(Shared<T> to, Global<const T> from, bool valid) {
        emulator::machine->copy_async(to.offset, to.begin, to.end, *from.region, from.pointer, valid);
    }
    template <int matrices, bool transposed, typename T>
    static void ldmatrix(uint32_t (&r)[matrices], Shared<T> row);
};

inline float load(Global<const float> from) { return Access::load<float>(from); }
inline int64_t load(Global<const int64_t> from) { return Access::load<int64_t>(from); }
inline void store(Global<float> to, float value) { Access::store(to, value); }
inline float load(Shared<float> from) { return Access::load<float>(from); }
inline void store(Shared<float> to, float value) { Access::store(to, value); }

template <typename T>
Chunk load_chunk(Global<const T> from) {
    return Access::load<Chunk>(from);
}
template <typename T>
void store_chunk(Global<T> to, const Chunk& value) {
    Access::store(to, value);
}
template <typename T>
Chunk load_chunk(Shared<T> from) {
    return Access::load<Chunk>(from);
}
template <typename T>
void store_chunk(Shared<T> to, const Chunk& value) {
    Access::store(to, value);
}
template <typename T>
uint32_t load_pair(Shared<T> from) {
    return Access::load<uint32_t>(from);
}
template <typename T>
void store_pair(Shared<T> to, uint32_t value) {
    Access::store(to, value);
}
template <typename T>
void copy_async(Shared<T> to, Global<const T> from, bool valid) {
    Access::copy_async(to, from, valid);
}
inline void copy_commit() { emulator::machine->copy_commit(); }
template <int pending>
void copy_wait() {
    emulator::machine->copy_wait(pending);
}

inline void sync_block() { emulator::machine->barrier(0, threads(), "sync_block"); }
inline void sync_warp() { emulator::machine->collective("sync_warp", nullptr, nullptr); }

namespace emulator {

struct LdmatrixLane {
    const char* row;  // 16 bytes, null where the address is not looked at
    uint64_t offset;
    uint32_t* r;
    int matrices;
    bool transposed;
};
void ldmatrix(void* const* lanes);

struct MmaLane {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
};
template <typename T>
void mma(void* const* lanes);

struct ShuffleLane {
    float value, result;
    int mask;
};
void shuffle_xor(void* const* lanes);

struct VoteLane {
    bool condition, result;
};
void any_lane(void* const* lanes);

float to_float(Half x);
float to_float(Bfloat16 x);
uint16_t round_to(float x, Half);
uint16_t round_to(float x, Bfloat16);

}  // namespace emulator

template <int matrices, bool transposed, typename T>
void Access::ldmatrix(uint32_t (&r)[matrices], Shared<T> row) {
    emulator::LdmatrixLane lane{nullptr, static_cast<uint64_t>(row.offset), r, matrices, transposed};
    if (gpsa::lane() < 8 * matrices) lane.row = emulator::machine->shared_read(row.offset, row.begin, row.end, 16);
    emulator::machine->collective(transposed ? "ldmatrix.trans" : "ldmatrix", emulator::ldmatrix, &lane);
}

template <typename T>
void ldmatrix_x4(uint32_t (&r)[4], Shared<T> row) {
    Access::ldmatrix<4, false>(r, row);
}
template <typename T>
void ldmatrix_x4_trans(uint32_t (&r)[4], Shared<T> row) {
    Access::ldmatrix<4, true>(r, row);
}

template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::MmaLane lane{c, a, {b0, b1}};
    emulator::machine->collective("mma", emulator::mma<T>, &lane);
}

inline float shuffle_xor(float value, int mask) {
    emulator::ShuffleLane lane{value, 0, mask};
    emulator::machine->collective("shuffle_xor", emulator::shuffle_xor, &lane);
    return lane.result;
}

inline bool any_lane(bool condition) {
    emulator::VoteLane lane{condition, false};
    emulator::machine->collective("any_lane", emulator::any_lane, &lane);
    return lane.result;
}

inline int warp() {
    emulator::machine->rendezvous("warp()", nullptr);
    return thread() / 32;
}

inline float flush_to_zero(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }

inline float exp2_approx(float x) {
    ++emulator::machine->counters.exp2;
    return flush_to_zero(std::exp2(flush_to_zero(x)));
}
inline float log2_approx(float x) { return std::log2(flush_to_zero(x)); }
inline float reciprocal_approx(float x) { return flush_to_zero(1 / flush_to_zero(x)); }
inline float maximum(float a, float b) { return std::fmax(a, b); }
inline int kept(int number) { return number; }

template <typename T>
uint32_t pack(float low, float high) {
    return emulator::round_to(low, T{}) | static_cast<uint32_t>(emulator::round_to(high, T{})) << 16;
}
template <typename T>
Pair unpack(uint32_t word) {
    const auto half = [](uint32_t bits) { return emulator::to_float(T{static_cast<uint16_t>(bits)}); };
    return {half(word), half(word >> 16)};
}

}  // namespace gpsa
