// Launchers of gpsa.h for the host whose results show what they were given: test_register.py reads them.
#include <malloc.h>

#include <initializer_list>

#include "gpsa.h"

extern "C" {
gpsa::Sizes answer;      // of gpsa::sizes
const void* given[6];    // where q, k, v, pos_weight, gate and grad_out lie
float numbers[13];       // pos_weight and gate of two heads, rows, columns, scale, dropout_p, seed
int64_t workspace_size;  // at least what was asked for, and not much more
}

namespace gpsa {
namespace {

/// Every element of some tensors, by `visit(element)`, where `element(t)` is t's.
template <typename Visit>
void visit_elements(const Problem& p, Visit visit) {
    for (int64_t b = 0; b < p.batch; ++b) {
        for (int64_t h = 0; h < p.heads; ++h) {
            for (int64_t n = 0; n < p.rows * p.columns; ++n) {
                for (int64_t d = 0; d < p.head_dim; ++d) {
                    visit([=](const Tensor& t) -> uint16_t& {
                        return static_cast<uint16_t*>(t.data)[b * t.batch + h * t.head + n * t.token + d];
                    });
                }
            }
        }
    }
}

/// What is the same in both calls: `read` can be read 16 bytes at a time.
template <typename Call>
const char* look_at(const Call& call, std::initializer_list<Tensor> read) {
    const Problem& p = call.problem;
    for (const Tensor& t : read) {
        if ((reinterpret_cast<uintptr_t>(t.data) | 2 * (t.batch | t.head | t.token)) % 16 != 0) return "unaligned rows";
    }
    const void* const addresses[] = {call.q.data, call.k.data, call.v.data, call.pos_weight, call.gate};
    for (int i = 0; i < 5; ++i) given[i] = addresses[i];
    workspace_size = call.workspace ? malloc_usable_size(call.workspace) : 0;
    float* to = numbers;
    for (int i = 0; i < 3 * p.heads; ++i) *to++ = call.pos_weight[i];
    for (int i = 0; i < p.heads; ++i) *to++ = call.gate[i];
    for (float number : {float(p.rows), float(p.columns), p.scale, p.dropout_p, float(*p.seed)}) *to++ = number;
    return nullptr;
}

}  // namespace

Sizes sizes(const Problem&, int) { return answer; }

const char* launch_forward(const Forward& call, cudaStream_t) {
    visit_elements(call.problem, [&](auto element) {
        element(call.out) = element(call.q) ^ element(call.k) ^ element(call.v);
        if (call.content.data) element(call.content) = element(call.k);
    });
    for (int i = 0; call.logsumexp && i < 48; ++i) call.logsumexp[i] = i;
    return look_at(call, {call.q, call.k, call.v});
}

const char* launch_backward(const Backward& call, cudaStream_t) {
    visit_elements(call.problem, [&](auto element) {
        element(call.grad_q) = element(call.q) ^ element(call.grad_out);
        element(call.grad_k) = element(call.k) ^ (call.content.data ? element(call.content) : 0);
        element(call.grad_v) = element(call.v);
    });
    given[5] = call.grad_out.data;
    for (int i = 0; i < call.problem.batch * answer.slots * 4 * call.problem.heads; ++i)
        call.sums[i] = call.logsumexp[i];
    return look_at(call, {call.q, call.k, call.v, call.grad_out, call.content});
}

}  // namespace gpsa
