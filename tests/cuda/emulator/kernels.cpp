// Compiles the whole-image forward kernel's own sources for the host.
#include "kernels.h"
#include "memory.h"
#include "whole_image_forward.cuh"

namespace gpsa::emulator {
namespace {

template <typename Visit>
void dispatch(const Problem& problem, Visit visit) {
#ifdef GPSA_ONE_KERNEL  // what the planted bugs are compiled for, in a fraction of the time
    using Config = WholeImage<Half, 48, 4>;
    problem.dropout_p > 0 ? visit(WholeImageForward<Config, true>{}) : visit(WholeImageForward<Config, false>{});
#else
    whole_image::dispatch_forward(problem, [&](auto kernel) {
        visit(kernel);
        return static_cast<const char*>(nullptr);
    });
#endif
}

}  // namespace

Counters forward(const Problem& problem, const Arguments& arguments, int parts, const Options& options) {
    Machine machine;
    machine.options = options;
    const Memory memory(machine, arguments);
    Forward call{};
    call.problem = problem;
    call.problem.seed = memory.find<int64_t>("seed");
    call.q = memory.tensor("q");
    call.k = memory.tensor("k");
    call.v = memory.tensor("v");
    call.pos_weight = memory.floats("pos_weight");
    call.gate = memory.floats("gate");
    call.out = memory.tensor("out");
    call.logsumexp = memory.floats("logsumexp");
    dispatch(problem, [&](auto kernel) {
        using Kernel = decltype(kernel);
        const int images = static_cast<int>(problem.batch) * problem.heads;
        const int shared_bytes = Kernel::shared_bytes(problem, parts);
        machine.launch(images, parts, whole_image_threads, shared_bytes, [&] { Kernel::run(call, parts); });
    });
    for (const auto& [address, region] : machine.regions) region->finish();
    return machine.counters;
}

int forward_shared_bytes(const Problem& problem, int parts) {
    int bytes = 0;
    dispatch(problem, [&](auto kernel) { bytes = decltype(kernel)::shared_bytes(problem, parts); });
    return bytes;
}

}  // namespace gpsa::emulator
