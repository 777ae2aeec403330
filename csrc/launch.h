// What the launchers share. Host code of nvcc only.
#pragma once

#include <cuda_runtime.h>

#include "gpsa.h"

namespace gpsa {

struct Device {
    int multiprocessors = 0, shared_bytes = 0;  // shared_bytes: the most that one block can ask for

    /// Zeros where there is no such device.
    static Device of(int index) {
        Device device;
        if (index < 0) return device;
        cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
        cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
        return device;
    }
    static Device current() {
        int index = 0;
        return cudaGetDevice(&index) == cudaSuccess ? of(index) : Device{};
    }
};

/// Null, or why the kernel was not launched.
template <typename... Parameters, typename... Arguments>
const char* launch(
    void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, const Device& device, cudaStream_t stream,
    const Arguments&... arguments) {
    if (shared_bytes > device.shared_bytes) return "the problem needs more shared memory than this GPU has";
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error == cudaSuccess) {
        kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
        error = cudaGetLastError();
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* launch_whole_image_forward(const Forward& call, cudaStream_t stream);
const char* launch_tiled_forward(const Forward& call, cudaStream_t stream);
const char* launch_tiled_backward(const Backward& call, cudaStream_t stream);
const char* launch_whole_image_backward(const Backward& call, cudaStream_t stream);

/// Whether the whole-image backward kernels serve a problem on this device.
bool whole_image_backward_fits(const Problem& problem, const Device& device);

}  // namespace gpsa
