#include "emulator.h"

#include <map>
#include <memory>
#include <random>
#include <utility>

#include "fiber.h"

#if defined(__x86_64__)
asm(R"(
    .text
    .globl gpsa_switch_stack
    .type gpsa_switch_stack, @function
gpsa_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size gpsa_switch_stack, .-gpsa_switch_stack
    .section .note.GNU-stack,"",@progbits
    .text
)");
#endif

namespace gpsa::emulator {

Settings settings;
Counters counters;
Place here;

/// Which bytes belong to a tensor, and what has been written.
///
/// Blocks of a launch may run in any order, and so must not read what the launch writes: an element is read before the
/// launch that writes it or after it, but for a thread that reads an element and then writes it.
class Region {
public:
    Region(std::string name, Use use, uintptr_t begin) : name(std::move(name)), use(use), begin(begin) {}

    void add(int element, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
        int64_t last = 0, count = 1;
        for (size_t axis = 0; axis < sizes.size(); ++axis) {
            last += (sizes[axis] - 1) * strides[axis];
            count *= sizes[axis];
        }
        if (count == 0) return;
        cells.resize(std::max(cells.size(), static_cast<size_t>((last + 1) * element / 2)));
        for (int64_t i = 0; i < count; ++i) {
            int64_t rest = i, offset = 0;
            for (size_t axis = sizes.size(); axis-- > 0; rest /= sizes[axis])
                offset += rest % sizes[axis] * strides[axis];
            for (int part = 0; part < element / 2; ++part) cells[offset * element / 2 + part] = valid;
        }
    }

    void read(const void* address, int bytes, int64_t thread) {
        const size_t first = cell(address, bytes, "read");
        for (size_t i = first; use != Use::input && i < first + bytes / 2; ++i) {
            if (cells[i] & written) throw Error("read of " + name + " in the launch that writes it");
            if (!(cells[i] & initialised)) throw Error("read of " + name + " before it is written");
            readers[i] = readers[i] == nobody || readers[i] == thread ? thread : several;
        }
    }

    void write(const void* address, int bytes, int64_t thread) {
        if (use == Use::input) throw Error("write to the input " + name);
        const size_t first = cell(address, bytes, "write");
        for (size_t i = first; i < first + bytes / 2; ++i) {
            if (cells[i] & written) throw Error(text(name, " is written twice at byte ", 2 * first));
            if (readers[i] != nobody && readers[i] != thread) {
                throw Error(text("write to ", name, " at byte ", 2 * first, ", read by another thread"));
            }
            cells[i] |= written;
        }
    }

    void next_launch() {
        for (uint8_t& cell : cells) {
            if (cell & written) cell = valid | initialised;
        }
        readers.assign(use == Use::input ? 0 : cells.size(), nobody);
    }

    void finish() const {
        const auto missing = std::count(cells.begin(), cells.end(), valid);
        if (use == Use::output && missing > 0)
            throw Error(text(2 * missing, " bytes of ", name, " were never written"));
    }

private:
    static constexpr uint8_t valid = 1, written = 2, initialised = 4;
    static constexpr int64_t nobody = -1, several = -2;
    const std::string name;
    const Use use;
    const uintptr_t begin;
    std::vector<uint8_t> cells;    // one for 2 bytes
    std::vector<int64_t> readers;  // of what is written, too: the thread, counted over all blocks

