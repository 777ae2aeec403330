// Launches the whole-image backward kernels.
#include "launch.h"
#include "whole_image_backward.cuh"

namespace gpsa {
namespace {

constexpr int most_threads = whole_image_tokens;  // a warp for 32 tokens; 255 registers a thread

template <typename Kernel>
__global__ void __launch_bounds__(most_threads) whole_image_backward(const __grid_constant__ Backward call) {
    Kernel::run(call);
}

}  // namespace

bool whole_image_backward_fits(const Problem& problem, const Device& device) {
    return whole_image::backward_fits(problem, device.shared_bytes);
}

const char* launch_whole_image_backward(const Backward& call, const Launcher& launch) {
    return whole_image::dispatch_backward(call.problem, [&](auto kernel) {
        using Kernel = decltype(kernel);
        const auto entry = [](auto k) { return whole_image_backward<decltype(k)>; };
        const dim3 grid(static_cast<unsigned>(call.problem.batch * call.problem.heads));
        return launch(kernel, entry, grid, Kernel::threads_for(call.problem), Kernel::shared_bytes(call.problem), call);
    });
}

}  // namespace gpsa
