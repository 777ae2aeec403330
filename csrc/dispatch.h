// Which element type and how many channels a problem's kernels are compiled for. Plain C++.
#pragma once

#include "gpsa.h"
#include "primitives.h"

namespace gpsa {

/// Calls `visit` with the Config<E, channels> for a problem of head_dim `most` at most: rows of head_dim channels are
/// padded to `channels` in shared memory.
template <template <typename, int> class Config, int most = 128, typename Visit>
const char* dispatch(const Problem& problem, Visit visit) {
    const auto with_channels = [&](auto element) {
        using E = decltype(element);
        if (problem.head_dim <= 32) return visit(Config<E, 32>{});
        if (problem.head_dim <= 48) return visit(Config<E, 48>{});
        if constexpr (most > 64) {
            if (problem.head_dim > 64) return visit(Config<E, 128>{});
        }
        return visit(Config<E, 64>{});
    };
    return problem.dtype == Dtype::float16 ? with_channels(Half{}) : with_channels(Bfloat16{});
}

}  // namespace gpsa
