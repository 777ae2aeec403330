// What the launchers share. Host code of nvcc only.
#pragma once

#include <cuda_runtime.h>

#include "gpsa.h"

namespace gpsa {

struct Device {
    int multiprocessors = 0, shared_bytes = 0;  // shared_bytes: the most that one block can ask for

    static Device current() {
        Device device;
        int index = 0;
        if (cudaGetDevice(&index) == cudaSuccess) {
            cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
            cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
        }
        return device;
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

}  // namespace gpsa
