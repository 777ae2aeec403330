// How a tiled kernel is launched.
#pragma once

#include "launch.h"
#include "tiled.h"

namespace gpsa {

// With the registers of three blocks a multiprocessor, the forward kernel for 48 channels spills on sm_100.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <typename Kernel>
constexpr int least_blocks = Kernel::blocks_per_multiprocessor == 3 ? 2 : Kernel::blocks_per_multiprocessor;
#else
template <typename Kernel>
constexpr int least_blocks = Kernel::blocks_per_multiprocessor;
#endif

template <typename Kernel>
__global__ void __launch_bounds__(tiled_threads, least_blocks<Kernel>)
    tiled_kernel(const __grid_constant__ typename Kernel::Call call) {
    Kernel::run(call);
}

/// Launches a kernel for a call, with the blocks and the shared memory that it asks for.
struct TiledLauncher {
    const Launcher& launch;

    template <typename Kernel>
    const char* operator()(Kernel kernel, const typename Kernel::Call& call) const {
        const int64_t blocks = Kernel::blocks(call);
        if (blocks > 0x7fffffff) return "the problem needs more than 2^31 blocks";
        const auto entry = [](auto k) { return tiled_kernel<decltype(k)>; };
        return launch(kernel, entry, dim3(static_cast<unsigned>(blocks)), tiled_threads, Kernel::shared_bytes(), call);
    }
};

}  // namespace gpsa
