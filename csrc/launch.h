// The launchers' only door to the machine, as primitives.h is the kernels'; and what one launcher knows of another.
// Compiled for the host (the tests do it), find_device and Launcher come from tests/cuda/emulator/launch_host.h.
#pragma once

#include "gpsa.h"

namespace gpsa {

/// What decides which kernels serve a problem.
struct Device {
    int multiprocessors, shared_bytes;  // shared_bytes: the most that one block can ask for
};

/// How a kernel is launched: blocks in x and y, threads and bytes of shared memory of each.
struct Shape {
    int64_t blocks;
    int threads, shared_bytes, blocks_y = 1;
};

}  // namespace gpsa

#ifndef __CUDACC__
#include "launch_host.h"
#else

#include <cuda_runtime.h>

#include <cstdio>
#include <map>
#include <mutex>
#include <set>
#include <utility>

namespace gpsa {

#ifdef __CUDA_ARCH__
constexpr int architecture = __CUDA_ARCH__;  // 900 for sm_90
#else
constexpr int architecture = 0;
#endif

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::most_threads(architecture), Kernel::least_blocks(architecture))
    gpsa_kernel(const __grid_constant__ typename Kernel::Call call) {
    Kernel::run(call);
}

/// Null, or what failed and why, until this thread's next failure. Nobody else finds it as the last error.
inline const char* failure(const char* what, cudaError_t error) {
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();
    thread_local char message[256];
    snprintf(message, sizeof message, "%s: %s", what, cudaGetErrorString(error));
    return message;
}

/// Null, or why nothing is known of a device. It is asked once.
inline const char* find_device(int index, Device& device) {
    static std::mutex mutex;
    static std::map<int, Device> known;
    const std::lock_guard<std::mutex> lock(mutex);
    if (known.count(index) == 0) {
        const char* error = failure(
            "cudaDevAttrMultiProcessorCount",
            cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index));
        if (error) return error;
        error = failure(
            "cudaDevAttrMaxSharedMemoryPerBlockOptin",
            cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
        if (error) return error;
        known[index] = device;
    }
    device = known[index];
    return nullptr;
}

/// Launches kernels on a stream of the current device.
class Launcher {
public:
    Device device{};
    const char* error;  // why there is no device, or null

    explicit Launcher(cudaStream_t stream) : stream(stream) {
        error = failure("cudaGetDevice", cudaGetDevice(&index));
        if (!error) error = find_device(index, device);
    }

    /// Null, or why the kernel was not launched.
    template <typename Kernel>
    const char* operator()(Kernel, const Shape& shape, const typename Kernel::Call& call) const {
        return start(gpsa_kernel<Kernel>, shape, call);
    }

    template <typename Function, typename Call>
    const char* start(Function* function, const Shape& shape, const Call& call) const {
        if (shape.shared_bytes > 0) {
            if (const char* reason = allow_shared_memory(reinterpret_cast<const void*>(function))) return reason;
        }
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(unsigned(shape.blocks), shape.blocks_y);
        config.blockDim = dim3(shape.threads);
        config.dynamicSmemBytes = shape.shared_bytes;
        config.stream = stream;
        return failure("kernel launch", cudaLaunchKernelEx(&config, function, call));
    }

private:
    const cudaStream_t stream;
    int index = 0;

    /// Allows a kernel what the device has, once, and not what a call asks for: other threads and graphs launch the
    /// kernel with other sizes. The whole carve-out, so that as many blocks share a multiprocessor as can.
    const char* allow_shared_memory(const void* function) const {
        static std::mutex mutex;
        static std::set<std::pair<const void*, int>> allowed;
        const std::lock_guard<std::mutex> lock(mutex);
        if (allowed.count({function, index})) return nullptr;
        cudaFuncAttributes attributes{};
        const char* reason = failure("cudaFuncGetAttributes", cudaFuncGetAttributes(&attributes, function));
        if (reason) return reason;
        const int most = device.shared_bytes - int(attributes.sharedSizeBytes);
        reason = failure(
            "cudaFuncAttributeMaxDynamicSharedMemorySize",
            cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
        if (reason) return reason;
        reason = failure(
            "cudaFuncAttributePreferredSharedMemoryCarveout",
            cudaFuncSetAttribute(
                function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
        if (!reason) allowed.insert({function, index});
        return reason;
    }
};

}  // namespace gpsa
#endif

namespace gpsa {

/// Into how many blocks the whole-image forward kernels split the query rows of a (batch, head); 0: a block would need
/// more shared memory than the device has, or the kernels do not serve the problem at all.
int whole_image_forward_row_blocks(const Problem& problem, const Device& device);

/// Whether the whole-image backward kernels serve a problem on this device.
bool whole_image_backward_fits(const Problem& problem, const Device& device);

const char* launch_whole_image_forward(const Forward& call, int row_blocks, const Launcher& launch);
const char* launch_whole_image_backward(const Backward& call, const Launcher& launch);
const char* launch_tiled_forward(const Forward& call, const Launcher& launch);
const char* launch_tiled_backward(const Backward& call, const Launcher& launch);

}  // namespace gpsa
