// Launches the whole-image forward kernels.
#include "launch.h"
#include "whole_image_forward.cuh"

namespace gpsa {
namespace {

// Three blocks of 14 x 14 x 48 fit in 228 KiB of shared memory, if a thread has few registers: on sm_100 it spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int most_blocks = 3;
#else
constexpr int most_blocks = 2;
#endif

/// Of a multiprocessor; there are registers for as many.
template <typename Kernel>
constexpr int most_threads =
    whole_image_threads * (Kernel::channels > 64                                                       ? 2
                           : Kernel::key_tiles == 4                                                    ? 3
                           : Kernel::channels == 48 && Kernel::key_tiles == 13 && !Kernel::has_dropout ? most_blocks
                                                                                                       : 2);

template <typename Kernel>
__global__ void __launch_bounds__(most_threads<Kernel>)
    whole_image_forward(const __grid_constant__ Forward call, int row_blocks) {
    Kernel::run(call, row_blocks);
}

constexpr int system_bytes = 1024;  // of shared memory, that every block takes beside its own

/// How many blocks that have all rows of an image share a multiprocessor, as far as shared memory goes.
template <typename Kernel>
int resident(const Problem& problem, const Device& device) {
    return (device.shared_bytes + system_bytes) / (Kernel::shared_bytes(problem, 1) + system_bytes);
}

template <typename Kernel>
int threads_for(const Problem& problem, const Device& device) {
    return resident<Kernel>(problem, device) > 1 ? whole_image_threads : whole_image_threads_alone;
}

}  // namespace

int whole_image_forward_row_blocks(const Problem& problem, const Device& device) {
    if (!whole_image::forward_fits(problem)) return 0;
    int row_blocks = 0;
    whole_image::dispatch_forward(problem, [&](auto kernel) {
        using Kernel = decltype(kernel);
        row_blocks = whole_image::row_blocks(
            problem, device.multiprocessors, resident<Kernel>(problem, device),
            threads_for<Kernel>(problem, device) / 32);
        if (Kernel::shared_bytes(problem, row_blocks) > device.shared_bytes) row_blocks = 0;
        return static_cast<const char*>(nullptr);
    });
    return row_blocks;
}

const char* launch_whole_image_forward(const Forward& call, int row_blocks, const Launcher& launch) {
    return whole_image::dispatch_forward(call.problem, [&](auto kernel) {
        using Kernel = decltype(kernel);
        const auto entry = [](auto k) { return whole_image_forward<decltype(k)>; };
        const dim3 grid(static_cast<unsigned>(call.problem.batch * call.problem.heads), row_blocks);
        return launch(
            kernel, entry, grid, threads_for<Kernel>(call.problem, launch.device),
            Kernel::shared_bytes(call.problem, row_blocks), call, row_blocks);
    });
}

}  // namespace gpsa
