// Compiles the tiled backward kernels' own sources for the host.
#include "tiled_backward.cuh"
#include "tiled_kernels.h"
#include "tiled_launches.h"

namespace gpsa::emulator {

Counters tiled_backward(const Problem& problem, const Arguments& arguments, const Options& options) {
    Machine machine;
    machine.options = options;
    const Memory memory(machine, arguments);
    Scratch scratch(machine, tiled::BackwardWorkspace(problem));
    Backward call{};
    call.problem = problem;
    call.problem.seed = memory.find<int64_t>("seed");
    call.grad_out = memory.tensor("grad_out");
    call.q = memory.tensor("q");
    call.k = memory.tensor("k");
    call.v = memory.tensor("v");
    call.pos_weight = memory.floats("pos_weight");
    call.gate = memory.floats("gate");
    call.content = memory.tensor("content");
    call.logsumexp = memory.floats("logsumexp");
    call.grad_q = memory.tensor("grad_q");
    call.grad_k = memory.tensor("grad_k");
    call.grad_v = memory.tensor("grad_v");
    call.sums = memory.floats("sums");
    call.workspace = scratch.data();
    dispatch_tiled(
        problem, [&](auto config) { return gpsa::tiled_backward<decltype(config)>(call, launcher(machine)); });
    for (const auto& [address, region] : machine.regions) region->finish();
    return machine.counters;
}

int tiled_slots(const Problem& problem) { return tiled::slots(problem); }

}  // namespace gpsa::emulator