    size_t cell(const void* pointer, int bytes, const char* verb) const {
        const auto address = reinterpret_cast<uintptr_t>(pointer);
        const size_t first = (address - begin) / 2;
        bool inside = address >= begin && address % bytes == 0 && first + bytes / 2 <= cells.size();
        for (int i = 0; inside && i < bytes / 2; ++i) inside = cells[first + i] & valid;
        if (!inside) {
            const auto at = static_cast<int64_t>(address - begin);
            throw Error(text(verb, " of ", bytes, " bytes outside of ", name, " (or not aligned), at byte ", at));
        }
        return first;
    }
};

void count_access(Accesses& counter, const uint64_t* addresses, uint32_t lanes, int bytes) {
    // 128 bytes a wavefront: 8 lanes' 16 bytes at a time, or the 4 bytes of all 32 lanes
    const int step = bytes == 16 ? 8 : 32, words = std::max(bytes / 4, 1);
    ++counter.instructions;
    for (int first = 0; first < 32; first += step) {
        std::vector<uint64_t> banks[32];
        size_t deepest = 0;
        for (int lane = first; lane < first + step; ++lane) {
            if (!(lanes >> lane & 1)) continue;
            for (int word = 0; word < words; ++word) {
                const uint64_t index = addresses[lane] / 4 + word;
                auto& bank = banks[index % 32];
                if (std::find(bank.begin(), bank.end(), index) == bank.end()) bank.push_back(index);
                deepest = std::max(deepest, bank.size());
            }
        }
        counter.conflicts += deepest > 1 ? deepest - 1 : 0;
    }
}

namespace {

/// Shared or global accesses of a warp, put together again: the k-th access of every lane since the warp last met is
/// one instruction.
class AccessLog {
public:
    void record(int lane, uint64_t address, int bytes) {
        size_t k = counts[lane];
        while (k < used && instructions[k].bytes != bytes) ++k;  // an instruction that this lane skipped
        counts[lane] = static_cast<int>(k) + 1;
        if (k >= instructions.size()) instructions.resize(2 * k + 16);
        for (; used <= k; ++used) instructions[used].lanes = 0;
        Instruction& instruction = instructions[k];
        instruction.bytes = bytes;
        instruction.lanes |= 1u << lane;
        instruction.address[lane] = address;
    }

    /// Counts the instructions, each by its lanes' addresses, and forgets them.
    template <typename Counter>
    void flush(Counter& counter, void (*count)(Counter&, const uint64_t* addresses, uint32_t lanes, int bytes)) {
        for (size_t k = 0; k < used; ++k) {
            count(counter, instructions[k].address, instructions[k].lanes, instructions[k].bytes);
        }
        used = 0;
        std::fill(std::begin(counts), std::end(counts), 0);
    }

private:
    struct Instruction {
        int bytes = 0;
        uint32_t lanes = 0;
        uint64_t address[32];
    };
    int counts[32] = {};
    std::vector<Instruction> instructions;
    size_t used = 0;
};

void count_bytes(int64_t& counter, const uint64_t* addresses, uint32_t lanes, int bytes) {
    std::vector<uint64_t> wanted;
    for (int lane = 0; lane < 32; ++lane) {
        if (lanes >> lane & 1) wanted.push_back(addresses[lane]);
    }
    std::sort(wanted.begin(), wanted.end());
    counter += bytes * (std::unique(wanted.begin(), wanted.end()) - wanted.begin());
}

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
    int group;
};

struct Thread {
    Fiber fiber;
    const char* waiting = nullptr;  // for what, null: can run
    bool done = false;
    int committed = 0;         // groups of copies
    std::vector<Copy> copies;  // that are not waited for, oldest first
};

struct Warp {
    std::vector<uint32_t> clock;
    uint64_t priority = 0;
    uint32_t arrived = 0;
    void* lanes[32] = {};
    AccessLog loads, stores, copies, global_loads, global_stores;
};

struct Array {
    int begin, end;
    std::string name;
};

std::map<uintptr_t, Region> regions;  // by the first byte of the tensor
std::vector<std::unique_ptr<Thread>> threads;
std::vector<Warp> warps;
int at_barrier = 0;  // threads that wait in sync_block
std::vector<std::max_align_t> shared;
std::vector<Cell> cells;
std::vector<Access> reads;  // [cell][warp]
std::vector<Array> arrays;
std::mt19937_64 random_numbers;
Fiber scheduler;
const std::function<void()>* body = nullptr;
std::string error;

Warp& own_warp() { return warps[here.thread / 32]; }
char* bytes_of_shared() { return reinterpret_cast<char*>(shared.data()); }

}  // namespace

// What messages say.

static std::string where(int thread) {
    return text("thread ", thread, " (warp ", thread / 32, ", lane ", thread % 32, ")");
}

static std::string array_at(int64_t offset) {
    for (const Array& array : arrays) {
        if (offset >= array.begin && offset < array.end) {
            return text("shared array ", array.name, " at byte ", offset - array.begin);
        }
    }
    return text("shared memory at byte ", offset);
}

