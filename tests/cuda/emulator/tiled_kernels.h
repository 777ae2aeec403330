// The tiled kernels as the tests call them; see kernels.h.
#pragma once

#include "kernels.h"

namespace gpsa::emulator {

/// All launches of a forward call, one after the other, with a workspace of their own.
Counters tiled_forward(const Problem& problem, const Arguments& arguments, const Options& options);

/// The same for a backward call.
Counters tiled_backward(const Problem& problem, const Arguments& arguments, const Options& options);

/// Slots of `sums` that it writes for a (batch, head).
int tiled_slots(const Problem& problem);

/// Writes the dropout mask of an image, `mask` (1, 1, N, N) of 16-bit 0 and 1, drawn by `seed`: a warp per (16, 16) tile
/// of scores or of transposed scores.
void dropout_mask(const Problem& problem, const Arguments& arguments, int64_t image, bool transposed);

/// Philox4x32-10 of a counter and a key.
std::vector<uint32_t> philox_words(const std::vector<uint32_t>& counter, const std::vector<uint32_t>& key);

}  // namespace gpsa::emulator
