// The calls of gpsa.h as the tests make them: the problem, named tensors, and how to run it.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "emulator.h"
#include "gpsa.h"
#include "launch.h"

namespace gpsa::emulator {

struct Argument {
    uintptr_t data;
    int element;  // bytes
    std::vector<int64_t> sizes, strides;
    bool output;
};
using Arguments = std::map<std::string, Argument>;

/// Runs a forward call and returns what it counted; throws Error for whatever is wrong. `row_blocks`: of the
/// whole-image kernel, 0 for the tiled kernels; none: launch_forward chooses. `content` and `logsumexp` may be missing
/// from the arguments.
Counters forward(
    const Problem& problem, const Arguments& arguments, std::optional<int> row_blocks, const Options& options);

/// The same for a backward call: of the tiled kernels where there is `content`, else launch_backward chooses.
Counters backward(const Problem& problem, const Arguments& arguments, const Options& options);

/// What calls for a problem launch, in order: of a forward call that saves nothing, of one that saves what backward
/// reads, and of a backward call.
std::vector<std::vector<Launch>> launches(const Problem& problem);

/// Writes the dropout mask of a (batch, head), `mask` (1, 1, N, N) of 16-bit 0 and 1, drawn by `seed`: a warp per (16,
/// 16) tile of scores or of transposed scores.
void dropout_mask(const Problem& problem, const Arguments& arguments, int64_t batch_head, bool transposed);

/// Philox4x32-10 of a counter and a key.
std::vector<uint32_t> philox_words(const std::vector<uint32_t>& counter, const std::vector<uint32_t>& key);

}  // namespace gpsa::emulator