template <typename... Parts>
[[noreturn]] static void fail(const Parts&... parts) {
    throw Error(text(parts..., ", by ", where(here.thread), " of block (", here.block_x, ", ", here.block_y, ")"));
}

static std::string stuck() {
    std::map<std::string, std::string> groups;
    const auto state = [&](int t) { return threads[t]->done ? "have ended" : text("wait at ", threads[t]->waiting); };
    for (int first = 0; first < here.threads;) {
        int last = first;
        while (last + 1 < here.threads && state(last + 1) == state(first)) ++last;
        groups[state(first)] += last > first ? text(" ", first, "-", last) : text(" ", first);
        first = last + 1;
    }
    std::string message = text("deadlock in block (", here.block_x, ", ", here.block_y, "):");
    for (const auto& [name, members] : groups) message += " threads" + members + " " + name + ";";
    return message;
}

// Shared memory.

int allocate_shared(int begin, int bytes, const char* name) {
    const int end = begin + bytes, size = static_cast<int>(cells.size()) * 2;
    if (end > size) fail("shared array ", name, " ends at byte ", end, " of ", size);
    const auto known = std::find_if(arrays.begin(), arrays.end(), [&](const Array& a) { return a.begin == begin; });
    if (known == arrays.end()) {
        arrays.push_back({begin, end, name});
    } else if (known->end != end || known->name != name) {
        fail("the threads lay shared memory out differently");
    }
    return (end + 15) / 16 * 16;
}

static void check_bounds(const char* verb, const SharedAddress& at, int bytes) {
    if (at.offset < at.begin || at.offset + bytes > at.end || at.offset % bytes != 0) {
        fail(
            verb, " of ", bytes, " bytes at byte ", at.offset - at.begin, " is outside of (or not aligned in) the ",
            at.end - at.begin, " bytes of ", array_at(at.begin));
    }
}

static bool ordered(const Access& access) {
    return access.thread == here.thread || warps[here.thread / 32].clock[access.thread / 32] > access.clock;
}

char* shared_read(const SharedAddress& at, int bytes, bool logged) {
    check_bounds("read", at, bytes);
    if (logged) own_warp().loads.record(here.thread % 32, at.offset, bytes);
    const int warp = here.thread / 32;
    const uint32_t now = warps[warp].clock[warp];
    for (int64_t i = at.offset / 2; i < (at.offset + bytes + 1) / 2; ++i) {
        Cell& cell = cells[i];
        if (cell.copying >= 0) fail("read of ", array_at(2 * i), " while a cp.async into it is not waited for");
        if (!cell.initialised) fail("read of uninitialised ", array_at(2 * i));
        if (cell.write.thread >= 0 && !ordered(cell.write)) {
            fail(
                "race: read of ", array_at(2 * i), ", written by ", where(cell.write.thread),
                " with no barrier between");
        }
        Access& seen = reads[i * warps.size() + warp];
        const bool same = seen.thread == here.thread || seen.thread == -1 || seen.clock != now;
        seen = {now, static_cast<int16_t>(same ? here.thread : -2)};
    }
    return bytes_of_shared() + at.offset;
}

static void mark_write(int64_t offset, int bytes) {
    const int warp = here.thread / 32;
    for (int64_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) {
        Cell& cell = cells[i];
        const auto race = [&](const char* verb, const std::string& who) {
            fail("race: write to ", array_at(2 * i), verb, who, " with no barrier between");
        };
        if (cell.copying >= 0) fail("write to ", array_at(2 * i), " while a cp.async into it is not waited for");
        if (cell.write.thread >= 0 && !ordered(cell.write)) race(", written by ", where(cell.write.thread));
        for (size_t w = 0; w < warps.size(); ++w) {
            Access& seen = reads[i * warps.size() + w];
            if (seen.thread != -1 && seen.thread != here.thread && warps[warp].clock[w] <= seen.clock) {
                race(", read by ", seen.thread < 0 ? text("warp ", w) : where(seen.thread));
            }
            seen.thread = -1;
        }
        cell.write = {warps[warp].clock[warp], static_cast<int16_t>(here.thread)};
        cell.initialised = true;
    }
}

char* shared_write(const SharedAddress& at, int bytes) {
    check_bounds("write", at, bytes);
    own_warp().stores.record(here.thread % 32, at.offset, bytes);
    mark_write(at.offset, bytes);
    return bytes_of_shared() + at.offset;
}

