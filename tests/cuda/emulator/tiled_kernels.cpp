// Compiles the tiled forward kernels' own sources for the host.
#include "tiled_kernels.h"

#include "tiled_forward.cuh"
#include "tiled_launches.h"

namespace gpsa::emulator {

Counters tiled_forward(const Problem& problem, const Arguments& arguments, const Options& options) {
    Machine machine;
    machine.options = options;
    const Memory memory(machine, arguments);
    Scratch scratch(machine, tiled::ForwardWorkspace(problem));
    Forward call{};
    call.problem = problem;
    call.problem.seed = memory.find<int64_t>("seed");
    call.q = memory.tensor("q");
    call.k = memory.tensor("k");
    call.v = memory.tensor("v");
    call.pos_weight = memory.floats("pos_weight");
    call.gate = memory.floats("gate");
    call.out = memory.tensor("out");
    call.content = memory.tensor("content");
    call.logsumexp = memory.floats("logsumexp");
    call.workspace = scratch.data();
    dispatch_tiled(
        problem, [&](auto config) { return gpsa::tiled_forward<decltype(config)>(call, launcher(machine)); });
    for (const auto& [address, region] : machine.regions) region->finish();
    return machine.counters;
}

void dropout_mask(const Problem& problem, const Arguments& arguments, int64_t image, bool transposed) {
    Machine machine;
    const Memory memory(machine, arguments);
    Problem seeded = problem;
    seeded.seed = memory.find<int64_t>("seed");
    const Tensor mask = memory.tensor("mask");
    const int tokens = problem.rows * problem.columns;
    machine.launch((tokens + 15) / 16, (tokens + 15) / 16, 32, 0, [&] {
        const Dropout dropout(seeded, image);
        const int query = 16 * block_y(), key = 16 * block_x();
        const uint32_t bits = transposed ? dropout.keep_transposed(query, key) : dropout.keep(query, key);
        for (int i = 0; i < 8; ++i) {
            const int row = fragment_row() + i / 2 % 2 * 8, column = fragment_column() + i % 2 + i / 4 * 8;
            const int at_query = query + (transposed ? column : row), at_key = key + (transposed ? row : column);
            if (at_query < tokens && at_key < tokens) {
                reinterpret_cast<uint16_t*>(mask.data)[at_query * mask.token + at_key] = bits >> i & 1;
            }
        }
    });
}

std::vector<uint32_t> philox_words(const std::vector<uint32_t>& counter, const std::vector<uint32_t>& key) {
    const Words words = philox({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
    return {words.w, words.w + 4};
}

}  // namespace gpsa::emulator
