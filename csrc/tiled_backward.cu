// Launches the tiled backward kernels.
#include "tiled_backward.cuh"
#include "tiled_launch.h"

namespace gpsa {

const char* launch_tiled_backward(const Backward& call, const Launcher& launch) {
    return tiled::dispatch(
        call.problem, [&](auto config) { return tiled_backward<decltype(config)>(call, TiledLauncher{launch}); });
}

}  // namespace gpsa
