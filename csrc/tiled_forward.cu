// Launches the tiled forward kernels.
#include "tiled_forward.cuh"
#include "tiled_launch.h"

namespace gpsa {

const char* launch_tiled_forward(const Forward& call, const Launcher& launch) {
    return tiled::dispatch(
        call.problem, [&](auto config) { return tiled_forward<decltype(config)>(call, TiledLauncher{launch}); });
}

}  // namespace gpsa
