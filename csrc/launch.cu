// The entry points of gpsa.h: which family of kernels serves a problem.
#include "launch.h"
#include "tiled.h"
#include "whole_image.h"

namespace gpsa {
namespace {

const char* unsupported(const Problem& problem) {
    if (problem.head_dim < 8 || problem.head_dim > 128 || problem.head_dim % 8 != 0) {
        return "head_dim must be a multiple of 8 up to 128";
    }
    if (problem.batch * problem.heads > 0x7fffffff) return "batch * heads must be below 2^31";
    if (static_cast<int64_t>(problem.rows) * problem.columns > 1 << 30) return "rows * columns must be up to 2^30";
    return nullptr;
}

bool is_empty(const Problem& problem) { return problem.batch * problem.heads * problem.rows * problem.columns == 0; }

}  // namespace

// The rule: whole-image kernels serve all that fits in a block's shared memory, tiled kernels the rest. The tiled
// backward kernels read the content branch's own output, which of the forward kernels only the tiled ones write.

Sizes sizes(const Problem& problem, int index) {
    Device device{132, 227 * 1024};              // an H100's, where there is none
    if (index >= 0) find_device(index, device);  // a failure is left to the launch to tell
    const bool content = !whole_image_backward_fits(problem, device);
    const int64_t tiled = tiled::ForwardWorkspace(problem).bytes;
    const int64_t inference = whole_image_forward_row_blocks(problem, device) > 0 ? 0 : tiled;
    return {
        content ? tiled::slots(problem) : 1, inference, content ? tiled : inference,
        content ? tiled::BackwardWorkspace(problem).bytes : 0, content};
}

const char* launch_forward(const Forward& call, cudaStream_t stream) {
    if (const char* reason = unsupported(call.problem)) return reason;
    if (is_empty(call.problem)) return nullptr;
    const Launcher launch(stream);
    if (launch.error) return launch.error;
    const int row_blocks = call.content.data ? 0 : whole_image_forward_row_blocks(call.problem, launch.device);
    return row_blocks > 0 ? launch_whole_image_forward(call, row_blocks, launch) : launch_tiled_forward(call, launch);
}

const char* launch_backward(const Backward& call, cudaStream_t stream) {
    if (const char* reason = unsupported(call.problem)) return reason;
    if (is_empty(call.problem)) return nullptr;
    const Launcher launch(stream);
    if (launch.error) return launch.error;
    if (whole_image_backward_fits(call.problem, launch.device)) return launch_whole_image_backward(call, launch);
    return call.content.data ? launch_tiled_backward(call, launch) : "backward needs the content branch's own output";
}

}  // namespace gpsa
