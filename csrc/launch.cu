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

bool is_empty(const Problem& problem) {
    return problem.batch * problem.heads * problem.rows * problem.columns == 0;
}

// The rule: whole-image kernels serve all that they can. The tiled backward kernels read the content branch's own
// output, which of the forward kernels only the tiled ones write.

bool is_tiled_backward(const Problem& problem, const Device& device) {
    return !whole_image_backward_fits(problem, device);
}

bool is_tiled_forward(const Problem& problem, bool content) {
    return content || !whole_image::forward_fits(problem);
}

}  // namespace

Sizes sizes(const Problem& problem, int index) {
    Device device = Device::of(index);
    if (device.shared_bytes == 0) device.shared_bytes = 227 * 1024;  // an H100's
    const bool content = is_tiled_backward(problem, device);
    return {
        content ? tiled::slots(problem) : 1,
        is_tiled_forward(problem, content) ? tiled::ForwardWorkspace(problem).bytes : 0,
        content ? tiled::BackwardWorkspace(problem).bytes : 0, content};
}

const char* launch_forward(const Forward& call, cudaStream_t stream) {
    if (const char* reason = unsupported(call.problem)) return reason;
    if (is_empty(call.problem)) return nullptr;
    const bool is_tiled = is_tiled_forward(call.problem, call.content.data != nullptr);
    return is_tiled ? launch_tiled_forward(call, stream) : launch_whole_image_forward(call, stream);
}

const char* launch_backward(const Backward& call, cudaStream_t stream) {
    if (const char* reason = unsupported(call.problem)) return reason;
    if (is_empty(call.problem)) return nullptr;
    if (!is_tiled_backward(call.problem, Device::current())) return launch_whole_image_backward(call, stream);
    return call.content.data ? launch_tiled_backward(call, stream) : "backward needs the content branch's own output";
}

}  // namespace gpsa
