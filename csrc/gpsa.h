// What the kernels are given and how they are launched. No torch header: csrc/register.cpp fills these structs in.
//
// Nothing is allocated inside. Everything runs on the given stream of the current device, can be captured in a CUDA
// graph, and repeats bit for bit: every element of a result is written by one thread, in a fixed order of sums.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime_api.h>
#else
using cudaStream_t = struct CUstream_st*;
#endif

namespace gpsa {

enum class Dtype { float16, bfloat16 };

/// A (B, H, N, D) tensor of 16-bit elements: strides in elements, channels contiguous, rows at multiples of 16 bytes.
struct Tensor {
    void* data;
    int64_t batch, head, token;
};

struct Problem {
    int64_t batch;
    int heads, rows, columns, head_dim;  // the grid of rows x columns tokens, row by row
    float scale;
    float dropout_p;
    const int64_t* seed;  // one number in device memory, null without dropout
    Dtype dtype;
};

struct Forward {
    Problem problem;
    Tensor q, k, v;
    const float* pos_weight;  // (H, 3)
    const float* gate;        // (H,)
    Tensor out;
    Tensor content;    // the content branch alone, which backward may read; data null: not wanted
    float* logsumexp;  // (B, H, N), of the scaled scores, natural logarithm; null: not wanted
    void* workspace;
};

struct Backward {
    Problem problem;
    Tensor grad_out, q, k, v;
    const float* pos_weight;
    const float* gate;
    Tensor content;
    const float* logsumexp;
    Tensor grad_q, grad_k, grad_v;
    /// (B, Sizes::slots, 4 H): g <dO, (dR/dw) V> for w0, w1, w2 of each head, then g (1 - g) <dO, O_pos - O_content>
    float* sums;
    void* workspace;
};

/// What a caller allocates, and whether it saves `content` for backward.
struct Sizes {
    int slots;                    // of `sums`, for a batch element
    int64_t inference_workspace;  // bytes, of a forward call that saves nothing
    int64_t forward_workspace;    // of one that saves what backward reads
    int64_t backward_workspace;
    bool content;
};

/// For launches on a device; where there is none, as for an H100.
Sizes sizes(const Problem& problem, int device);

/// Null, or why not everything was launched, until this thread's next call.
const char* launch_forward(const Forward& call, cudaStream_t stream);
const char* launch_backward(const Backward& call, cudaStream_t stream);

}  // namespace gpsa
