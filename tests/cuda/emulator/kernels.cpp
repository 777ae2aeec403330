// Fills the calls of gpsa.h in and hands them to its launchers, which are compiled for the host like the kernels.
#include "kernels.h"

#include "dropout.cuh"
#include "tiled.h"

namespace gpsa::emulator {
namespace {

/// A machine that knows the tensors of a call by name and by their first byte.
class Memory {
public:
    Machine machine;

    Memory(const Arguments& arguments, const Options& options) : arguments(arguments) {
        machine.options = options;
        for (const auto& [name, argument] : arguments) {
            auto& region = machine.regions[argument.data];
            if (!region) region = std::make_shared<Region>(name, argument.output ? Use::output : Use::input);
            region->add(argument.data, argument.element, argument.sizes, argument.strides);
        }
    }

    Tensor tensor(const std::string& name) const {
        const auto found = arguments.find(name);
        if (found == arguments.end()) return {};
        const auto& strides = found->second.strides;
        return {reinterpret_cast<void*>(found->second.data), strides[0], strides[1], strides[2]};
    }

    template <typename T>
    T* find(const std::string& name) const {
        const auto found = arguments.find(name);
        return found == arguments.end() ? nullptr : reinterpret_cast<T*>(found->second.data);
    }
    float* floats(const std::string& name) const { return find<float>(name); }

    /// So many bytes, in which a workspace's arrays are known to the machine one by one; null for none.
    void* workspace(int64_t bytes, const tiled::Workspace& layout) {
        if (bytes == 0) return nullptr;
        scratch.assign(bytes + 256, '\xff');
        char* const begin = scratch.data() + (256 - reinterpret_cast<uintptr_t>(scratch.data()) % 256) % 256;
        for (int i = 0; i < layout.count; ++i) {
            if (layout.begin[i] + layout.size[i] > bytes) throw Error("a workspace of too few bytes");
            const auto data = reinterpret_cast<uintptr_t>(begin + layout.begin[i]);
            auto& region = machine.regions[data];
            region = std::make_shared<Region>("workspace array " + std::to_string(i), Use::workspace);
            region->add(data, 2, {layout.size[i] / 2}, {1});
        }
        return begin;
    }

    cudaStream_t stream() { return reinterpret_cast<cudaStream_t>(&machine); }

    Counters finish(const char* refused) const {
        if (refused) throw Error(refused);
        for (const auto& [address, region] : machine.regions) region->finish();
        return machine.counters;
    }

private:
    const Arguments& arguments;
    std::vector<char> scratch;
};

}  // namespace

Counters forward(
    const Problem& problem, const Arguments& arguments, std::optional<int> row_blocks, const Options& options) {
    Memory memory(arguments, options);
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
    const tiled::ForwardWorkspace layout(problem);
    const Sizes asked = sizes(problem, 0);
    const int64_t bytes = call.content.data ? asked.forward_workspace : asked.inference_workspace;
    call.workspace = memory.workspace(row_blocks ? layout.bytes : bytes, layout);
    const Launcher launch(memory.stream());
    return memory.finish(
        !row_blocks       ? launch_forward(call, memory.stream())
        : *row_blocks > 0 ? launch_whole_image_forward(call, *row_blocks, launch)
                          : launch_tiled_forward(call, launch));
}

Counters backward(const Problem& problem, const Arguments& arguments, const Options& options) {
    Memory memory(arguments, options);
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
    const tiled::BackwardWorkspace layout(problem);
    if (call.content.data) call.workspace = memory.workspace(layout.bytes, layout);
    return memory.finish(
        call.content.data ? launch_tiled_backward(call, Launcher(memory.stream()))
                          : launch_backward(call, memory.stream()));
}

std::vector<std::vector<Launch>> launches(const Problem& problem) {
    std::vector<std::vector<Launch>> recorded;
    const auto record = [&](auto launch, const auto& call) {
        Machine machine;
        machine.options.only_recorded = true;
        if (const char* refused = launch(call, reinterpret_cast<cudaStream_t>(&machine))) throw Error(refused);
        recorded.push_back(machine.launches);
    };
    char somewhere = 0;
    Forward forward{};
    forward.problem = problem;
    record(launch_forward, forward);
    Backward backward{};
    backward.problem = problem;
    if (sizes(problem, 0).content) forward.content.data = backward.content.data = &somewhere;
    record(launch_forward, forward);
    record(launch_backward, backward);
    return recorded;
}

void dropout_mask(const Problem& problem, const Arguments& arguments, int64_t batch_head, bool transposed) {
    Memory memory(arguments, {});
    Problem seeded = problem;
    seeded.seed = memory.find<int64_t>("seed");
    const Tensor mask = memory.tensor("mask");
    const int tokens = problem.rows * problem.columns;
    memory.machine.launch((tokens + 15) / 16, (tokens + 15) / 16, 32, 0, [&] {
        const Dropout dropout(seeded, batch_head);
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
