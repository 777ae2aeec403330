// The kernels as the tests call them: the problem, named tensors, and how to run it.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "emulator.h"
#include "gpsa.h"

namespace gpsa::emulator {

struct Argument {
    uintptr_t data;
    int element;  // bytes
    std::vector<int64_t> sizes, strides;
    bool output;
};
using Arguments = std::map<std::string, Argument>;

/// Runs the forward kernel and returns what it counted; throws Error for whatever is wrong. `parts`: blocks that share
/// the query rows of a (batch, head). `logsumexp` may be missing from the arguments.
Counters forward(const Problem& problem, const Arguments& arguments, int parts, const Options& options);

/// The same for the backward kernel.
Counters backward(const Problem& problem, const Arguments& arguments, const Options& options);

/// Bytes of shared memory that the forward kernel wants.
int forward_shared_bytes(const Problem& problem, int parts);

/// Whether the backward kernel serves a problem where a block can have so many bytes of shared memory.
bool backward_fits(const Problem& problem, int shared_bytes);

}  // namespace gpsa::emulator
