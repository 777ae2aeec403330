// The machine under the host's primitives: one thread block at a time, every CUDA thread a fiber, every access checked.
//
// Shared memory is watched in cells of 2 bytes. A cell knows its last write and the reads since then, each with the
// clock of the warp at that time. Clocks are vectors over the warps (Lamport's order): a barrier joins the vectors of
// the warps that meet there, __syncwarp advances its own warp's. Two accesses that no barrier orders are a race,
// whether or not this schedule made them collide.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

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
    uint64_t schedule = 0;         // 0: warps and lanes in turn; else drawn from it
    bool deferred_copies = false;  // cp.async moves its bytes when waited for, else at once
    int row_blocks = -1;           // of the whole-image forward kernel; 0: tiled; -1: as csrc/launch.cu chooses
    int multiprocessors = 132, shared_bytes = 227 * 1024;  // of the device
};
extern "C" __attribute__((visibility("default"))) Settings settings;

/// What a launcher asked for.
struct Launch {
    const char* kernel;  // "TiledForward", without namespace and parameters
    unsigned grid_x, grid_y;
    int threads, shared_bytes;
};

/// Shared-memory accesses of one kind, and how many wavefronts bank conflicts added.
struct Accesses {
    int64_t instructions = 0, conflicts = 0;
};

struct Counters {
    int64_t global_read = 0, global_written = 0;  // bytes; lanes of a warp that want the same address count once
    int64_t mma = 0, exp2 = 0;
    Accesses ldmatrix, copy, load, store;
};

/// What a tensor in global memory is for: only read; written, every element; written and read again by later launches.
enum class Use { input, output, workspace };

/// A tensor in global memory: which bytes belong to it, and what has been written.
///
/// Blocks of a launch may run in any order, and so must not read what the launch writes: an element is read before the
/// launch that writes it or after it, but for a thread that reads an element and then writes it.
class Region {
public:
    Region(std::string name, Use use, uintptr_t begin) : name(std::move(name)), use(use), begin(begin) {}

    /// Adds the elements of a tensor that begins here: bytes of an element, sizes and strides (in elements).
    void add(int element, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides);
    void read(const void* address, int bytes, int64_t thread);
    void write(const void* address, int bytes, int64_t thread);
    /// Another launch follows: what has been written can be read and written again.
    void next_launch();
    /// Throws unless every element of an output has been written.
    void finish() const;

private:
    static constexpr uint8_t valid = 1, written = 2, initialised = 4;
    static constexpr int64_t nobody = -1, several = -2;
    const std::string name;
    const Use use;
    const uintptr_t begin;
    std::vector<uint8_t> cells;    // one for 2 bytes
    std::vector<int64_t> readers;  // of what is written, too: the thread, counted over all blocks
    size_t cell(const void* address, int bytes, const char* verb) const;
};

/// Shared or global accesses of a warp, put together again: the k-th access of every lane since the warp last met is
/// one instruction.
class AccessLog {
public:
    void record(int lane, uint64_t address, int bytes);
    void flush_shared(Accesses& counter);
    void flush_global(int64_t& bytes);

private:
    struct Instruction {
        int bytes = 0;
        uint32_t lanes = 0;
        uint64_t address[32];
    };
    int counts[32] = {};
    std::vector<Instruction> instructions;
    size_t used = 0;
    void clear();
};

void count_access(Accesses& counter, const uint64_t* addresses, uint32_t lanes, int bytes);

/// Where a Shared<T> points: bytes of shared memory, and of the array that it may point into.
struct SharedAddress {
    int begin, end;
    int64_t offset;
};

class Machine {
public:
    Counters counters;
    bool only_recorded = false;  // launches are written down and not carried out
    std::vector<Launch> launches;
    std::map<uintptr_t, Region> regions;  // by the first byte of the tensor

    /// Makes a tensor known (its first byte, bytes of an element, sizes, strides), unless `data` is null.
    void know(
        const std::string& name, Use use, const void* data, int element, const std::vector<int64_t>& sizes,
        const std::vector<int64_t>& strides);
    /// Runs `body` by every thread of every block. Launches follow one another as in a stream.
    void launch(int grid_x, int grid_y, int threads, int shared_bytes, const std::function<void()>& body);

