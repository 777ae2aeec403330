// The emulated kernels for Python: tensors come as (address, bytes of an element, sizes, strides, is an output).
#include <cxxabi.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels.h"
#include "tiled.h"
#include "tiles.cuh"

namespace py = pybind11;
namespace emulator = gpsa::emulator;

using PyTensor = std::tuple<uintptr_t, int, std::vector<int64_t>, std::vector<int64_t>, bool>;
using PyTensors = std::map<std::string, PyTensor>;
using PyProblem = std::tuple<int64_t, int, int, int, int, bool, float, float>;
using PyDevice = std::tuple<int, int>;  // multiprocessors, shared bytes
using PyLaunch = std::tuple<std::string, int64_t, int64_t, int, int>;

static emulator::Arguments arguments_of(const PyTensors& tensors) {
    emulator::Arguments arguments;
    for (const auto& [name, t] : tensors) {
        arguments[name] = {std::get<0>(t), std::get<1>(t), std::get<2>(t), std::get<3>(t), std::get<4>(t)};
    }
    return arguments;
}

static gpsa::Problem problem_of(const PyProblem& p) {
    gpsa::Problem problem{};
    bool bfloat16 = false;
    std::tie(
        problem.batch, problem.heads, problem.rows, problem.columns, problem.head_dim, bfloat16, problem.scale,
        problem.dropout_p) = p;
    problem.dtype = bfloat16 ? gpsa::Dtype::bfloat16 : gpsa::Dtype::float16;
    return problem;
}

static void use(const PyDevice& device) { emulator::device = {std::get<0>(device), std::get<1>(device)}; }

static std::map<std::string, int64_t> counts_of(const emulator::Counters& c) {
    std::map<std::string, int64_t> counts = {
        {"global_read", c.global_read},
        {"global_written", c.global_written},
        {"mma", c.mma},
        {"exp2", c.exp2},
        {"barriers", c.barriers}};
    const std::pair<const char*, const emulator::Wavefronts&> kinds[] = {
        {"ldmatrix", c.ldmatrix}, {"copy", c.copy}, {"load", c.load}, {"store", c.store}};
    for (const auto& [kind, w] : kinds) {
        counts[std::string(kind)] = w.instructions;
        counts[std::string(kind) + "_wavefronts"] = w.wavefronts;
        counts[std::string(kind) + "_conflicts"] = w.conflicts;
    }
    return counts;
}

/// "TiledForward", without its namespace and parameters.
static std::string name_of(const emulator::Launch& launch) {
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

PYBIND11_MODULE(gpsa_emulated, m) {
    m.def(
        "forward", [](const PyProblem& problem, const PyTensors& tensors, std::optional<int> row_blocks,
                      const PyDevice& device, uint64_t schedule, bool deferred_copies) {
            use(device);
            const emulator::Options options{schedule, deferred_copies, false};
            return counts_of(emulator::forward(problem_of(problem), arguments_of(tensors), row_blocks, options));
        });
    m.def(
        "backward", [](const PyProblem& problem, const PyTensors& tensors, const PyDevice& device, uint64_t schedule,
                       bool deferred_copies) {
            use(device);
            const emulator::Options options{schedule, deferred_copies, false};
            return counts_of(emulator::backward(problem_of(problem), arguments_of(tensors), options));
        });
    m.def("launches", [](const PyProblem& problem, const PyDevice& device) {
        use(device);
        std::vector<std::vector<PyLaunch>> calls;
        for (const auto& launches : emulator::launches(problem_of(problem))) {
            auto& call = calls.emplace_back();
            for (const auto& l : launches) call.emplace_back(name_of(l), l.grid_x, l.grid_y, l.threads, l.shared_bytes);
        }
        return calls;
    });
    m.def("sizes", [](const PyProblem& problem, const PyDevice& device) {
        use(device);
        const gpsa::Sizes s = gpsa::sizes(problem_of(problem), 0);
        return std::make_tuple(s.slots, s.inference_workspace, s.forward_workspace, s.backward_workspace, s.content);
    });
    m.def("row_of_token", [](int columns, int token) { return gpsa::Columns(columns).row_of(token); });
    m.def("tiled_slots", [](const PyProblem& problem) { return gpsa::tiled::slots(problem_of(problem)); });
    m.def(
        "dropout_mask",
        [](int rows, int columns, float dropout_p, const PyTensors& tensors, int64_t batch_head, bool transposed) {
            gpsa::Problem problem{};
            problem.rows = rows;
            problem.columns = columns;
            problem.dropout_p = dropout_p;
            emulator::dropout_mask(problem, arguments_of(tensors), batch_head, transposed);
        });
    m.def("philox", &emulator::philox_words);
}
