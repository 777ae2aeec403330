// Forward and backward calls of both families on the emulator. Their bits must not depend on the schedule, on when
// copies move, or on how far apart the rows of the results lie.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "emulator.h"
#include "gpsa.h"

using namespace gpsa;

extern "C" Sizes emulated_sizes(const Problem& problem);
extern "C" const char* emulated_forward(const Forward& call);
extern "C" const char* emulated_backward(const Backward& call);

static void require(bool holds, const char* what) {
    if (holds) return;
    fprintf(stderr, "%s\n", what);
    exit(1);
}

/// (B, H, N, D) in memory of its own, no byte too much, with `gap` elements between rows: noise, or NaN without a seed.
struct Tokens {
    std::vector<uint16_t> memory;
    Tensor tensor;

    Tokens(const Problem& p, int gap, uint32_t seed = 0) {
        const int64_t row = p.head_dim + gap, head = p.rows * p.columns * row;
        memory.assign(p.batch * p.heads * head - gap, 0x7e00);
        for (uint16_t& element : memory) {
            if (seed) element = (seed = seed * 1664525 + 1013904223) >> 16 & 0xbbff;  // below 1 in size
        }
        tensor = {memory.data(), p.heads * head, head, row};
    }
};

/// The bits of all results, as numbers.
static std::vector<float> results(const Problem& p, int gap) {
    const Tokens q(p, 0, 1), k(p, 0, 2), v(p, 0, 3), grad_out(p, 0, 4);
    const Tokens out(p, gap), content(p, gap), grad_q(p, gap), grad_k(p, gap), grad_v(p, gap);
    const std::vector<float> pos_weight(3 * p.heads, -0.1f), gate(p.heads, 0.5f);
    const Sizes sizes = emulated_sizes(p);
    std::vector<float> logsumexp(p.batch * p.heads * p.rows * p.columns, NAN);
    std::vector<float> sums(p.batch * sizes.slots * 4 * p.heads, NAN);
    std::vector<char> forward_workspace(sizes.forward_workspace), backward_workspace(sizes.backward_workspace);
    const Tensor saved = sizes.content ? content.tensor : Tensor{};
    const char* error = emulated_forward(
        {p, q.tensor, k.tensor, v.tensor, pos_weight.data(), gate.data(), out.tensor, saved, logsumexp.data(),
         forward_workspace.data()});
    require(!error, error);
    error = emulated_backward(
        {p, grad_out.tensor, q.tensor, k.tensor, v.tensor, pos_weight.data(), gate.data(), saved, logsumexp.data(),
         grad_q.tensor, grad_k.tensor, grad_v.tensor, sums.data(), backward_workspace.data()});
    require(!error, error);
    for (float sum : sums) require(std::isfinite(sum), "a sum that is not finite");
    sums.insert(sums.end(), logsumexp.begin(), logsumexp.end());
    for (const Tokens* t : {&out, &grad_q, &grad_k, &grad_v}) {
        for (size_t i = 0; i < t->memory.size(); ++i) {
            if (static_cast<int64_t>(i) % t->tensor.token < p.head_dim) sums.push_back(t->memory[i]);
        }
    }
    return sums;
}

int main() {
    const int64_t seed = 7;
    for (bool tiled : {false, true}) {
        for (float dropout_p : {0.3f, 0.0f}) {
            // two row blocks, or two tiles of tokens and two of coordinates along x
            const int rows = tiled ? 4 : 3, columns = tiled ? 19 : 7;
            const Problem p{2, 2, rows, columns, 40, 0.25f, dropout_p, &seed, Dtype::float16};
            emulator::settings.row_blocks = tiled ? 0 : 2;
            std::vector<float> expected;
            for (int run = 0; run < 4; ++run) {
                emulator::settings.schedule = run / 2;
                emulator::settings.deferred_copies = run % 2;
                const std::vector<float> found = results(p, run % 2 ? 24 : 0);
                require(run == 0 || found == expected, "other bits");
                expected = found;
            }
        }
    }
    puts("done");
}
