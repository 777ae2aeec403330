// The operators of namespace gpsa_cuda: tensors in, the structs of gpsa.h out, one launcher called.
//
// Only libtorch's stable ABI is used, so that one library serves every torch from 2.10 on. All of a call is here, since
// in Python it takes as long as a small kernel. The device is checked last: all else is tested where there is no GPU.

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "gpsa.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t row_alignment = 16, element_bytes = 2;  // bytes: rows are read and written 16 at a time

gpsa::Dtype dtype_of(bool bfloat16) { return bfloat16 ? gpsa::Dtype::bfloat16 : gpsa::Dtype::float16; }

gpsa::Tensor struct_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

/// The tensors of a call as the kernels can read them, all of them on q's device. What they cannot read as it lies is
/// copied, and the copy kept here.
class Inputs {
public:
    explicit Inputs(const Tensor& q) : q(q) {}

    /// `t`, of q's shape and dtype, in rows that can be read 16 bytes at a time.
    gpsa::Tensor tokens(const char* name, const Tensor& t) {
        check_device(name, t);
        STD_TORCH_CHECK(t.scalar_type() == q.scalar_type(), name, " must have q's dtype");
        STD_TORCH_CHECK(t.dim() == 4, name, " must have 4 dimensions, got ", t.dim());
        bool readable = t.stride(3) == 1 && reinterpret_cast<uintptr_t>(t.data_ptr()) % row_alignment == 0;
        for (int axis = 0; axis < 4; ++axis) {
            STD_TORCH_CHECK(
                t.size(axis) == q.size(axis), name, " must have q's size ", q.size(axis), " in dimension ", axis,
                ", got ", t.size(axis));
            readable &= axis == 3 || t.size(axis) <= 1 || t.stride(axis) * element_bytes % row_alignment == 0;
        }
        return struct_of(readable ? t : copy(t, t.scalar_type()));
    }

    /// `count` numbers without gaps in float32.
    const float* floats(const char* name, const Tensor& t, int64_t count) {
        check_device(name, t);
        STD_TORCH_CHECK(t.numel() == count, name, " must have ", count, " elements, got ", t.numel());
        const bool readable = t.scalar_type() == ScalarType::Float && t.is_contiguous();
        return static_cast<float*>((readable ? t : copy(t, ScalarType::Float)).data_ptr());
    }

    const int64_t* seed(const std::optional<Tensor>& t) const {
        STD_TORCH_CHECK(t.has_value(), "dropout needs a seed");
        STD_TORCH_CHECK(t->scalar_type() == ScalarType::Long && t->numel() == 1, "seed must be one int64");
        check_device("seed", *t);
        return static_cast<const int64_t*>(t->data_ptr());
    }

private:
    const Tensor& q;
    std::vector<Tensor> copies;

    void check_device(const char* name, const Tensor& t) const {
        STD_TORCH_CHECK(t.device() == q.device(), name, " must be on q's device");
    }
    const Tensor& copy(const Tensor& t, ScalarType dtype) {
        constexpr auto same = std::nullopt;
        constexpr auto contiguous = torch::headeronly::MemoryFormat::Contiguous;
        return copies.emplace_back(torch::stable::to(t, dtype, same, same, same, false, true, contiguous));
    }
};

/// What forward and backward are both given.
template <typename Call>
Call call_of(
    Inputs& inputs, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pos_weight, const Tensor& gate,
    const std::optional<Tensor>& seed, int64_t rows, int64_t columns, double scale, double dropout_p) {
    STD_TORCH_CHECK(q.dim() == 4, "q must have 4 dimensions, got ", q.dim());
    const ScalarType dtype = q.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "q must be float16 or bfloat16");
    STD_TORCH_CHECK(
        rows > 0 && columns > 0 && rows * columns == q.size(2), "rows * columns must be the ", q.size(2),
        " tokens of q, got ", rows, " * ", columns);
    Call call{};
    const int64_t* const seed_data = dropout_p > 0 ? inputs.seed(seed) : nullptr;
    call.problem = {q.size(0),        int(q.size(1)), int(rows),
                    int(columns),     int(q.size(3)), float(scale),
                    float(dropout_p), seed_data,      dtype_of(dtype == ScalarType::BFloat16)};
    call.q = inputs.tokens("q", q);
    call.k = inputs.tokens("k", k);
    call.v = inputs.tokens("v", v);
    call.pos_weight = inputs.floats("pos_weight", pos_weight, 3 * q.size(1));
    call.gate = inputs.floats("gate", gate, q.size(1));
    return call;
}

/// New memory on q's device, as is the next.
template <size_t dimensions>
Tensor empty(const int64_t (&sizes)[dimensions], const int64_t (&strides)[dimensions], int32_t dtype, const Tensor& q) {
    int32_t device = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(q.get(), &device));
    AtenTensorHandle made = nullptr;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dimensions, sizes, strides, dtype, device, q.get_device_index(), &made));
    return Tensor(made);
}

/// (B, H, N, D) in the memory layout of (B, N, H, D), so that merging the heads is a view; `filled_in` says where it
/// is.
Tensor empty_output(const Tensor& q, gpsa::Tensor& filled_in) {
    const int64_t heads = q.size(1), tokens = q.size(2), dim = q.size(3);
    int32_t dtype = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(q.get(), &dtype));
    const Tensor made = empty({q.size(0), heads, tokens, dim}, {tokens * heads * dim, dim, heads * dim, 1}, dtype, q);
    filled_in = struct_of(made);
    return made;
}

