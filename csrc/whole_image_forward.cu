// Launches the whole-image forward kernels.
#include "launch.h"
#include "whole_image_forward.cuh"

namespace gpsa {
namespace {

// Three blocks of 14 x 14 x 48 fit in 228 KiB of shared memory, if a thread has 168 registers at most.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
constexpr int most_blocks = 3;
#else
constexpr int most_blocks = 2;
#endif

template <typename Kernel>
constexpr int blocks_per_multiprocessor =
    Kernel::channels > 64                                                                   ? 1
    : Kernel::key_tiles == 4                                                                ? 3
    : Kernel::channels == 48 && Kernel::key_tiles == 13 && !Kernel::has_dropout ? most_blocks
                                                                                            : 2;

template <typename Kernel>
__global__ void __launch_bounds__(whole_image_threads, blocks_per_multiprocessor<Kernel>)
    whole_image_forward(const __grid_constant__ Forward call, int parts) {
    Kernel::run(call, parts);
}

}  // namespace

const char* launch_whole_image_forward(const Forward& call, cudaStream_t stream) {
    return whole_image::dispatch_forward(call.problem, [&](auto kernel) {
        using Kernel = decltype(kernel);
        const Device device = Device::current();
        const int parts = whole_image::parts(call.problem, device.multiprocessors);
        const dim3 grid(static_cast<unsigned>(call.problem.batch * call.problem.heads), parts);
        return launch(
            whole_image_forward<Kernel>, grid, whole_image_threads, Kernel::shared_bytes(call.problem, parts), device,
            stream, call, parts);
    });
}

}  // namespace gpsa
