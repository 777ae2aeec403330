// The machine under the host's primitives: one thread block at a time, every CUDA thread a fiber, every access checked.
//
// Shared memory is watched in cells of 2 bytes. A cell knows its last write and the reads since then, each with the
// clock of the warp at that time. Clocks are vectors over the warps (Lamport's order): a barrier joins the vectors of
// the warps that meet there, __syncwarp advances its own warp's. Two accesses that no barrier orders are a race,
// whether or not this schedule made them collide.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace gpsa::emulator {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

template <typename... Parts>
std::string text(const Parts&... parts) {
    std::ostringstream stream;
    (stream << ... << parts);
    return stream.str();
}

/// How calls are run, as tests/emulation.py sets it.
struct Settings {
    uint64_t schedule = 0;         // 0: warps and lanes in turn; else random priorities drawn from it
    bool deferred_copies = false;  // cp.async moves its bytes when they are waited for, else at once
    int row_blocks = -1;           // of the whole-image forward kernel; 0: tiled kernels; -1: as csrc/launch.cu chooses
    int multiprocessors = 132, shared_bytes = 227 * 1024;  // of the device
};
extern "C" __attribute__((visibility("default"))) Settings settings;

/// Shared-memory accesses of one kind, and how many wavefronts bank conflicts added.
struct Accesses {
    int64_t instructions = 0, conflicts = 0;
};

struct Counters {
    int64_t global_read = 0, global_written = 0;  // bytes; lanes of a warp that want the same address count once
    int64_t mma = 0, exp2 = 0;
    Accesses ldmatrix, copy, load, store;
};
/// Of the last call.
extern "C" __attribute__((visibility("default"))) Counters counters;

// A call: what its tensors are, then its launches, then whether all has been written.

/// What a tensor in global memory is for: only read; written, every element; written and read again by later launches.
enum class Use { input, output, workspace };

/// Forgets the call before.
void begin();
/// Makes a tensor known (its first byte, bytes of an element, sizes, strides in elements), unless `data` is null.
void know(
    const std::string& name, Use use, const void* data, int element, const std::vector<int64_t>& sizes,
    const std::vector<int64_t>& strides);
/// Runs `body` by every thread of every block. Launches follow one another as in a stream.
void launch(int grid_x, int grid_y, int threads, int shared_bytes, const std::function<void()>& body);
/// Throws unless every element of every output has been written.
void finish();

// For the primitives: what the running thread does.

struct Place {
    int thread, threads, block_x, block_y, blocks_x;
};
extern Place here;

class Region;  // a tensor in global memory
Region* region(const void* first_byte);
void global_read(Region& region, const void* address, int bytes);
void global_write(Region& region, const void* address, int bytes);

/// Where a Shared<T> points: bytes of shared memory, and of the array that it may point into.
struct SharedAddress {
    int begin, end;
    int64_t offset;
};
int allocate_shared(int begin, int bytes, const char* name);
char* shared_read(const SharedAddress& at, int bytes, bool logged = true);
char* shared_write(const SharedAddress& at, int bytes);
void count_access(Accesses& counter, const uint64_t* addresses, uint32_t lanes, int bytes);

void copy_async(const SharedAddress& to, Region& region, const void* from, bool valid);
void copy_commit();
void copy_wait(int pending);

void sync_block();
void sync_warp();
/// All lanes of the warp meet. True for the last one, which acts for all before any other goes on.
bool rendezvous(const char* name, void* lane = nullptr);
/// The same, counting what the lanes did since they last met; what they all handed in, for the last one, else null.
void* const* gather(const char* name, void* lane);
/// The last lane to arrive calls `run` with what all handed in.
template <typename Lane, typename Run>
void collective(const char* name, Lane& lane, Run run) {
    if (void* const* gathered = gather(name, &lane)) {
        std::array<Lane*, 32> lanes;
        for (int i = 0; i < 32; ++i) lanes[i] = static_cast<Lane*>(gathered[i]);
        run(lanes);
    }
}

}  // namespace gpsa::emulator
