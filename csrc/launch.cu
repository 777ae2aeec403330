// The entry points of gpsa.h: which family of kernels serves a problem.
#include "launch.h"
#include "whole_image.h"

namespace gpsa {
namespace {

const char* unsupported(const Problem& problem) {
    if (problem.head_dim < 8 || problem.head_dim > 128 || problem.head_dim % 8 != 0) {
        return "head_dim must be a multiple of 8 up to 128";
    }
    if (problem.batch * problem.heads > 0x7fffffff) return "batch * heads must be below 2^31";
    if (problem.dropout_p > 0) return "there is no kernel with attention dropout yet";
    if (static_cast<int64_t>(problem.rows) * problem.columns > whole_image_tokens) {
        return "there is no kernel for more than 256 tokens yet";
    }
    return nullptr;
}

}  // namespace

int slots(const Problem&) { return 1; }
int64_t forward_workspace(const Problem&) { return 0; }
int64_t backward_workspace(const Problem&) { return 0; }

const char* launch_forward(const Forward& call, cudaStream_t stream) {
    if (const char* reason = unsupported(call.problem)) return reason;
    if (call.problem.batch * call.problem.heads * call.problem.rows * call.problem.columns == 0) return nullptr;
    return launch_whole_image_forward(call, stream);
}

const char* launch_backward(const Backward&, cudaStream_t) { return "there is no backward kernel yet"; }

}  // namespace gpsa