// Global memory and the copies from there.

void begin() {
    regions.clear();
    counters = {};
}

void know(
    const std::string& name, Use use, const void* data, int element, const std::vector<int64_t>& sizes,
    const std::vector<int64_t>& strides) {
    const auto address = reinterpret_cast<uintptr_t>(data);
    if (data) regions.try_emplace(address, name, use, address).first->second.add(element, sizes, strides);
}

void finish() {
    for (const auto& [address, region] : regions) region.finish();
}

Region* region(const void* first_byte) {
    const auto found = regions.find(reinterpret_cast<uintptr_t>(first_byte));
    if (found == regions.end()) throw Error("a pointer to global memory that is no argument of the kernel");
    return &found->second;
}

static int64_t thread_in_launch() {
    return (int64_t{here.block_y} * here.blocks_x + here.block_x) * here.threads + here.thread;
}

void global_read(Region& region, const void* address, int bytes) {
    region.read(address, bytes, thread_in_launch());
    own_warp().global_loads.record(here.thread % 32, reinterpret_cast<uintptr_t>(address), bytes);
}

void global_write(Region& region, const void* address, int bytes) {
    region.write(address, bytes, thread_in_launch());
    own_warp().global_stores.record(here.thread % 32, reinterpret_cast<uintptr_t>(address), bytes);
}

static void move(const Copy& copy) {
    if (copy.from) {
        std::memcpy(bytes_of_shared() + copy.to, copy.from, 16);
    } else {
        std::memset(bytes_of_shared() + copy.to, 0, 16);
    }
}

void copy_async(const SharedAddress& to, Region& region, const void* from, bool is_valid) {
    check_bounds("cp.async", to, 16);
    if (is_valid) global_read(region, from, 16);
    own_warp().copies.record(here.thread % 32, to.offset, 16);
    mark_write(to.offset, 16);
    for (int64_t i = to.offset / 2; i < to.offset / 2 + 8; ++i) cells[i].copying = static_cast<int16_t>(here.thread);
    Thread& self = *threads[here.thread];
    self.copies.push_back({to.offset, is_valid ? from : nullptr, self.committed});
    if (!settings.deferred_copies) move(self.copies.back());
}

void copy_commit() { ++threads[here.thread]->committed; }

void copy_wait(int pending) {
    Thread& self = *threads[here.thread];
    const auto is_pending = [&](const Copy& copy) { return copy.group >= self.committed - pending; };
    const auto first_pending = std::find_if(self.copies.begin(), self.copies.end(), is_pending);
    for (auto copy = self.copies.begin(); copy != first_pending; ++copy) {
        if (settings.deferred_copies) move(*copy);
        for (int64_t i = copy->to / 2; i < copy->to / 2 + 8; ++i) cells[i].copying = -1;
        mark_write(copy->to, 16);
    }
    self.copies.erase(self.copies.begin(), first_pending);
}

// Threads.

static void wait(const char* name) {
    Thread& self = *threads[here.thread];
    self.waiting = name;
    self.fiber.switch_to(scheduler);
}

/// All lanes of the warp are at the same point: what they did since the last such point is counted.
static void met(Warp& warp) {
    warp.loads.flush(counters.load, count_access);
    warp.stores.flush(counters.store, count_access);
    warp.copies.flush(counters.copy, count_access);
    warp.global_loads.flush(counters.global_read, count_bytes);
    warp.global_stores.flush(counters.global_written, count_bytes);
}

/// Fails where a lane of this warp waits elsewhere, or has ended.
static void check_own_warp(const char* name) {
    const int first = here.thread / 32 * 32;
    for (int other = first; other < first + 32; ++other) {
        const char* there = threads[other]->done ? "its end" : threads[other]->waiting;
        if (there && there != name && std::strcmp(there, name) != 0) {
            fail("divergence: ", name, " reached while ", where(other), " is at ", there);
        }
    }
}

bool rendezvous(const char* name, void* lane) {
    check_own_warp(name);
    Warp& warp = own_warp();
    warp.lanes[here.thread % 32] = lane;
    warp.arrived |= 1u << here.thread % 32;
    if (warp.arrived != 0xffffffffu) {
        wait(name);
        return false;
    }
    warp.arrived = 0;
    const int first = here.thread / 32 * 32;
    for (int other = first; other < first + 32; ++other) threads[other]->waiting = nullptr;
    return true;
}

