// The calls of gpsa.h for Python: fills them in and hands them to their launchers, compiled for the host like the
// kernels. A tensor comes as (address, bytes of an element, sizes, strides, whether it is an output).
#include <cxxabi.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "dropout.cuh"
#include "emulator.h"
#include "launch.h"
#include "tiled.cuh"

using namespace gpsa;
using namespace gpsa::emulator;

using Argument = std::tuple<uintptr_t, int, std::vector<int64_t>, std::vector<int64_t>, bool>;
using Arguments = std::map<std::string, Argument>;  // some may be missing
using PyProblem = std::tuple<int64_t, int, int, int, int, bool, float, float>;
using PyDevice = std::tuple<int, int>;  // multiprocessors, shared bytes
using PyLaunch = std::tuple<std::string, int64_t, int64_t, int, int>;

static Problem problem_of(const PyProblem& p) {
    Problem problem{};
    bool bfloat16 = false;
    std::tie(
        problem.batch, problem.heads, problem.rows, problem.columns, problem.head_dim, bfloat16, problem.scale,
        problem.dropout_p) = p;
    problem.dtype = bfloat16 ? Dtype::bfloat16 : Dtype::float16;
    return problem;
}

static void use(const PyDevice& d) { emulator::device = {std::get<0>(d), std::get<1>(d)}; }

/// A machine that knows the tensors of a call by name and by their first byte.
class Memory {
public:
    Machine machine;

    explicit Memory(const Arguments& arguments, const Options& options = {}) : arguments(arguments) {
        machine.options = options;
        for (const auto& [name, argument] : arguments) {
            const auto& [data, element, sizes, strides, output] = argument;
            auto& region = machine.regions[data];
            if (!region) region = std::make_shared<Region>(name, output ? Use::output : Use::input);
            region->add(data, element, sizes, strides);
        }
    }

    Tensor tensor(const char* name) const {
        const auto found = arguments.find(name);
        if (found == arguments.end()) return {};
        const auto& strides = std::get<3>(found->second);
        return {find<void>(name), strides[0], strides[1], strides[2]};
    }

    template <typename T = float>
    T* find(const char* name) const {
        const auto found = arguments.find(name);
        return found == arguments.end() ? nullptr : reinterpret_cast<T*>(std::get<0>(found->second));
    }

    /// What both structs have.
    template <typename Call>
    void fill(Call& call, const PyProblem& problem) const {
        call.problem = problem_of(problem);
        call.problem.seed = find<int64_t>("seed");
        call.q = tensor("q");
        call.k = tensor("k");
        call.v = tensor("v");
        call.pos_weight = find("pos_weight");
        call.gate = find("gate");
        call.content = tensor("content");
        call.logsumexp = find("logsumexp");
    }

    /// So many bytes, in which a workspace's arrays are known to the machine one by one; null for none.
    void* workspace(int64_t bytes, const TiledWorkspace& layout) {
        if (bytes == 0) return nullptr;
        scratch.assign(bytes + 256, '\xff');
        char* const begin = scratch.data() + (256 - reinterpret_cast<uintptr_t>(scratch.data()) % 256) % 256;
        for (int i = 0; i < TiledWorkspace::arrays; ++i) {
            if (layout.size[i] == 0) continue;
            if (layout.begin[i] + layout.size[i] > bytes) throw Error("a workspace of too few bytes");
            const auto data = reinterpret_cast<uintptr_t>(begin + layout.begin[i]);
            auto& region = machine.regions[data];
            region = std::make_shared<Region>("workspace array " + std::to_string(i), Use::workspace);
            region->add(data, 2, {layout.size[i] / 2}, {1});
        }
        return begin;
    }

    cudaStream_t stream() { return reinterpret_cast<cudaStream_t>(&machine); }

    std::map<std::string, int64_t> finish(const char* refused) const {
        if (refused) throw Error(refused);
        for (const auto& [address, region] : machine.regions) region->finish();
        const Counters& c = machine.counters;
        std::map<std::string, int64_t> counts = {{"mma", c.mma}, {"exp2", c.exp2}, {"barriers", c.barriers}};
        counts["global_read"] = c.global_read;
        counts["global_written"] = c.global_written;
        const std::pair<std::string, const Wavefronts&> kinds[] = {
            {"ldmatrix", c.ldmatrix}, {"copy", c.copy}, {"load", c.load}, {"store", c.store}};
        for (const auto& [kind, w] : kinds) {
            counts[kind] = w.instructions;
            counts[kind + "_wavefronts"] = w.wavefronts;
            counts[kind + "_conflicts"] = w.conflicts;
        }
        return counts;
    }

private:
    const Arguments& arguments;
    std::vector<char> scratch;
};

