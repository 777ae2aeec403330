// What every primitive does, lane by lane, as words on stdout, by every warp of several blocks. One program for both
// sides of csrc/primitives.h: compiled by nvcc it runs on a GPU, by g++ on the emulator; test_primitives.py checks
// both.
//
// Reads 256 elements of 16 bits from stdin: four 8x8 matrices. `conformance float16` or `conformance bfloat16`.
#include <cstdio>
#include <cstring>

#include "primitives.h"

using namespace gpsa;

constexpr int elements = 256, lanes = 32, records = 15;
constexpr int blocks_x = 2, blocks_y = 3, warps = 3;

/// Where this lane's four words of a record are.
GPSA_DEVICE int place(int index) {
    return ((((block_y() * blocks_x + block_x()) * warps + warp()) * records + index) * lanes + lane()) * 4;
}

GPSA_DEVICE uint32_t bits(uint32_t word) { return word; }
GPSA_DEVICE uint32_t bits(int number) { return number; }
GPSA_DEVICE uint32_t bits(float x) {
    uint32_t word;
    memcpy(&word, &x, 4);
    return word;
}

/// Up to four words; those that are missing are 0.
template <typename... Words>
GPSA_DEVICE void record(uint32_t* out, int index, Words... words) {
    store_chunk<uint32_t>(Global<uint32_t>(out) + place(index), Chunk{{bits(words)...}});
}

template <typename E>
GPSA_DEVICE void conformance(const E* in, uint32_t* out) {
    SharedMemory memory;
    const Shared<E> tile = memory.array<E>(warps * elements, "tile") + warp() * elements;
    const Shared<E> copied = memory.array<E>(warps * elements, "copied") + warp() * elements;
    const Shared<float> numbers = memory.array<float>(warps * lanes, "numbers");

    copy_async<E>(tile + 8 * lane(), Global<const E>(in) + 8 * lane(), true);
    copy_commit();
    copy_async<E>(copied + 8 * lane(), Global<const E>(in) + 8 * lane(), lane() % 2 == 0);
    copy_commit();
    copy_wait<1>();
    sync_warp();

    uint32_t a[4], t[4];
    ldmatrix_x4<E>(a, tile + 8 * lane());
    ldmatrix_x4_trans<E>(t, tile + 8 * lane());
    record(out, 0, a[0], a[1], a[2], a[3]);
    record(out, 1, t[0], t[1], t[2], t[3]);

    float c[4] = {1, 2, 3, 4};
    mma<E>(c, a, a[0], a[1]);
    record(out, 2, c[0], c[1], c[2], c[3]);

    const float own = static_cast<float>(lane());
    record(out, 3, shuffle_xor(own, 1), shuffle_xor(own, 2), shuffle_xor(own, 8), shuffle_xor(own, 16));

    const Pair x = unpack<E>(load_pair<E>(tile + 2 * lane()));
    record(out, 4, load_pair<E>(tile + 2 * lane()), x.low, x.high, pack<E>(x.low, x.high));
    record(
        out, 5, pack<E>(x.low / 3, x.high / 3), pack<E>(x.high * 1e30f, 1e-30f * x.low), maximum(x.low, x.high),
        maximum(x.low, __builtin_nanf("")));
    record(out, 6, exp2_approx(x.low), exp2_approx(x.high), exp2_approx(-INFINITY), exp2_approx(-140.0f));
    record(
        out, 7, log2_approx(x.low * x.low), log2_approx(1 + own), log2_approx(0.0f),
        kept(any_lane(own == 5) + 2 * any_lane(own < 0)));

    store(numbers + thread(), static_cast<float>(thread()));
    sync_block();
    record(out, 8, load(numbers + (threads() - 1 - thread())));
    copy_wait<0>();
    sync_warp();
    const Chunk half_copied = load_chunk<E>(copied + 8 * lane());
    record(out, 9, half_copied.words[0], half_copied.words[1], half_copied.words[2], half_copied.words[3]);

    sync_warp();
    store_pair<E>(tile + 8 * lane(), pack<E>(own, own + 1));
    store_chunk<E>(copied + 8 * lane(), load_chunk<E>(Global<const E>(in) + 8 * (31 - lane())));
    const Chunk chunk = load_chunk<E>(copied + 8 * lane());
    record(out, 10, load_pair<E>(tile + 8 * lane()), chunk.words[0], chunk.words[1], chunk.words[3]);

    record(out, 11, thread(), threads(), lane(), warp());
    const int64_t wide = load(Global<const int64_t>(reinterpret_cast<const int64_t*>(in)) + lane());
    record(out, 12, block_x(), block_y(), static_cast<uint32_t>(wide), static_cast<uint32_t>(wide >> 32));
    const Global<float> to = Global<float>(reinterpret_cast<float*>(out)) + place(13);
    store(to, load(Global<const float>(reinterpret_cast<const float*>(in)) + lane()));
    for (int n = 1; n < 4; ++n) store(to + n, own + n);

    record(
        out, 14, reciprocal_approx(x.low), reciprocal_approx(INFINITY), reciprocal_approx(3e38f),
        reciprocal_approx(0.0f));
}

constexpr int shared_bytes = warps * (2 * elements * 2 + lanes * 4);
constexpr int words = blocks_x * blocks_y * warps * records * lanes * 4;

#ifdef __CUDACC__

template <typename E>
__global__ void kernel(const E* in, uint32_t* out) {
    conformance<E>(in, out);
}

template <typename E>
bool run(const uint16_t* input, uint32_t* output) {
    E* in = nullptr;
    uint32_t* out = nullptr;
    cudaMalloc(&in, elements * 2);
    cudaMalloc(&out, words * 4);
    cudaMemcpy(in, input, elements * 2, cudaMemcpyHostToDevice);
    kernel<E><<<dim3(blocks_x, blocks_y), warps * lanes, shared_bytes>>>(in, out);
    cudaMemcpy(output, out, words * 4, cudaMemcpyDeviceToHost);
    const cudaError_t error = cudaDeviceSynchronize();
    if (error != cudaSuccess) fprintf(stderr, "%s\n", cudaGetErrorString(error));
    return error == cudaSuccess;
}

#else

template <typename E>
bool run(const uint16_t* input, uint32_t* output) {
    emulator::begin();
    emulator::know("in", emulator::Use::input, input, 2, {elements}, {1});
    emulator::know("out", emulator::Use::output, output, 4, {words}, {1});
    emulator::launch(blocks_x, blocks_y, warps * lanes, shared_bytes, [&] {
        conformance<E>(reinterpret_cast<const E*>(input), output);
    });
    emulator::finish();
    return true;
}

#endif

int main(int count, char** arguments) {
    alignas(16) static uint16_t input[elements];
    alignas(16) static uint32_t output[words];
    if (count != 2 || fread(input, 2, elements, stdin) != elements) return 2;
    const bool half = strcmp(arguments[1], "float16") == 0;
    if (!(half ? run<Half>(input, output) : run<Bfloat16>(input, output))) return 1;
    return fwrite(output, 4, words, stdout) == words ? 0 : 1;
}
