// The emulated kernels for Python: tensors come as (address, bytes of an element, sizes, strides, is an output).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels.h"
#include "tiled_kernels.h"
#include "tiles.cuh"
#include "whole_image.h"

namespace py = pybind11;
namespace emulator = gpsa::emulator;

using PyTensor = std::tuple<uintptr_t, int, std::vector<int64_t>, std::vector<int64_t>, bool>;

static emulator::Arguments arguments_of(const std::map<std::string, PyTensor>& tensors) {
    emulator::Arguments arguments;
    for (const auto& [name, t] : tensors) {
        arguments[name] = {std::get<0>(t), std::get<1>(t), std::get<2>(t), std::get<3>(t), std::get<4>(t)};
    }
    return arguments;
}

static gpsa::Problem problem_of(
    int64_t batch, int heads, int rows, int columns, int head_dim, bool bfloat16, float scale) {
    gpsa::Problem problem{};
    problem.batch = batch;
    problem.heads = heads;
    problem.rows = rows;
    problem.columns = columns;
    problem.head_dim = head_dim;
    problem.scale = scale;
    problem.dtype = bfloat16 ? gpsa::Dtype::bfloat16 : gpsa::Dtype::float16;
    return problem;
}

static std::map<std::string, int64_t> counts_of(const emulator::Counters& c) {
    std::map<std::string, int64_t> counts = {
        {"global_read", c.global_read}, {"global_written", c.global_written}, {"mma", c.mma}, {"exp2", c.exp2},
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

PYBIND11_MODULE(gpsa_emulated, m) {
    m.def(
        "forward",
        [](std::tuple<int64_t, int, int, int, int, bool, float> p, float dropout_p,
           const std::map<std::string, PyTensor>& tensors, int parts, uint64_t seed, bool deferred_copies) {
            gpsa::Problem problem = std::apply(problem_of, p);
            problem.dropout_p = dropout_p;
            return counts_of(emulator::forward(problem, arguments_of(tensors), parts, {seed, deferred_copies}));
        });
    m.def(
        "backward",
        [](std::tuple<int64_t, int, int, int, int, bool, float> p, float dropout_p,
           const std::map<std::string, PyTensor>& tensors, uint64_t seed, bool deferred_copies) {
            gpsa::Problem problem = std::apply(problem_of, p);
            problem.dropout_p = dropout_p;
            return counts_of(emulator::backward(problem, arguments_of(tensors), {seed, deferred_copies}));
        });
    m.def("backward_fits", [](std::tuple<int64_t, int, int, int, int, bool, float> p, int shared_bytes) {
        return emulator::backward_fits(std::apply(problem_of, p), shared_bytes);
    });
    m.def("forward_parts", [](std::tuple<int64_t, int, int, int, int, bool, float> p, int multiprocessors) {
        return gpsa::whole_image::parts(std::apply(problem_of, p), multiprocessors);
    });
    m.def("forward_shared_bytes", [](std::tuple<int64_t, int, int, int, int, bool, float> p, int parts) {
        return emulator::forward_shared_bytes(std::apply(problem_of, p), parts);
    });
    m.def("row_of_token", [](int columns, int token) { return gpsa::Columns(columns).row_of(token); });
    m.def(
        "tiled_forward",
        [](std::tuple<int64_t, int, int, int, int, bool, float> p, float dropout_p,
           const std::map<std::string, PyTensor>& tensors, uint64_t seed, bool deferred_copies) {
            gpsa::Problem problem = std::apply(problem_of, p);
            problem.dropout_p = dropout_p;
            return counts_of(emulator::tiled_forward(problem, arguments_of(tensors), {seed, deferred_copies}));
        });
    m.def(
        "tiled_backward",
        [](std::tuple<int64_t, int, int, int, int, bool, float> p, float dropout_p,
           const std::map<std::string, PyTensor>& tensors, uint64_t seed, bool deferred_copies) {
            gpsa::Problem problem = std::apply(problem_of, p);
            problem.dropout_p = dropout_p;
            return counts_of(emulator::tiled_backward(problem, arguments_of(tensors), {seed, deferred_copies}));
        });
    m.def("tiled_slots", [](std::tuple<int64_t, int, int, int, int, bool, float> p, float dropout_p) {
        gpsa::Problem problem = std::apply(problem_of, p);
        problem.dropout_p = dropout_p;
        return emulator::tiled_slots(problem);
    });
    m.def(
        "dropout_mask",
        [](int rows, int columns, float dropout_p, const std::map<std::string, PyTensor>& tensors, int64_t image,
           bool transposed) {
            gpsa::Problem problem{};
            problem.rows = rows;
            problem.columns = columns;
            problem.dropout_p = dropout_p;
            emulator::dropout_mask(problem, arguments_of(tensors), image, transposed);
        });
    m.def("philox", &emulator::philox_words);
}