/// `row_blocks`: of the whole-image kernel, 0 for the tiled kernels; none: launch_forward chooses.
static auto forward(
    const PyProblem& problem, const Arguments& arguments, std::optional<int> row_blocks, const PyDevice& device,
    uint64_t schedule, bool deferred_copies) {
    use(device);
    Memory memory(arguments, {schedule, deferred_copies});
    Forward call{};
    memory.fill(call, problem);
    call.out = memory.tensor("out");
    const TiledWorkspace layout(call.problem, false);
    const Sizes asked = sizes(call.problem, 0);
    const int64_t bytes = call.content.data ? asked.forward_workspace : asked.inference_workspace;
    call.workspace = memory.workspace(row_blocks ? layout.bytes : bytes, layout);
    const Launcher launch(memory.stream());
    return memory.finish(
        !row_blocks       ? launch_forward(call, memory.stream())
        : *row_blocks > 0 ? launch_whole_image_forward(call, *row_blocks, launch)
                          : launch_tiled_forward(call, launch));
}

/// `row_blocks`: 0 for the tiled kernels; none: launch_backward chooses.
static auto backward(
    const PyProblem& problem, const Arguments& arguments, std::optional<int> row_blocks, const PyDevice& device,
    uint64_t schedule, bool deferred_copies) {
    use(device);
    Memory memory(arguments, {schedule, deferred_copies});
    Backward call{};
    memory.fill(call, problem);
    call.grad_out = memory.tensor("grad_out");
    call.grad_q = memory.tensor("grad_q");
    call.grad_k = memory.tensor("grad_k");
    call.grad_v = memory.tensor("grad_v");
    call.sums = memory.find("sums");
    const TiledWorkspace layout(call.problem, true);
    if (call.content.data) call.workspace = memory.workspace(layout.bytes, layout);
    return memory.finish(
        row_blocks ? launch_tiled_backward(call, Launcher(memory.stream())) : launch_backward(call, memory.stream()));
}

/// "TiledForward", without its namespace and parameters.
static std::string name_of(const Launch& launch) {
    static std::map<const void*, std::string> names;
    std::string& name = names[launch.kernel];
    if (name.empty()) {
        char* const demangled = abi::__cxa_demangle(launch.kernel, nullptr, nullptr, nullptr);
        name = demangled;
        std::free(demangled);
        name = name.substr(std::string("gpsa::").size(), name.find('<') - std::string("gpsa::").size());
    }
    return name;
}

/// What calls for a problem launch, in order: of a forward call that saves nothing, of one that saves what backward
/// reads, and of a backward call.
static std::vector<std::vector<PyLaunch>> launches(const PyProblem& p, const PyDevice& device) {
    use(device);
    const Problem problem = problem_of(p);
    std::vector<std::vector<PyLaunch>> recorded;
    const auto record = [&](auto launch, const auto& call) {
        Machine machine;
        machine.options.only_recorded = true;
        if (const char* refused = launch(call, reinterpret_cast<cudaStream_t>(&machine))) throw Error(refused);
        auto& names = recorded.emplace_back();
        for (const Launch& l : machine.launches) {
            names.emplace_back(name_of(l), l.grid_x, l.grid_y, l.threads, l.shared_bytes);
        }
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

/// Writes the dropout mask of a (batch, head), `mask` (1, 1, N, N) of 16-bit 0 and 1, drawn by `seed`: a warp per
/// (16, 16) tile of scores or of transposed scores.
static void dropout_mask(
    int rows, int columns, float dropout_p, const Arguments& arguments, int64_t batch_head, bool transposed) {
    Memory memory(arguments);
    Problem problem{};
    problem.dropout_p = dropout_p;
    problem.seed = memory.find<int64_t>("seed");
    const Tensor mask = memory.tensor("mask");
    const int tokens = rows * columns;
    memory.machine.launch((tokens + 15) / 16, (tokens + 15) / 16, 32, 0, [&] {
        const Dropout dropout(problem, batch_head);
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

PYBIND11_MODULE(gpsa_emulated, m) {
    m.def("forward", &forward);
    m.def("backward", &backward);
    m.def("launches", &launches);
    m.def("dropout_mask", &dropout_mask);
    m.def("sizes", [](const PyProblem& problem, const PyDevice& device) {
        use(device);
        const Sizes s = sizes(problem_of(problem), 0);
        return std::make_tuple(s.slots, s.inference_workspace, s.forward_workspace, s.backward_workspace, s.content);
    });
    m.def("row_of_token", [](int columns, int token) { return FewColumns(columns).row_of(token); });
    m.def("tiled_slots", [](const PyProblem& problem) { return tiled_slots(problem_of(problem)); });
    m.def("philox", [](const std::array<uint32_t, 4>& c, const std::array<uint32_t, 2>& key) {
        const Words words = philox({{c[0], c[1], c[2], c[3]}}, key[0], key[1]);
        return std::vector<uint32_t>(words.w, words.w + 4);
    });
}
