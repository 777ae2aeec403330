// Compiles the whole-image backward kernel's own sources for the host.
#include "kernels.h"
#include "memory.h"
#include "whole_image_backward.cuh"

namespace gpsa::emulator {
namespace {

template <typename Visit>
void dispatch(const Problem& problem, Visit visit) {
#ifdef GPSA_ONE_KERNEL  // what the planted bugs are compiled for, in a fraction of the time
    problem.dropout_p > 0 ? visit(WholeImageBackward<Half, 48, true>{}) : visit(WholeImageBackward<Half, 48, false>{});
#else
    whole_image::dispatch_backward(problem, [&](auto kernel) {
        visit(kernel);
        return static_cast<const char*>(nullptr);
    });
#endif
}

}  // namespace

Counters backward(const Problem& problem, const Arguments& arguments, const Options& options) {
    Machine machine;
    machine.options = options;
    const Memory memory(machine, arguments);
    Backward call{};
    call.problem = problem;
    call.problem.seed = memory.find<int64_t>("seed");
    call.grad_out = memory.tensor("grad_out");
    call.q = memory.tensor("q");
    call.k = memory.tensor("k");
    call.v = memory.tensor("v");
    call.pos_weight = memory.floats("pos_weight");
    call.gate = memory.floats("gate");
    call.logsumexp = memory.floats("logsumexp");
    call.grad_q = memory.tensor("grad_q");
    call.grad_k = memory.tensor("grad_k");
    call.grad_v = memory.tensor("grad_v");
    call.sums = memory.floats("sums");
    dispatch(problem, [&](auto kernel) {
        using Kernel = decltype(kernel);
        const int images = static_cast<int>(problem.batch) * problem.heads;
        machine.launch(
            images, 1, Kernel::threads_for(problem), Kernel::shared_bytes(problem), [&] { Kernel::run(call); });
    });
    for (const auto& [address, region] : machine.regions) region->finish();
    return machine.counters;
}

bool backward_fits(const Problem& problem, int shared_bytes) {
    return whole_image::backward_fits(problem, shared_bytes);
}

}  // namespace gpsa::emulator
