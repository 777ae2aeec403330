// The only door from a kernel to the machine: every memory access and every warp-level instruction is here.
//
// Compiled for the host (the tests do it), the same names come from tests/cuda/emulator/primitives_host.h, where every
// thread is a fiber and every access is checked. Kernels hold memory only as Global<T> and Shared<T>, which cannot be
// dereferenced: an access that bypasses this header does not compile.
#pragma once

#include <cstdint>
#include <type_traits>

namespace gpsa {

struct Half {
    uint16_t bits;
};
struct Bfloat16 {
    uint16_t bits;
};
struct alignas(16) Chunk {  // 16 bytes: 8 elements
    uint32_t words[4];
};
struct Pair {
    float low, high;
};

}  // namespace gpsa

#ifndef __CUDACC__
#include "primitives_host.h"
#else

#define GPSA_DEVICE __device__ __forceinline__
#define GPSA_HOST_DEVICE __host__ __device__ __forceinline__

namespace gpsa {

template <typename T>
constexpr bool is_half = std::is_same_v<T, Half>;

// Where this thread is.

GPSA_DEVICE int thread() { return threadIdx.x; }
GPSA_DEVICE int threads() { return blockDim.x; }
GPSA_DEVICE int lane() { return threadIdx.x % 32; }
GPSA_DEVICE int block_x() { return blockIdx.x; }
GPSA_DEVICE int block_y() { return blockIdx.y; }

// Memory.

template <typename T>
class Global {
public:
    T* pointer;
    GPSA_DEVICE explicit Global(T* p) : pointer(p) {}
    GPSA_DEVICE Global operator+(int64_t elements) const { return Global(pointer + elements); }
};

template <typename T>
class Shared {
public:
    uint32_t address;
    GPSA_DEVICE explicit Shared(uint32_t a) : address(a) {}
    GPSA_DEVICE Shared operator+(int elements) const { return Shared(address + elements * int(sizeof(T))); }
};

/// The block's dynamic shared memory, handed out array by array at multiples of 16 bytes.
class SharedMemory {
public:
    GPSA_DEVICE SharedMemory() {
        extern __shared__ uint4 gpsa_shared_memory[];
        next = static_cast<uint32_t>(__cvta_generic_to_shared(gpsa_shared_memory));
    }
    template <typename T>
    GPSA_DEVICE Shared<T> array(int count, const char* /*name, for the host's messages*/) {
        const Shared<T> result(next);
        next += (count * int(sizeof(T)) + 15) / 16 * 16;
        return result;
    }

private:
    uint32_t next;
};

GPSA_DEVICE float load(Global<const float> from) { return *from.pointer; }
GPSA_DEVICE int64_t load(Global<const int64_t> from) { return *from.pointer; }
GPSA_DEVICE void store(Global<float> to, float value) { *to.pointer = value; }

template <typename T>
GPSA_DEVICE Chunk load_chunk(Global<const T> from) {
    return *reinterpret_cast<const Chunk*>(from.pointer);
}

template <typename T>
GPSA_DEVICE void store_chunk(Global<T> to, const Chunk& value) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to.pointer)),
                 "r"(value.words[0]), "r"(value.words[1]), "r"(value.words[2]), "r"(value.words[3])
                 : "memory");
}

GPSA_DEVICE float load(Shared<float> from) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(from.address) : "memory");
    return value;
}

GPSA_DEVICE void store(Shared<float> to, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(to.address), "f"(value) : "memory");
}

/// Two neighbouring 16-bit elements as one word.
template <typename T>
GPSA_DEVICE uint32_t load_pair(Shared<T> from) {
    uint32_t value;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(from.address) : "memory");
    return value;
}

template <typename T>
GPSA_DEVICE void store_pair(Shared<T> to, uint32_t value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to.address), "r"(value) : "memory");
}

template <typename T>
GPSA_DEVICE Chunk load_chunk(Shared<T> from) {
    Chunk c;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(c.words[0]), "=r"(c.words[1]), "=r"(c.words[2]), "=r"(c.words[3])
                 : "r"(from.address)
                 : "memory");
    return c;
}

template <typename T>
GPSA_DEVICE void store_chunk(Shared<T> to, const Chunk& c) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to.address), "r"(c.words[0]), "r"(c.words[1]),
                 "r"(c.words[2]), "r"(c.words[3])
                 : "memory");
}

/// 16 bytes from global to shared memory behind the thread's back, zeros where `valid` is false (nothing is read then).
template <typename T>
GPSA_DEVICE void copy_async(Shared<T> to, Global<const T> from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address),
                 "l"(__cvta_generic_to_global(from.pointer)), "r"(valid ? 16 : 0)
                 : "memory");
}

GPSA_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until at most `pending` of this thread's committed groups are under way. Other threads see them at a barrier.
template <int pending>
GPSA_DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Barriers.

GPSA_DEVICE void sync_block() { __syncthreads(); }
GPSA_DEVICE void sync_warp() { __syncwarp(); }

// Warp-level instructions. All 32 lanes take part.

/// Four 8x8 matrices of 16-bit elements; lanes 8i to 8i+7 give the rows of matrix i. Lane l receives, of each matrix,
/// elements 2(l%4) and 2(l%4)+1 of row l/4 in one word.
template <typename T>
GPSA_DEVICE void ldmatrix_x4(uint32_t (&r)[4], Shared<T> row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row.address)
                 : "memory");
}

/// The same of the transposed matrices.
template <typename T>
GPSA_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], Shared<T> row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row.address)
                 : "memory");
}

/// c += a b, (16, 16) times (16, 8), accumulated in fp32. With r = lane / 4 and t = lane % 4 * 2, a lane holds
/// a: rows r, r+8 of columns t, t+1, then of columns t+8, t+9;  b: rows t, t+1, then t+8, t+9 of column r;
/// c: columns t, t+1 of row r, then of row r+8.
template <typename T>
GPSA_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (is_half<T>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

GPSA_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

/// Whether any lane's condition holds.
GPSA_DEVICE bool any_lane(bool condition) { return __any_sync(0xffffffffu, condition); }

/// This thread's warp. Shuffled, so that the compiler knows it to be the same in all lanes.
GPSA_DEVICE int warp() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }

// Arithmetic of one thread.

GPSA_DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

GPSA_DEVICE float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// 1 / x, 0 where that would be subnormal.
GPSA_DEVICE float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

GPSA_DEVICE float maximum(float a, float b) {
    float y;
    asm("max.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

/// The same number, which the compiler keeps in a register instead of forming it anew where it is used.
GPSA_DEVICE int kept(int number) {
    asm volatile("" : "+r"(number));
    return number;
}

/// Two floats rounded to nearest even and packed, `low` in the lower half of the word.
template <typename T>
GPSA_DEVICE uint32_t pack(float low, float high) {
    uint32_t word;
    if constexpr (is_half<T>) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    }
    return word;
}

template <typename T>
GPSA_DEVICE Pair unpack(uint32_t word) {
    Pair p{__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
    if constexpr (is_half<T>) {
        asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
            : "=f"(p.low), "=f"(p.high)
            : "r"(word));
    }
    return p;
}

}  // namespace gpsa
#endif