void* const* gather(const char* name, void* lane) {
    if (!rendezvous(name, lane)) return nullptr;
    met(own_warp());
    return own_warp().lanes;
}

void sync_warp() {
    if (gather("sync_warp", nullptr)) ++own_warp().clock[here.thread / 32];
}

void sync_block() {
    check_own_warp("sync_block");
    if (++at_barrier < here.threads) return wait("sync_block");
    at_barrier = 0;
    std::vector<uint32_t> joined(warps.size());
    for (size_t w = 0; w < warps.size(); ++w) {
        met(warps[w]);
        ++warps[w].clock[w];
        for (size_t i = 0; i < warps.size(); ++i) joined[i] = std::max(joined[i], warps[w].clock[i]);
    }
    for (Warp& warp : warps) warp.clock = joined;
    for (auto& thread : threads) thread->waiting = nullptr;
}

static void fiber_main() {
    Fiber::entered(scheduler);
    Thread& self = *threads[here.thread];
    try {
        (*body)();
        if (!self.copies.empty()) fail("the thread ends with copies that it has not waited for");
    } catch (const std::exception& e) {
        error = e.what();
    }
    self.done = true;
    self.fiber.switch_to(scheduler);
}

static int pick() {
    const auto runnable = [&](int t) { return !threads[t]->done && !threads[t]->waiting; };
    const int count = here.threads;
    if (settings.schedule == 0) {
        for (int step = 1; step <= count; ++step) {
            const int t = (here.thread + step) % count;
            if (runnable(t)) return t;
        }
        return -1;
    }
    int best = -1, lanes[32], size = 0;
    for (int t = 0; t < count; ++t) {
        if (!runnable(t)) continue;
        const int warp = t / 32;
        if (best < 0 || warps[warp].priority > warps[best].priority) best = warp, size = 0;
        if (warp == best) lanes[size++] = t;
    }
    if (best < 0) return -1;
    const uint64_t draw = random_numbers();
    if (draw % 256 == 0) warps[best].priority = random_numbers();
    return lanes[(draw >> 32) % size];
}

static void run_block(int x, int y) {
    here.block_x = x;
    here.block_y = y;
    arrays.clear();
    at_barrier = 0;
    std::fill(cells.begin(), cells.end(), Cell{});
    std::fill(reads.begin(), reads.end(), Access{});
    std::memset(bytes_of_shared(), 0xff, cells.size() * 2);
    for (size_t w = 0; w < warps.size(); ++w) {
        warps[w] = Warp{};
        warps[w].clock.assign(warps.size(), 0);
        warps[w].clock[w] = 1;
        warps[w].priority = random_numbers();
    }
    for (auto& thread : threads) {
        thread->done = false;
        thread->waiting = nullptr;
        thread->committed = 0;
        thread->copies.clear();
        thread->fiber.prepare(fiber_main);
    }
    here.thread = here.threads - 1;
    for (int next = pick(); next >= 0; next = pick()) {
        here.thread = next;
        scheduler.switch_to(threads[next]->fiber);
        if (!error.empty()) throw Error(error);
    }
    for (const auto& thread : threads) {
        if (!thread->done) throw Error(stuck());
    }
    for (Warp& warp : warps) met(warp);
}

void launch(int grid_x, int grid_y, int thread_count, int shared_bytes, const std::function<void()>& kernel) {
    body = &kernel;
    threads.clear();
    for (int t = 0; t < thread_count; ++t) threads.push_back(std::make_unique<Thread>());
    warps.assign(thread_count / 32, Warp{});
    shared.assign(shared_bytes / sizeof(std::max_align_t) + 1, {});
    cells.assign(shared_bytes / 2, Cell{});
    reads.assign(cells.size() * warps.size(), Access{});
    random_numbers.seed(settings.schedule);
    here = {0, thread_count, 0, 0, grid_x};
    error.clear();
    for (auto& [address, region] : regions) region.next_launch();
    for (int y = 0; y < grid_y; ++y) {
        for (int x = 0; x < grid_x; ++x) run_block(x, y);
    }
}

}  // namespace gpsa::emulator