/// Calls `launch` with a workspace and the current stream of q's device, with that device current. The workspace may be
/// freed once kernels are launched: what uses its memory next runs after them, on the same stream.
template <typename Call>
void launch_on(const Tensor& q, const char* (*launch)(const Call&, cudaStream_t), Call& call, int64_t workspace_bytes) {
    std::optional<Tensor> workspace;
    if (workspace_bytes > 0) workspace = empty({workspace_bytes}, {1}, aoti_torch_dtype_uint8(), q);
    call.workspace = workspace ? workspace->data_ptr() : nullptr;
    STD_TORCH_CHECK(q.is_cuda(), "q must be on a CUDA device");
    if (q.numel() == 0) return;
    const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(q.get_device_index(), &stream));
    const char* error = launch(call, static_cast<cudaStream_t>(stream));
    STD_TORCH_CHECK(error == nullptr, "gpsa_cuda: ", error);
}

std::tuple<Tensor, std::optional<Tensor>, std::optional<Tensor>> forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pos_weight, const Tensor& gate,
    const std::optional<Tensor>& seed, int64_t rows, int64_t columns, double scale, double dropout_p, bool save) {
    Inputs inputs(q);
    auto call = call_of<gpsa::Forward>(inputs, q, k, v, pos_weight, gate, seed, rows, columns, scale, dropout_p);
    const gpsa::Sizes sizes = gpsa::sizes(call.problem, q.is_cuda() ? q.get_device_index() : -1);
    const Tensor out = empty_output(q, call.out);
    std::optional<Tensor> content, logsumexp;
    if (save && sizes.content) content = empty_output(q, call.content);
    if (save) {
        const int64_t heads = q.size(1), tokens = q.size(2);
        logsumexp = empty({q.size(0), heads, tokens}, {heads * tokens, tokens, 1}, aoti_torch_dtype_float32(), q);
        call.logsumexp = static_cast<float*>(logsumexp->data_ptr());
    }
    launch_on(q, gpsa::launch_forward, call, save ? sizes.forward_workspace : sizes.inference_workspace);
    return {out, content, logsumexp};
}

/// The numbers of `total` from `first` on in the shape and dtype of `like`: a view where the dtype is total's.
Tensor part_of(const Tensor& total, int64_t first, const Tensor& like) {
    const int64_t strides[] = {like.dim() == 2 ? like.size(1) : 1, 1};
    AtenTensorHandle view = nullptr;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(total.get(), like.dim(), like.sizes().data(), strides, first, &view));
    const ScalarType dtype = like.scalar_type();
    return total.scalar_type() == dtype ? Tensor(view) : torch::stable::to(Tensor(view), dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pos_weight,
    const Tensor& gate, const std::optional<Tensor>& seed, int64_t rows, int64_t columns, double scale,
    double dropout_p, const std::optional<Tensor>& content, const Tensor& logsumexp) {
    Inputs inputs(q);
    auto call = call_of<gpsa::Backward>(inputs, q, k, v, pos_weight, gate, seed, rows, columns, scale, dropout_p);
    call.grad_out = inputs.tokens("grad_out", grad_out);
    call.logsumexp = inputs.floats("logsumexp", logsumexp, q.size(0) * q.size(1) * q.size(2));
    const gpsa::Sizes sizes = gpsa::sizes(call.problem, q.is_cuda() ? q.get_device_index() : -1);
    if (content && sizes.content) call.content = inputs.tokens("content", *content);
    const Tensor grad_q = empty_output(q, call.grad_q);
    const Tensor grad_k = empty_output(q, call.grad_k), grad_v = empty_output(q, call.grad_v);
    const int64_t numbers = 4 * q.size(1);
    const Tensor sums = empty({q.size(0) * sizes.slots, numbers}, {numbers, 1}, aoti_torch_dtype_float32(), q);
    call.sums = static_cast<float*>(sums.data_ptr());
    launch_on(q, gpsa::launch_backward, call, sizes.backward_workspace);
    const int64_t first = 0;
    Tensor total = torch::stable::sum(sums, torch::headeronly::IntHeaderOnlyArrayRef(&first, 1));
    const ScalarType dtype = pos_weight.scalar_type();
    if (dtype == gate.scalar_type() && dtype != ScalarType::Float) total = torch::stable::to(total, dtype);  // at once
    return {grad_q, grad_k, grad_v, part_of(total, 0, pos_weight), part_of(total, pos_weight.numel(), gate)};
}

/// Whether backward of a shape, for any batch and heads, reads the content branch's own output on a device.
bool saves_content(int64_t rows, int64_t columns, int64_t head_dim, bool bfloat16, double dropout_p, int64_t device) {
    const gpsa::Problem problem{
        1, 1, int(rows), int(columns), int(head_dim), 1.0f, float(dropout_p), nullptr, dtype_of(bfloat16)};
    return gpsa::sizes(problem, int(device)).content;
}

}  // namespace

// In the order of Call, in backends/base.py.
STABLE_TORCH_LIBRARY(gpsa_cuda, library) {
    library.def(
        "forward(Tensor q, Tensor k, Tensor v, Tensor pos_weight, Tensor gate, Tensor? seed, int rows, int columns, "
        "float scale, float dropout_p, bool save) -> (Tensor out, Tensor? content, Tensor? logsumexp)");
    library.def(
        "backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor pos_weight, Tensor gate, Tensor? seed, "
        "int rows, int columns, float scale, float dropout_p, Tensor? content, Tensor logsumexp) "
        "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_pos_weight, Tensor grad_gate)");
    library.def(
        "saves_content(int rows, int columns, int head_dim, bool bfloat16, float dropout_p, int device) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(gpsa_cuda, CompositeExplicitAutograd, library) {
    library.impl("forward", TORCH_BOX(&forward));
    library.impl("backward", TORCH_BOX(&backward));
    library.impl("saves_content", TORCH_BOX(&saves_content));
}
