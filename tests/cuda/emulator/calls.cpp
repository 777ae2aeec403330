// The calls of gpsa.h for tests/emulation.py: their tensors are made known to the emulator, then they are launched.
#include <malloc.h>

#include "dropout.cuh"
#include "emulator.h"
#include "launch.h"
#include "tiled.cuh"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace gpsa;
using namespace gpsa::emulator;

/// As the settings choose.
EXPORT Sizes emulated_sizes(const Problem& p) {
    if (settings.row_blocks < 0) return sizes(p, 0);
    if (settings.row_blocks > 0) return {1, 0, 0, 0, false};
    const int64_t forward = TiledWorkspace(p, false).bytes;
    return {tiled_slots(p), forward, forward, TiledWorkspace(p, true).bytes, true};
}

namespace {

int64_t tokens(const Problem& p) { return int64_t{p.rows} * p.columns; }

void know_tokens(const Problem& p, const char* name, Use use, const Tensor& t) {
    know(name, use, t.data, 2, {p.batch, p.heads, tokens(p), p.head_dim}, {t.batch, t.head, t.token, 1});
}

void know_floats(const char* name, Use use, const float* data, int64_t count) {
    know(name, use, data, 4, {count}, {1});
}

/// Runs a call. `layout`: of a workspace for which `bytes` were asked. Null, or what is wrong, until the next call.
template <typename Call, typename Launch>
const char* run(const Call& call, const TiledWorkspace& layout, int64_t bytes, Launch launch) {
    static std::string message;
    const Problem& p = call.problem;
    know_tokens(p, "q", Use::input, call.q);
    know_tokens(p, "k", Use::input, call.k);
    know_tokens(p, "v", Use::input, call.v);
    know_floats("pos_weight", Use::input, call.pos_weight, 3 * p.heads);
    know_floats("gate", Use::input, call.gate, p.heads);
    know("seed", Use::input, p.seed, 8, {1}, {1});
    try {
        const auto given = call.workspace ? static_cast<int64_t>(malloc_usable_size(call.workspace)) : 0;
        if (given < bytes || given > 1.1 * bytes + 64) throw Error(text(given, " bytes of workspace, not ", bytes));
        for (int i = 0; bytes > 0 && i < TiledWorkspace::arrays; ++i) {
            const void* array = layout.size[i] ? layout.floats(call.workspace, i) : nullptr;
            know(text("workspace array ", i), Use::workspace, array, 2, {layout.size[i] / 2}, {1});
        }
        if (const char* refused = launch()) throw Error(refused);
        finish();
        return nullptr;
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
}

}  // namespace

EXPORT const char* emulated_forward(const Forward& call) {
    const Problem& p = call.problem;
    const Sizes asked = emulated_sizes(p);
    begin();
    know_tokens(p, "out", Use::output, call.out);
    know_tokens(p, "content", Use::output, call.content);
    know_floats("logsumexp", Use::output, call.logsumexp, p.batch * p.heads * tokens(p));
    const int64_t bytes = call.logsumexp ? asked.forward_workspace : asked.inference_workspace;
    return run(call, TiledWorkspace(p, false), bytes, [&] {
        return settings.row_blocks < 0    ? launch_forward(call, nullptr)
               : settings.row_blocks == 0 ? launch_tiled_forward(call, Launcher(nullptr))
                                          : launch_whole_image_forward(call, settings.row_blocks, Launcher(nullptr));
    });
}

EXPORT const char* emulated_backward(const Backward& call) {
    const Problem& p = call.problem;
    const Sizes asked = emulated_sizes(p);
    begin();
    know_tokens(p, "grad_out", Use::input, call.grad_out);
    know_tokens(p, "content", Use::input, call.content);
    know_floats("logsumexp", Use::input, call.logsumexp, p.batch * p.heads * tokens(p));
    know_tokens(p, "grad_q", Use::output, call.grad_q);
    know_tokens(p, "grad_k", Use::output, call.grad_k);
    know_tokens(p, "grad_v", Use::output, call.grad_v);
    know_floats("sums", Use::output, call.sums, p.batch * asked.slots * 4 * p.heads);
    return run(call, TiledWorkspace(p, true), asked.backward_workspace, [&] {
        return settings.row_blocks == 0 ? launch_tiled_backward(call, Launcher(nullptr))
                                        : launch_backward(call, nullptr);
    });
}

/// What is launched, in order, by a forward call that saves nothing (0), by one that saves what backward reads (1) and
/// by a backward call (2). Nothing runs. How many launches; none where the call is refused, too.
EXPORT int emulated_launches(const Problem& problem, int which, Launch* found) {
    Record record;
    const auto stream = reinterpret_cast<cudaStream_t>(&record);
    Forward forward{};
    Backward backward{};
    forward.problem = backward.problem = problem;
    if (which > 0 && sizes(problem, 0).content) forward.content.data = backward.content.data = &record;
    if (which < 2 ? launch_forward(forward, stream) : launch_backward(backward, stream)) return 0;
    std::copy(record.begin(), record.end(), found);
    return static_cast<int>(record.size());
}

/// Writes the dropout mask of a (batch, head), (N, N) of 0 and 1: a warp per (16, 16) tile of scores or of transposed
/// scores.
EXPORT void dropout_mask(const Problem& problem, int64_t batch_head, bool transposed, uint16_t* mask) {
    begin();
    know("seed", Use::input, problem.seed, 8, {1}, {1});
    const int count = problem.rows * problem.columns, tiles = (count + 15) / 16;
    launch(tiles, tiles, 32, 0, [&] {
        const Dropout dropout(problem, batch_head);
        const int query = 16 * block_y(), key = 16 * block_x();
        const uint32_t bits = transposed ? dropout.keep_transposed(query, key) : dropout.keep(query, key);
        for (int i = 0; i < 8; ++i) {
            const int row = fragment_row() + i / 2 % 2 * 8, column = fragment_column() + i % 2 + i / 4 * 8;
            const int at_query = query + (transposed ? column : row), at_key = key + (transposed ? row : column);
            if (at_query < count && at_key < count) mask[at_query * count + at_key] = bits >> i & 1;
        }
    });
}

EXPORT int row_of_token(int columns, int token) { return FewColumns(columns).row_of(token); }

EXPORT void philox_words(Words& words, const uint32_t (&key)[2]) { words = philox(words, key[0], key[1]); }