    // For the primitives: what the running thread does.

    int thread_index() const { return current; }
    int thread_count() const { return static_cast<int>(threads.size()); }
    int block_x() const { return block[0]; }
    int block_y() const { return block[1]; }
    int allocate_shared(int begin, int bytes, const char* name);
    char* shared_read(const SharedAddress& at, int bytes, bool logged = true);
    char* shared_write(const SharedAddress& at, int bytes);
    void global_read(Region& region, const void* address, int bytes);
    void global_write(Region& region, const void* address, int bytes);
    void copy_async(const SharedAddress& to, Region& region, const void* from, bool valid);
    void copy_commit();
    void copy_wait(int pending);
    void barrier(int number, int count, const char* name);
    /// All lanes of the warp meet. True for the last one, which acts for all before any other goes on.
    bool rendezvous(const char* name, void* lane);
    /// The same, counting what the lanes did since they last met. The last one calls `run` with what all handed in.
    template <typename Lane, typename Run>
    void collective(const char* name, Lane& lane, Run run) {
        if (!rendezvous(name, &lane)) return;
        met(own_warp());
        std::array<Lane*, 32> lanes;
        for (int i = 0; i < 32; ++i) lanes[i] = static_cast<Lane*>(own_warp().lanes[i]);
        run(lanes);
    }
    void sync_warp();
    Region& region(const void* data);

private:
    struct Access {
        uint32_t clock = 0;
        int16_t thread = -1;  // -1: none; in `reads`, -2: several lanes of the warp
    };
    struct Cell {
        Access write;
        int16_t copying = -1;  // the thread whose cp.async is under way
        bool initialised = false;
    };
    struct Copy {
        int64_t to;
        const void* from;  // null: zeros
    };
    struct Thread {
        Fiber fiber;
        const char* waiting = nullptr;  // for what, null: can run
        bool done = false;
        std::vector<std::vector<Copy>> groups;  // committed, oldest first
        std::vector<Copy> open;
    };
    struct Warp {
        std::vector<uint32_t> clock;
        uint64_t priority = 0;
        uint32_t arrived = 0;
        void* lanes[32] = {};
        AccessLog loads, stores, copies, global_loads, global_stores;
    };
    struct Barrier {
        int count = 0;
        std::vector<int> waiting;
    };
    struct Array {
        int begin, end;
        std::string name;
    };

    std::vector<std::unique_ptr<Thread>> threads;
    std::vector<Warp> warps;
    std::map<int, Barrier> barriers;
    std::vector<std::max_align_t> shared;
    std::vector<Cell> cells;
    std::vector<Access> reads;  // [cell][warp]
    std::vector<Array> arrays;
    std::mt19937_64 random;
    Fiber scheduler;
    int current = 0, block[2] = {0, 0}, blocks_x = 0;
    const std::function<void()>* body = nullptr;
    std::string error;

    static void fiber_main();
    void run_block(int x, int y);
    int pick();
    void wait(const char* name);
    void met(Warp& warp);
    Warp& own_warp() { return warps[current / 32]; }
    int64_t thread_in_launch() const;
    bool ordered(const Access& access) const;
    char* bytes_of_shared() { return reinterpret_cast<char*>(shared.data()); }
    void check_bounds(const char* verb, const SharedAddress& at, int bytes) const;
    void check_own_warp(const char* name) const;
    void mark_write(int64_t offset, int bytes);
    void move(const Copy& copy);
    template <typename... Parts>
    [[noreturn]] void fail(const Parts&... parts) const {
        throw Error(text(parts..., ", by ", where(current), " of block (", block[0], ", ", block[1], ")"));
    }
    std::string where(int thread) const;
    std::string array_at(int64_t offset) const;
    std::string stuck() const;
};

extern Machine* machine;  // the one that is running

}  // namespace gpsa::emulator
