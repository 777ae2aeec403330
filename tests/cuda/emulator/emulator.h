// The machine under the host's primitives: one thread block at a time, every CUDA thread a fiber, every access checked.
//
// Shared memory is watched in cells of 2 bytes. A cell knows its last write and the reads since then, each with the
// clock of the warp at that time. Clocks are vectors over the warps (Lamport's order): a barrier joins the vectors of
// the warps that meet there, __syncwarp advances its own warp's. Two accesses that no barrier orders are a race,
// whether or not this schedule made them collide.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

namespace gpsa::emulator {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// How one launch is run.
struct Options {
    uint64_t schedule = 0;         // 0: warps and lanes in turn; else random priorities drawn from it
    bool deferred_copies = false;  // cp.async moves its bytes when they are waited for, else at once
    bool only_recorded = false;    // launches are written down and not carried out
};

/// What a launcher asked for.
struct Launch {
    const char* kernel;  // its type's name, as typeid gives it
    unsigned grid_x, grid_y;
    int threads, shared_bytes;
};

/// Shared-memory accesses of one kind: wavefronts, and how many of them bank conflicts added.
struct Wavefronts {
    int64_t instructions = 0, wavefronts = 0, conflicts = 0;
};

struct Counters {
    int64_t global_read = 0, global_written = 0;  // bytes; lanes of a warp that want the same address count once
    int64_t mma = 0, exp2 = 0, barriers = 0;
    Wavefronts ldmatrix, copy, load, store;
};

/// What a tensor in global memory is for: only read; written, every element; written and read again by later launches.
enum class Use { input, output, workspace };

/// A tensor in global memory: which bytes belong to it, and what has been written.
///
/// Blocks of a launch may run in any order, and so must not read what the launch writes: an element is read before the
/// launch that writes it or after it, but for a thread that reads an element and then writes it.
class Region {
public:
    Region(std::string name, Use use) : name(std::move(name)), use(use) {}

    /// Adds the elements of a tensor: its first byte, bytes of an element, sizes and strides (in elements).
    void add(uintptr_t data, int element, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides);
    void read(uintptr_t address, int bytes, int64_t thread);
    void write(uintptr_t address, int bytes, int64_t thread);
    /// Another launch follows: what has been written can be read and written again.
    void next_launch();
    /// Throws unless every element of an output has been written.
    void finish() const;

    const std::string name;
    const Use use;

private:
    static constexpr uint8_t valid = 1, written = 2, initialised = 4;
    static constexpr int64_t nobody = -1, several = -2;
    uintptr_t begin = 0;
    std::vector<uint8_t> cells;    // one for 2 bytes
    std::vector<int64_t> readers;  // of what is written, too: the thread, counted over all blocks
    size_t cell(uintptr_t address, int bytes, const char* verb) const;
};

/// Shared or global accesses of a warp, put together again: the k-th access of every lane since the warp last met is
/// one instruction.
class AccessLog {
public:
    void record(int lane, uint64_t address, int bytes);
    void flush_shared(Wavefronts& counter);
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

void count_wavefronts(Wavefronts& counter, const uint64_t* addresses, uint32_t lanes, int bytes);

/// A warp collective: what its lanes handed in, lane by lane.
using Collective = void (*)(void* const* lanes);

class Machine {
public:
    Counters counters;
    Options options;
    std::vector<Launch> launches;
    std::map<uintptr_t, std::shared_ptr<Region>> regions;  // by the first byte of the tensor

    /// Runs `body` by every thread of every block. Launches follow one another as in a stream.
    void launch(int grid_x, int grid_y, int threads, int shared_bytes, const std::function<void()>& body);

    // For the primitives: what the running thread does.

    int thread_index() const;
    int thread_count() const { return static_cast<int>(threads.size()); }
    int block_x() const { return block[0]; }
    int block_y() const { return block[1]; }
    int allocate_shared(int begin, int bytes, const char* name);
    char* shared_read(int64_t offset, int begin, int end, int bytes);
    char* shared_write(int64_t offset, int begin, int end, int bytes);
    void log_shared(bool is_store, int64_t offset, int bytes);
    void global_read(Region& region, const void* address, int bytes);
    void global_write(Region& region, const void* address, int bytes);
    void copy_async(int64_t to, int begin, int end, Region& region, const void* from, bool valid);
    void copy_commit();
    void copy_wait(int pending);
    void barrier(int number, int count, const char* name);
    /// All lanes of the warp meet. True for the last one, which acts for all before any other goes on.
    bool rendezvous(const char* name, void* lane);
    /// The same, counting what the lanes did since they last met, then carrying `run` out; null: sync_warp.
    void collective(const char* name, Collective run, void* lane);
    std::shared_ptr<Region> region(const void* data) const;

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
    int64_t thread_in_launch() const;

    static void fiber_main();
    void run_block(int x, int y);
    int pick();
    void wait(const char* name);
    void met(Warp& warp);
    bool ordered(const Access& access) const;
    char* bytes_of_shared() { return reinterpret_cast<char*>(shared.data()); }
    void check_bounds(const char* verb, int64_t offset, int begin, int end, int bytes) const;
    void mark_write(int64_t offset, int bytes);
    void move(const Copy& copy);
    [[noreturn]] void fail(const std::string& what) const;
    std::string where(int thread) const;
    std::string array_at(int64_t offset) const;
    std::string stuck() const;
};

extern Machine* machine;  // the one that is running

}  // namespace gpsa::emulator
