// The entry points of gpsa.h: which family of kernels serves a problem.
//
// A call goes to the whole-image kernels where they fit in a block's shared memory, else to the tiled ones; but where
// backward is tiled, forward is too, because backward then reads the content's own output, which only they write.
#include "launch.h"
#include "tiled.cuh"

namespace gpsa {
namespace {

const char* unsupported(const Problem& problem) {
    if (problem.head_dim < 8 || problem.head_dim > 128 || problem.head_dim % 8 != 0) {
        return "head_dim must be a multiple of 8 up to 128";
    }
    if (problem.batch * problem.heads > 0x7fffffff) return "batch * heads must be below 2^31";
    if (int64_t(problem.rows) * problem.columns > 1 << 30) return "rows * columns must be up to 2^30";
    return nullptr;
}

/// Null, or why `serve(launcher)`, if there is anything to launch, has not launched it.
template <typename Serve>
const char* launch(const Problem& problem, cudaStream_t stream, Serve serve) {
    if (const char* reason = unsupported(problem)) return reason;
    if (problem.batch * problem.heads * problem.rows * problem.columns == 0) return nullptr;
    const Launcher launcher(stream);
    return launcher.error ? launcher.error : serve(launcher);
}

}  // namespace

Sizes sizes(const Problem& problem, int index) {
    Device device{132, 227 * 1024};              // an H100's, where there is none
    if (index >= 0) find_device(index, device);  // a failure is left to the launch to tell
    const bool content = !whole_image_backward_fits(problem, device);
    const int64_t tiled = TiledWorkspace(problem, false).bytes;
    const int64_t inference = whole_image_forward_row_blocks(problem, device) > 0 ? 0 : tiled;
    return {
        content ? tiled_slots(problem) : 1, inference, content ? tiled : inference,
        content ? TiledWorkspace(problem, true).bytes : 0, content};
}

const char* launch_forward(const Forward& call, cudaStream_t stream) {
    return launch(call.problem, stream, [&](const Launcher& launcher) {
        const int row_blocks = call.content.data ? 0 : whole_image_forward_row_blocks(call.problem, launcher.device);
        return row_blocks > 0 ? launch_whole_image_forward(call, row_blocks, launcher)
                              : launch_tiled_forward(call, launcher);
    });
}

const char* launch_backward(const Backward& call, cudaStream_t stream) {
    return launch(call.problem, stream, [&](const Launcher& launcher) {
        if (whole_image_backward_fits(call.problem, launcher.device)) {
            return launch_whole_image_backward(call, launcher);
        }
        const char* const missing = "backward needs the content branch's own output";
        return call.content.data ? launch_tiled_backward(call, launcher) : missing;
    });
}

}  // namespace gpsa
