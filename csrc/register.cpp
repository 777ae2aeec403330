// The operators of namespace gpsa_cuda: tensors in, the structs of gpsa.h out, one launcher called.
//
// Only libtorch's stable ABI is used, so that one library serves every torch from 2.10 on. What comes in was allocated
// by gpsa_kernels/backends/cuda.py; checked here is what would make a kernel read or write where it must not. The
// device is checked last, so that all other checks can be tested where there is no GPU.

#include <cstdint>
#include <optional>
#include <tuple>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "gpsa.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t row_alignment = 16;  // bytes: rows are read and written 16 bytes at a time
constexpr int64_t element_bytes = 2;

void check_device(const char* name, const Tensor& t, const Tensor& q) {
    STD_TORCH_CHECK(t.device() == q.device(), name, " must be on q's device");
}

gpsa::Problem problem_of(
    const Tensor& q, const std::optional<Tensor>& seed, int64_t rows, int64_t columns, double scale, double dropout_p) {
    STD_TORCH_CHECK(q.dim() == 4, "q must have 4 dimensions, got ", q.dim());
    const ScalarType dtype = q.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "q must be float16 or bfloat16");
    STD_TORCH_CHECK(
        rows > 0 && columns > 0 && rows * columns == q.size(2), "rows * columns must be the ", q.size(2),
        " tokens of q, got ", rows, " * ", columns);
    gpsa::Problem problem{};
    problem.batch = q.size(0);
    problem.heads = static_cast<int>(q.size(1));
    problem.rows = static_cast<int>(rows);
    problem.columns = static_cast<int>(columns);
    problem.head_dim = static_cast<int>(q.size(3));
    problem.scale = static_cast<float>(scale);
    problem.dropout_p = static_cast<float>(dropout_p);
    problem.dtype = dtype == ScalarType::Half ? gpsa::Dtype::float16 : gpsa::Dtype::bfloat16;
    if (dropout_p > 0) {
        STD_TORCH_CHECK(seed.has_value(), "dropout needs a seed");
        STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 1, "seed must be one int64");
        check_device("seed", *seed, q);
        problem.seed = static_cast<const int64_t*>(seed->data_ptr());
    }
    return problem;
}

/// `t` of q's shape and dtype, with rows that can be read 16 bytes at a time.
gpsa::Tensor tokens_of(const char* name, const Tensor& t, const Tensor& q) {
    check_device(name, t, q);
    STD_TORCH_CHECK(t.scalar_type() == q.scalar_type(), name, " must have q's dtype");
    STD_TORCH_CHECK(t.dim() == 4, name, " must have 4 dimensions, got ", t.dim());
    for (int axis = 0; axis < 4; ++axis) {
        STD_TORCH_CHECK(
            t.size(axis) == q.size(axis), name, " must have q's size ", q.size(axis), " in dimension ", axis, ", got ",
            t.size(axis));
    }
    STD_TORCH_CHECK(t.stride(3) == 1, name, " must have stride 1 in its last dimension, got ", t.stride(3));
    bool aligned = reinterpret_cast<uintptr_t>(t.data_ptr()) % row_alignment == 0;
    for (int axis = 0; axis < 3; ++axis) {
        aligned &= t.size(axis) <= 1 || t.stride(axis) * element_bytes % row_alignment == 0;
    }
    STD_TORCH_CHECK(aligned, name, " must have rows that start at multiples of ", row_alignment, " bytes");
    return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

gpsa::Tensor tokens_of(const char* name, const std::optional<Tensor>& t, const Tensor& q) {
    return t ? tokens_of(name, *t, q) : gpsa::Tensor{};
}

float* floats_of(const char* name, const Tensor& t, int64_t count, const Tensor& q) {
    check_device(name, t, q);
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous(), name, " must be float32 and contiguous");
    STD_TORCH_CHECK(t.numel() == count, name, " must have ", count, " elements, got ", t.numel());
    return static_cast<float*>(t.data_ptr());
}

void* workspace_of(const std::optional<Tensor>& t, int64_t bytes, const Tensor& q) {
    if (bytes == 0) {
        return nullptr;
    }
    STD_TORCH_CHECK(t.has_value(), "a workspace of ", bytes, " bytes is needed");
    check_device("workspace", *t, q);
    const int64_t size = t->numel() * static_cast<int64_t>(t->element_size());
    STD_TORCH_CHECK(t->is_contiguous() && size >= bytes, "workspace must be contiguous and of ", bytes, " bytes");
    return t->data_ptr();
}

gpsa::Sizes sizes_for(const gpsa::Problem& problem, const Tensor& q) {
    return gpsa::sizes(problem, q.is_cuda() ? q.get_device_index() : -1);
}

/// Calls `launch` with the current stream of q's device, with that device current.
template <typename Arguments>
void launch_on(const Tensor& q, const char* (*launch)(const Arguments&, cudaStream_t), const Arguments& arguments) {
    STD_TORCH_CHECK(q.is_cuda(), "q must be on a CUDA device");
    if (q.numel() == 0) {
        return;
    }
    const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(q.get_device_index(), &stream));
    const char* error = launch(arguments, static_cast<cudaStream_t>(stream));
    STD_TORCH_CHECK(error == nullptr, "gpsa_cuda: ", error);
}

void forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pos_weight, const Tensor& gate,
    const std::optional<Tensor>& seed, const Tensor& out, const std::optional<Tensor>& content,
    const std::optional<Tensor>& logsumexp, const std::optional<Tensor>& workspace, int64_t rows, int64_t columns,
    double scale, double dropout_p) {
    gpsa::Forward call{};
    call.problem = problem_of(q, seed, rows, columns, scale, dropout_p);
    call.q = tokens_of("q", q, q);
    call.k = tokens_of("k", k, q);
    call.v = tokens_of("v", v, q);
    call.pos_weight = floats_of("pos_weight", pos_weight, 3 * q.size(1), q);
    call.gate = floats_of("gate", gate, q.size(1), q);
    call.out = tokens_of("out", out, q);
    call.content = tokens_of("content", content, q);
    if (logsumexp) {
        call.logsumexp = floats_of("logsumexp", *logsumexp, q.size(0) * q.size(1) * q.size(2), q);
    }
    const gpsa::Sizes sizes = sizes_for(call.problem, q);
    call.workspace = workspace_of(workspace, content ? sizes.forward_workspace : sizes.inference_workspace, q);
    launch_on(q, gpsa::launch_forward, call);
}

void backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pos_weight,
    const Tensor& gate, const std::optional<Tensor>& seed, const std::optional<Tensor>& content,
    const Tensor& logsumexp, const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v, const Tensor& sums,
    const std::optional<Tensor>& workspace, int64_t rows, int64_t columns, double scale, double dropout_p) {
    gpsa::Backward call{};
    call.problem = problem_of(q, seed, rows, columns, scale, dropout_p);
    call.grad_out = tokens_of("grad_out", grad_out, q);
    call.q = tokens_of("q", q, q);
    call.k = tokens_of("k", k, q);
    call.v = tokens_of("v", v, q);
    call.pos_weight = floats_of("pos_weight", pos_weight, 3 * q.size(1), q);
    call.gate = floats_of("gate", gate, q.size(1), q);
    call.content = tokens_of("content", content, q);
    call.logsumexp = floats_of("logsumexp", logsumexp, q.size(0) * q.size(1) * q.size(2), q);
    call.grad_q = tokens_of("grad_q", grad_q, q);
    call.grad_k = tokens_of("grad_k", grad_k, q);
    call.grad_v = tokens_of("grad_v", grad_v, q);
    const gpsa::Sizes sizes = sizes_for(call.problem, q);
    call.sums = floats_of("sums", sums, q.size(0) * q.size(1) * sizes.slots * 4, q);
    call.workspace = workspace_of(workspace, sizes.backward_workspace, q);
    launch_on(q, gpsa::launch_backward, call);
}

/// What backends/cuda.py has to allocate for a device, as gpsa.h says.
std::tuple<int64_t, int64_t, int64_t, int64_t, bool> sizes(
    int64_t batch, int64_t heads, int64_t rows, int64_t columns, int64_t head_dim, bool bfloat16, double dropout_p,
    int64_t device) {
    gpsa::Problem problem{};
    problem.batch = batch;
    problem.heads = static_cast<int>(heads);
    problem.rows = static_cast<int>(rows);
    problem.columns = static_cast<int>(columns);
    problem.head_dim = static_cast<int>(head_dim);
    problem.dropout_p = static_cast<float>(dropout_p);
    problem.dtype = bfloat16 ? gpsa::Dtype::bfloat16 : gpsa::Dtype::float16;
    const gpsa::Sizes sizes = gpsa::sizes(problem, static_cast<int>(device));
    return {sizes.slots, sizes.inference_workspace, sizes.forward_workspace, sizes.backward_workspace, sizes.content};
}

}  // namespace

STABLE_TORCH_LIBRARY(gpsa_cuda, library) {
    library.def(
        "forward(Tensor q, Tensor k, Tensor v, Tensor pos_weight, Tensor gate, Tensor? seed, Tensor(a!) out, "
        "Tensor(b!)? content, Tensor(c!)? logsumexp, Tensor(d!)? workspace, int rows, int columns, float scale, "
        "float dropout_p) -> ()");
    library.def(
        "backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor pos_weight, Tensor gate, Tensor? seed, "
        "Tensor? content, Tensor logsumexp, Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v, Tensor(d!) sums, "
        "Tensor(e!)? workspace, int rows, int columns, float scale, float dropout_p) -> ()");
    library.def(
        "sizes(int batch, int heads, int rows, int columns, int head_dim, bool bfloat16, float dropout_p, int device) "
        "-> (int slots, int inference_workspace, int forward_workspace, int backward_workspace, bool content)");
}

STABLE_TORCH_LIBRARY_IMPL(gpsa_cuda, CompositeExplicitAutograd, library) {
    library.impl("forward", TORCH_BOX(&forward));
    library.impl("backward", TORCH_BOX(&backward));
    library.impl("sizes", TORCH_BOX(&sizes));
}
